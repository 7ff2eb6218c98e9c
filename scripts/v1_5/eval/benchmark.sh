# shellcheck shell=bash
# Sourced by the scripts beside it: `benchmark NAME FLAGS` answers and scores a benchmark of LLaVA-1.5.
# MODEL is the checkpoint: a directory or hub id. DATA holds the benchmarks' folders (the original's playground/data/eval).
# GPUS is how many to use; default: those of CUDA_VISIBLE_DEVICES, as in the original, else one.
# What a benchmark needs and lacks is listed with where it comes from; docs/benchmarks.md has all of them.
: "${MODEL:=liuhaotian/llava-v1.5-7b}" "${DATA:=playground/data/eval}" "${GPUS:=}"

benchmark() {
    local name=$1 run=(python) visible=${CUDA_VISIBLE_DEVICES:-}
    shift
    if [ -z "$GPUS" ] && [ -n "$visible" ]; then GPUS=$(($(printf '%s' "$visible" | tr -cd , | wc -c) + 1)); fi
    case ${GPUS:-1} in
        0* | *[!0-9]*)
            printf 'error: GPUS=%s is not a number of GPUs; give 1 or more, or leave it out\n' "$GPUS" >&2
            exit 2
            ;;
    esac
    set -- -m llava.eval.suite --suite "$name" --model-path "$MODEL" --data "$DATA" "$@"
    if [ "${GPUS:-1}" -gt 1 ]; then
        python "$@" --check >/dev/null # else every process lists what is missing
        run=(torchrun --standalone --nproc_per_node "$GPUS")
    fi
    exec "${run[@]}" "$@"
}
