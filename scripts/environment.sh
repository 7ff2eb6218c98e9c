# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with this package installed.
# PYTHON chooses the interpreter (3.10 or newer); VENV another place, or "none" to use the active environment as it is.
# EXTRAS are the optional dependencies to install; CONSTRAINTS a file of pinned versions.
: "${PYTHON:=python3}" "${VENV:=.venv}" "${EXTRAS:=train}" "${CONSTRAINTS:=}"

if [ "$VENV" != none ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $PYTHON is older than Python 3.10; set PYTHON to a newer one" >&2
        exit 1
    }
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
    # Without a GPU, install a CPU build of torch, if pip finds one of this version.
    command -v nvidia-smi >/dev/null || : "${CONSTRAINTS:=requirements/cpu.txt}"
    wanted=$(cat pyproject.toml ${CONSTRAINTS:+"$CONSTRAINTS"} | cksum; echo "$EXTRAS")
    if [ "$(cat "$VENV/installed.txt" 2>/dev/null)" != "$wanted" ]; then
        pip install --quiet --upgrade pip
        pip install --quiet ${CONSTRAINTS:+-c "$CONSTRAINTS"} torch  # first, so that packages built from source find it
        pip install --quiet ${CONSTRAINTS:+-c "$CONSTRAINTS"} -e ".[$EXTRAS]"
        if ! command -v nvidia-smi >/dev/null; then
            # DeepSpeed compiles an extension when it first runs on a CPU, another one when it offloads (tested);
            # done here, not in the first training run. A killed compilation leaves a stale lock.
            find "${TORCH_EXTENSIONS_DIR:-$HOME/.cache/torch_extensions}" -name lock -mmin +30 -delete 2>/dev/null || true
            for builder in ShareMemCommBuilder $([[ $EXTRAS != *dev* ]] || echo CPUAdamBuilder); do
                python -c "from deepspeed.ops.op_builder.cpu import $builder as B; B().load(verbose=False)" \
                    >/dev/null 2>&1 || echo "DeepSpeed's $builder could not compile its extension for CPUs"
            done
        fi
        echo "$wanted" >"$VENV/installed.txt"
    fi
fi
