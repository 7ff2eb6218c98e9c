#!/usr/bin/env bash
# MMBench, dev: writes the file for its evaluation server.
# Example: MODEL=llava_merged_model GPUS=4 bash scripts/v1_5/eval/mmbench.sh --limit 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/v1_5/eval/benchmark.sh

benchmark mmbench "$@"
