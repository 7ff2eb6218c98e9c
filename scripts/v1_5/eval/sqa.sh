#!/usr/bin/env bash
# ScienceQA, test, by the original's name of scienceqa.sh.
# Example: MODEL=llava_merged_model GPUS=4 bash scripts/v1_5/eval/sqa.sh --limit 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/v1_5/eval/benchmark.sh

benchmark scienceqa "$@"
