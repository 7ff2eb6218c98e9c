#!/usr/bin/env bash
# MM-Vet: writes the file that its official program grades.
# Example: MODEL=llava_merged_model GPUS=4 bash scripts/v1_5/eval/mmvet.sh --limit 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/v1_5/eval/benchmark.sh

benchmark mmvet "$@"
