"""Execute a program that ends with its parent: ``python -I -S launch.py OPTIONS -- PROGRAM``.

This script imports only the standard library, because it runs isolated. It does in this order:

1. leave the terminal's process group, so that Ctrl-C reaches only the supervisor;
2. as root, change to the user ``--run-as UID:GID`` (PostgreSQL refuses root). The binaries and the
   data may lie below a directory that only root can enter, so two capabilities that override file
   permissions are kept as ambient ones. If the kernel refuses these, the directories named by
   ``--reach`` get mode 711 instead;
3. ask the kernel to send ``--signal`` when the parent dies. This comes after step 2, which would
   undo it. The parent may have died before, so its pid is compared afterwards;
4. take ``--lock`` (released when this process ends) or ``--lock-tree`` (released when its last
   descendant ends). This waits for a predecessor whose parent was just killed;
5. remove the files named by ``--remove``. With the lock held, a predecessor's pid file is stale,
   even if another process has that pid now.

For step 4, a pid file and a look into the process table was rejected: the kernel reuses pids.
"""

import argparse
import ctypes
import fcntl
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_SET_SECUREBITS = 28
SECBIT_NO_SETUID_FIXUP = 1 << 2
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAPABILITY_VERSION_3 = 0x20080522
KEPT_CAPABILITIES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
LOCK_WAIT_S = 20.0
EXIT_FAILED = 126


class CapabilityHeader(ctypes.Structure):
    """``struct __user_cap_header_struct`` of linux/capability.h."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class CapabilityData(ctypes.Structure):
    """``struct __user_cap_data_struct`` of linux/capability.h."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


class LaunchError(Exception):
    """The program cannot start; the message is one line for people."""


def main(arguments: list[str]) -> None:
    """Execute the program; on failure, write one line to stderr and exit with EXIT_FAILED."""
    options = _parse(arguments)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _leave_terminal()
        if options.run_as:
            uid, _, gid = options.run_as.partition(":")
            _become(libc, int(uid), int(gid), options.reach)
        _die_with_parent(libc, options.parent, signal.Signals[f"SIG{options.signal}"])
        if options.lock:
            _lock(options.lock, fcntl.lockf)
        if options.lock_tree:
            _lock(options.lock_tree, fcntl.flock)
        for stale in options.remove:
            if os.path.lexists(stale):
                os.unlink(stale)  # noqa: PTH108 - pathlib is not worth its import time here
        if options.chdir:
            os.chdir(options.chdir)
        os.execvp(options.program[0], options.program)  # noqa: S606 - given by our supervisor
    except (LaunchError, OSError) as error:
        sys.stderr.write(f"cannot start {options.program[0]}: {_explain(error)}\n")
        sys.stderr.flush()
        os._exit(EXIT_FAILED)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--signal", choices=("KILL", "TERM", "QUIT", "INT"), required=True)
    parser.add_argument("--run-as", metavar="UID:GID")
    parser.add_argument("--reach", action="append", default=[], metavar="DIRECTORY")
    parser.add_argument("--lock", metavar="FILE")
    parser.add_argument("--lock-tree", metavar="FILE")
    parser.add_argument("--remove", action="append", default=[], metavar="FILE")
    parser.add_argument("--chdir", metavar="DIRECTORY")
    parser.add_argument("program", nargs="+")
    return parser.parse_args(arguments)


def _explain(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return (
            f"{error}; user {os.geteuid()} cannot reach it: run as an ordinary user, or move the"
            " project and its data to a directory that every user may enter"
        )
    return str(error)


def _leave_terminal() -> None:
    if os.getpid() != os.getpgrp():
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGPIPE, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _become(libc: ctypes.CDLL, uid: int, gid: int, reach: list[str]) -> None:
    # Without this, access(2), with which initdb finds its programs, ignores kept capabilities.
    libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    try:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    except OSError as error:
        raise LaunchError(
            f"PostgreSQL does not run as root, and the kernel refuses to change to user {uid}"
            f" ({error.strerror}): run as an ordinary user"
        ) from None
    if not _keep_capabilities(libc):
        for directory in reach:
            os.chmod(directory, 0o711)  # noqa: PTH101, S103 - others may enter, not list
        _set_capabilities(libc, 0, 0, 0)


def _keep_capabilities(libc: ctypes.CDLL) -> bool:
    """Keep those of KEPT_CAPABILITIES that root has. On False, all of root's are still held."""
    permitted = _permitted(libc)
    kept = sum(1 << number for number in KEPT_CAPABILITIES) & permitted
    _set_capabilities(libc, permitted, permitted, kept)
    raised = kept & 1 << KEPT_CAPABILITIES[0] and all(
        libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0) == 0
        for number in KEPT_CAPABILITIES
        if kept & 1 << number
    )
    return bool(raised) and _set_capabilities(libc, kept, kept, kept)


def _permitted(libc: ctypes.CDLL) -> int:
    data = (CapabilityData * 2)()
    header = CapabilityHeader(CAPABILITY_VERSION_3, 0)
    return data[0].permitted if libc.capget(ctypes.byref(header), data) == 0 else 0


def _set_capabilities(libc: ctypes.CDLL, effective: int, permitted: int, inheritable: int) -> bool:
    data = (CapabilityData * 2)()
    data[0].effective, data[0].permitted, data[0].inheritable = effective, permitted, inheritable
    header = CapabilityHeader(CAPABILITY_VERSION_3, 0)
    return bool(libc.capset(ctypes.byref(header), data) == 0)


def _die_with_parent(libc: ctypes.CDLL, parent: int, number: signal.Signals) -> None:
    if libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise LaunchError("the kernel refuses PR_SET_PDEATHSIG: the program would outlive sale up")
    if os.getppid() != parent:
        os._exit(EXIT_FAILED)


def _lock(path: str, take) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001 - flock or lockf
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > deadline:
                holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
                raise LaunchError(f"an earlier one (pid {holder}) does not end: kill it") from None
            time.sleep(0.01)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    os.set_inheritable(descriptor, True)  # noqa: FBT003 - the standard library's signature


if __name__ == "__main__":
    main(sys.argv[1:])
