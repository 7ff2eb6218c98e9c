#!/usr/bin/env bash
# MME: points of perception and cognition.
# Example: MODEL=llava_merged_model GPUS=4 bash scripts/v1_5/eval/mme.sh --limit 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/v1_5/eval/benchmark.sh

benchmark mme "$@"
