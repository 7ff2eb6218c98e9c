#!/usr/bin/env bash
# Set everything up and run all tests. Example: bash scripts/test.sh -k supervision
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS=train,quant,dev
source scripts/environment.sh

ruff check .
ruff format --check .
python -m pytest -q "$@"
