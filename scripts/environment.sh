# shellcheck shell=bash
# Sourced by quickstart.sh, test.sh and the Dockerfile: a virtual environment in .venv with this package installed.
# PYTHON chooses the interpreter (3.10 or newer); VENV another place, or "none" to use the active environment as it is.
# EXTRAS are the optional dependencies to install; CONSTRAINTS a file of pinned versions.
# DEVICE=cuda or cpu chooses torch's build; the default is cuda where nvidia-smi is.
: "${PYTHON:=}" "${VENV:=.venv}" "${EXTRAS:=train}" "${CONSTRAINTS:=}" "${DEVICE:=}"

find_python() { # sets PYTHON to an interpreter that is new enough
    local candidate tried=(python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)
    [ -z "$PYTHON" ] || tried=("$PYTHON")
    for candidate in "${tried[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            PYTHON=$candidate
            return
        fi
    done
    echo "error: no Python 3.10 or newer (tried ${tried[*]}); install one (macOS: brew install python; Debian, Ubuntu:" \
        "apt install python3 python3-venv; Windows: python.org), or set PYTHON=/path/to/python" >&2
    exit 1
}

activation() { # the file to source; on Windows the folder is Scripts
    if [ -f "$VENV/Scripts/activate" ]; then echo "$VENV/Scripts/activate"; else echo "$VENV/bin/activate"; fi
}

if [ "$VENV" != none ]; then
    if [ ! -f "$(activation)" ]; then # it is written last
        find_python
        "$PYTHON" -m venv "$VENV" || {
            echo "error: $PYTHON -m venv $VENV failed; on Debian and Ubuntu: apt install python3-venv" >&2
            exit 1
        }
    fi
    # shellcheck disable=SC1090
    source "$(activation)"
    [ -n "$DEVICE" ] || DEVICE=$(command -v nvidia-smi >/dev/null && echo cuda || echo cpu)
    # Without a GPU, install a CPU build of torch, if pip finds one of this version.
    [ "$DEVICE" = cuda ] || : "${CONSTRAINTS:=requirements/cpu.txt}"
    python scripts/install_packages.py --extras "$EXTRAS" --constraints "$CONSTRAINTS" --device "$DEVICE"
fi
