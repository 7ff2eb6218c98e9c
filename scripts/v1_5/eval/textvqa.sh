#!/usr/bin/env bash
# TextVQA, validation: accuracy over ten answers.
# Example: MODEL=llava_merged_model GPUS=4 bash scripts/v1_5/eval/textvqa.sh --limit 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/v1_5/eval/benchmark.sh

benchmark textvqa "$@"
