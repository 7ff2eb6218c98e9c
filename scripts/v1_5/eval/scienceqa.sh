#!/usr/bin/env bash
# ScienceQA, test: accuracy with an image, and of all questions.
# Example: MODEL=llava_merged_model GPUS=4 bash scripts/v1_5/eval/scienceqa.sh --limit 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/v1_5/eval/benchmark.sh

benchmark scienceqa "$@"
