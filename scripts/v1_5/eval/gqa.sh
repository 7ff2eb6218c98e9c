#!/usr/bin/env bash
# GQA, testdev-balanced: accuracy, and the prediction file of its official program.
# Example: MODEL=llava_merged_model GPUS=4 bash scripts/v1_5/eval/gqa.sh --limit 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/v1_5/eval/benchmark.sh

benchmark gqa "$@"
