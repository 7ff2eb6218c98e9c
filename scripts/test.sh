#!/usr/bin/env bash
# Set everything up and run all tests. Example: bash scripts/test.sh -k supervision
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${EXTRAS:=train,quant,dev}"
: "${VENV:=.venv}"
# What DeepSpeed compiles belongs to one environment; another one's tests would compile it again under their clock.
case $VENV in
none) ;;
/* | [A-Za-z]:*) export TORCH_EXTENSIONS_DIR="$VENV/torch_extensions" ;;
*) export TORCH_EXTENSIONS_DIR="$PWD/$VENV/torch_extensions" ;;
esac
source scripts/environment.sh

ruff check .
ruff format --check .
python -m pytest -q -n "${TEST_PROCESSES:-2}" "$@"
