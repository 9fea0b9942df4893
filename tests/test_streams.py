"""Commands and `sale up` work with closed streams and after their reader has gone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from service import Service

SALE = f"{sys.executable} -m sale"


def shell(line: str, service: Service) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "SALE_DATA_DIR": str(service.data_dir)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_command_succeeds_with_closed_streams(service: Service, closed: str) -> None:
    name = f"clerk-{os.urandom(4).hex()}"
    done = shell(f"{SALE} operator add {name} --role auditor {closed}", service)
    assert (done.returncode, done.stderr) == (0, "")
    listed = shell(f"{SALE} operator list {closed}", service)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert name in service.sale("operator", "list").out


def test_command_succeeds_after_its_reader_has_gone(service: Service) -> None:
    name = f"clerk-{os.urandom(4).hex()}"
    add = f"{SALE} operator add {name} --role auditor"
    # The reader ends before the command can have begun to write.
    done = shell(f"{{ {add}; echo status $? >&2; }} | true", service)
    assert done.stderr == "status 0\n"
    assert name in service.sale("operator", "list").out


def test_full_disk_under_the_output_is_reported(service: Service) -> None:
    done = shell(f"{SALE} operator list > /dev/full", service)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


@pytest.mark.fault
@pytest.mark.parametrize("output", [">&- <&-", "| true", "> /dev/full"])
def test_up_runs_on_after_its_output_is_gone(
    output: str, short_path: Path, redis_url: str, server_database_url: str
) -> None:
    stub = Path(__file__).with_name("stub_part.py")
    program = (
        "import sys; from sale.host import supervisor; from sale.cli import main\n"
        f"supervisor.run.__kwdefaults__['command'] = (sys.executable, {str(stub)!r})\n"
        "main.main()\n"
    )
    (short_path / "up.py").write_text(program)
    words = "up --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0"
    with subprocess.Popen(
        ["bash", "-c", f"{sys.executable} {short_path}/up.py {words} {output}"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "SALE_REDIS_URL": redis_url,
            "SALE_DATABASE_URL": server_database_url,
            "SALE_DATA_DIR": str(short_path / "data"),
        },
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if b"supervisor.ready" in line:
                    break
            else:
                pytest.fail("it ended before it was ready")
            time.sleep(0.5)
            assert process.poll() is None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=30)
