#!/usr/bin/env bash
# SEED-Bench: accuracy, and the file for its leaderboard.
# Example: MODEL=llava_merged_model GPUS=4 bash scripts/v1_5/eval/seed.sh --limit 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/v1_5/eval/benchmark.sh

benchmark seed "$@"
