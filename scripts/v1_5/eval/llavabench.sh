#!/usr/bin/env bash
# LLaVA-Bench in the wild: answers, which GPT-4 grades.
# Example: MODEL=llava_merged_model GPUS=4 bash scripts/v1_5/eval/llavabench.sh --limit 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/v1_5/eval/benchmark.sh

benchmark llavabench "$@"
