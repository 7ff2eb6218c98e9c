#!/usr/bin/env bash
# Set everything up and run all tests. Example: bash scripts/test.sh -k supervision
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${EXTRAS:=train,quant,dev,web}"
: "${VENV:=.venv}"
# What DeepSpeed compiles belongs to one environment; another one's tests would compile it again under their clock.
[ "$VENV" = none ] || export TORCH_EXTENSIONS_DIR="$(realpath -m "$VENV")/torch_extensions"
source scripts/environment.sh

ruff check .
ruff format --check .
python -m pytest -q -n "${TEST_PROCESSES:-2}" "$@"
