# Sourced by demo and test: `set_up "embedded test"` makes .venv with these extras of the project.
# Quick when nothing changed; what was interrupted is begun anew.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/.sale-setup
unfinished=$venv/.sale-unfinished
# Nothing of the caller's Python may reach into ours, nor a half-set deployment into a try-out.
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV
# The demo and the tests start many processes. Without bytecode each of them compiles the sources.
unset PYTHONDONTWRITEBYTECODE

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

# A shim may stand on the path and yet not run: each candidate is really executed.
usable() {
    "$1" -c '
import sys, venv, ensurepip
sys.exit(sys.version_info < (3, 11))
' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON does not do: Python 3.11 or newer with venv and" \
            "pip is needed."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 \
        /usr/bin/python3 /usr/local/bin/python3; do
        if usable "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "No usable Python: 3.11 or newer with venv and pip is needed (on Debian: python3-venv)." \
        "Or set PYTHON."
}

# What the installation depends on: the project's metadata and its place.
fingerprint() { { printf '%s\n' "$root"; cat "$root/pyproject.toml"; } | cksum | tr -d ' '; }

set_up() {
    local want have="" extra missing="" all python hash have_hash
    want=$1
    hash=$(fingerprint)
    # One at a time: demo and test may be started together.
    exec 9<"$root"
    if command -v flock >/dev/null 2>&1; then
        flock -w 900 9 || fail "Another set-up of $root does not end."
    fi
    if [ -e "$unfinished" ] || ! "$venv/bin/python" -c '' >/dev/null 2>&1; then
        rm -rf "$venv"
    fi
    if [ -f "$stamp" ]; then
        read -r have_hash have <"$stamp" || true
        [ "$have_hash" = "$hash" ] || missing=$want
    else
        missing=$want
    fi
    for extra in $want; do
        case " $have " in *" $extra "*) ;; *) missing="$missing $extra" ;; esac
    done
    if [ -n "$missing" ]; then
        all=$(printf '%s\n' $have $want | sort -u | paste -sd, -)
        if [ ! -x "$venv/bin/python" ]; then
            python=$(find_python) || exit 1
            say "Making $venv with $("$python" --version 2>&1) …"
            mkdir -p "$venv"
            : >"$unfinished"
            "$python" -m venv "$venv" || fail "$python -m venv failed."
        fi
        : >"$unfinished"
        rm -f "$stamp"
        say "Installing the project and what it needs ($all) …"
        "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
            --no-warn-script-location --editable "$root[$all]" ||
            fail "pip install failed; its message is above. Run again to go on."
        printf '%s %s\n' "$hash" "$(printf '%s' "$all" | tr , ' ')" >"$stamp"
        rm -f "$unfinished"
    fi
    exec 9<&-
}
