#!/usr/bin/env bash
# Measure loading, quantised chats and the planner on one GPU, at LLaVA-1.5-7B's true sizes with random weights.
# JSON and logs go into a directory; a failed step does not stop the next. Needs peft, accelerate, deepspeed and
# bitsandbytes, 16 GB of disk in WORK and 70 GB on the GPU. Example: bash benchmarks/gpu_checkpoints.sh measured
# Some steps, weights kept: WORK=/tmp/w STEPS="quantized_chat memory_plan" bash benchmarks/gpu_checkpoints.sh measured
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:?usage: bash benchmarks/gpu_checkpoints.sh DIRECTORY_FOR_RESULTS}
: "${PYTHON:=python3}" "${MODEL:=}" "${NEW_TOKENS:=512}"
: "${STEPS:=load_speed memory_plan quantized_chat}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
mkdir -p "$OUT"
if [ -z "${WORK:-}" ]; then
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
fi

failed=0
step() {  # name, command
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    if "$PYTHON" "$@" 2>"$OUT/$name.err" | tee "$OUT/$name.txt"; then
        echo "== $name: $((SECONDS - start)) s"
    else
        echo "== $name failed after $((SECONDS - start)) s; the end of $OUT/$name.err:"
        tail -n 20 "$OUT/$name.err"
        failed=1
    fi
}

if [ -z "$MODEL" ]; then
    MODEL=$WORK/7b
    [ -d "$MODEL" ] ||
        step random_checkpoint benchmarks/random_checkpoint.py --output "$MODEL" --tokenizer playground/llava-tiny
fi
for name in $STEPS; do
    case $name in
    load_speed) flags=() ;;
    memory_plan) flags=(--work "$WORK/memory" --at-once 2) ;;
    quantized_chat) flags=(--runs 1 --new-tokens "$NEW_TOKENS") ;;
    *) echo "no step $name; choose load_speed, memory_plan, quantized_chat" >&2 && exit 2 ;;
    esac
    step "$name" "benchmarks/$name.py" --model-path "$MODEL" --output "$OUT/$name.json" "${flags[@]}"
done
echo "== all: $SECONDS s"
exit "$failed"
