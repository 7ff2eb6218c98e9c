#!/usr/bin/env bash
# POPE: F1, accuracy, precision, recall and yes ratio, of each split and their means.
# Example: MODEL=llava_merged_model GPUS=4 bash scripts/v1_5/eval/pope.sh --limit 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/v1_5/eval/benchmark.sh

benchmark pope "$@"
