#!/usr/bin/env bash
# Run the users' scripts with their own flags, at LLaVA-1.5-7B's true sizes with random weights, on this machine's GPUs:
# preprocessing, every script of scripts/v1_5, an interrupted and a resumed run, merge, batch inference, one question, chats.
# Prints a line for each step (seconds, peak GPU memory, result), also into RESULTS/steps.tsv; logs are beside it.
# A failed step does not stop the next; the exit code is 1 if any failed. Needs llava[train,quant] and 45 GB in WORK.
# Example: bash benchmarks/end_to_end.sh measured
# Some steps, on the files of an earlier run in WORK: WORK=/tmp/w STEPS="task_lora merge" bash benchmarks/end_to_end.sh measured
# All weights, for which one GPU of 80 GB is too small: STEPS="data base pretrain full drop_base weights full_task" ...
# PORT is for DeepSpeed's processes; "any" takes a free port for each training, for shared machines.
# Without a GPU, on the small model: MODEL=playground/llava-tiny STEPS="data task_lora merge answers" ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RESULTS=${1:?usage: bash benchmarks/end_to_end.sh DIRECTORY_FOR_RESULTS}
: "${WORK:=}" "${MODEL:=}" "${PORT:=}" "${LAYERS:=32}" "${MAX_STEPS:=6}" "${IMAGES:=60}"
: "${STEPS:=data base pretrain lora drop_base weights task_lora no_checkpointing checkpointing_all trained_tower
    4bit interrupted resumed merge answers question chat chat_4bit}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
mkdir -p "$RESULTS"
if [ -z "$WORK" ]; then
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK"
: "${MODEL:=$WORK/7b}"
tokenizer=playground/llava-tiny
failed=0

# Steps. Data paths are those of the scripts, under WORK.
few=(--max_steps "$MAX_STEPS" --save_steps "$MAX_STEPS")

make_data() {
    python - "$WORK" "$IMAGES" <<'PYTHON'
import csv, random, sys
from pathlib import Path

from PIL import Image

work, count = Path(sys.argv[1]), int(sys.argv[2])
asked = [("What color is the car?", "red"), ("Is it sunny?", "yes"), ("How many dogs?", "2"), ("What is he holding?", "ball")]
random.seed(0)
(work / "images").mkdir(exist_ok=True)
for image in range(count):
    Image.effect_noise((640, 480), 64).convert("RGB").save(work / f"images/COCO_val2014_{image:012d}.jpg")
rows = [(image, question, 10 * image + place, answer) for image in range(count) for place, (question, answer) in enumerate(asked)]
with (work / "Train_Qs.csv").open("w", newline="") as stream:
    csv.writer(stream).writerows([("image_id", "question", "question_id", "answer"), *rows])
PYTHON
    python task_data_preprocessing.py --input "$WORK/Train_Qs.csv" --output "$WORK/data.json"
    python task_data_preprocessing.py --mode infer --input "$WORK/Train_Qs.csv" --output "$WORK/questions.jsonl"
}

make_base() { python benchmarks/random_checkpoint.py --output "$WORK/vicuna" --llm-only --tower "$WORK/clip" --layers "$LAYERS" --tokenizer $tokenizer; }
make_weights() { python benchmarks/random_checkpoint.py --output "$MODEL" --layers "$LAYERS" --tokenizer $tokenizer; }

port() {  # the one asked for; a free one is below those that the system gives to outgoing connections
    [ "$PORT" = any ] || { echo "$PORT" && return; }
    python - <<'PYTHON'
import random, socket

while True:
    with socket.socket() as found:
        try:
            found.bind(("127.0.0.1", random.randrange(20000, 32000)))
        except OSError:
            continue
        print(found.getsockname()[1])
        break
PYTHON
}
# A training takes the place of the shell that starts it, so that a signal to that shell reaches the script.
from_vicuna() {  # script, output, flags
    exec env BASE_MODEL="$WORK/vicuna" VISION_TOWER="$WORK/clip" PROJECTOR="$WORK/pretrain/mm_projector.bin" \
        DATA="$WORK/images" DATA_FILE="$WORK/data.json" OUT="$WORK/$2" PORT="$(port)" \
        bash "scripts/v1_5/$1" "${few[@]}" "${@:3}"
}
pretrain() { ln -sfn . "$WORK/images/images" && from_vicuna pretrain.sh pretrain --version plain; }
task() {  # script, output, flags
    exec env BASE_MODEL="$MODEL" DATA="$WORK" OUT="$WORK/$2" PORT="$(port)" bash "scripts/v1_5/$1" "${few[@]}" "${@:3}"
}
interrupted() {  # ends with 143 once its second step is logged
    local code=0
    task finetune_task_lora.sh interrupted &
    local training=$!
    until [ "$(grep -c '"loss"' "$WORK/interrupted/train_log.jsonl" 2>/dev/null)" -ge 2 ] 2>/dev/null; do
        kill -0 "$training" 2>/dev/null || break
        sleep 0.2
    done
    kill -TERM "$training" || true
    wait "$training" || code=$?
    [ "$code" -eq 143 ] || { echo "exit code $code instead of 143" && return 1; }
}
answers() { MODEL=$WORK/merged DATA=$WORK OUT=$WORK/answers.jsonl bash inference.sh --max_new_tokens 8 "$@"; }
merge() {
    python scripts/merge_lora_weights.py --model-path "$WORK/task_lora" --model-base "$MODEL" --save-model-path "$WORK/merged"
}
question() {
    python -m llava.eval.run_llava --model-path "$WORK/merged" --image-file "$WORK/images/COCO_val2014_000000000000.jpg" \
        --query "What color is the car?" --temperature 0 --max_new_tokens 16
}
chat() {
    printf '%s\n' "What color is the car?" "And the dog?" /exit | python -m llava.serve.cli --model-path "$WORK/merged" \
        --image-file "$WORK/images/COCO_val2014_000000000000.jpg" --temperature 0 --max-new-tokens 32 "$@"
}

outcome() {  # directory: losses of a training, or nothing
    python - "$1/train_log.jsonl" <<'PYTHON'
import json, sys
from pathlib import Path

path = Path(sys.argv[1])
lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
print("loss " + " ".join(f"{float(line['loss']):.3f}" for line in lines if "loss" in line) if lines else "")
PYTHON
}

peak_memory() {  # file with one reading of all GPUs' memory in MiB a line: the most of any GPU, in GB
    [ ! -s "$1" ] && echo - || sort -n "$1" | tail -n 1 | awk '{printf "%.1f GB", $1 * 1.048576 / 1000}'
}

step() {  # name, directory of a training or -, command
    local name=$1 output=$2 start=$SECONDS code=0 watch=
    shift 2
    : >"$RESULTS/$name.memory"
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 200 >"$RESULTS/$name.memory" &
        watch=$!
    fi
    ("$@") >"$RESULTS/$name.log" 2>&1 || code=$?
    [ -z "$watch" ] || { kill "$watch" && wait "$watch" 2>/dev/null || true; }
    printf '%s\t%s\t%d s\t%s\t%s\n' "$name" "$([ $code = 0 ] && echo ok || echo "FAILED ($code)")" $((SECONDS - start)) \
        "$(peak_memory "$RESULTS/$name.memory")" "$([ "$output" = - ] || outcome "$WORK/$output")" | tee -a "$RESULTS/steps.tsv"
    rm -f "$RESULTS/$name.memory"
    [ "$code" = 0 ] && return
    failed=1
    tail -n 15 "$RESULTS/$name.log"
}

: >"$RESULTS/steps.tsv"
for name in $STEPS; do
    case $name in
    data) step data - make_data ;;
    base) step base - make_base ;;
    weights) step weights - make_weights ;;
    drop_base) rm -rf "$WORK/vicuna" "$WORK/pretrain" "$WORK/lora" "$WORK/full" ;;
    pretrain) step pretrain pretrain pretrain ;;
    lora) step lora lora from_vicuna finetune_lora.sh lora ;;
    full) step full full from_vicuna finetune.sh full --save_strategy no ;;
    full_task) step full_task full_task task finetune_task.sh full_task --save_strategy no ;;
    task_lora) step task_lora task_lora task finetune_task_lora.sh task_lora ;;
    no_checkpointing) step $name $name task finetune_task_lora.sh $name --gradient_checkpointing False --save_strategy no ;;
    checkpointing_all) step $name $name task finetune_task_lora.sh $name --checkpoint_layers all --save_strategy no ;;
    trained_tower)
        step $name $name task finetune_task_lora.sh $name --checkpoint_layers all --unfreeze_mm_vision_tower True \
            --save_strategy no ;;
    4bit) step $name $name task finetune_task_lora.sh $name --bits 4 --save_strategy no ;;
    interrupted) step interrupted interrupted interrupted ;;
    resumed) step resumed interrupted task finetune_task_lora.sh interrupted ;;
    merge) step merge - merge ;;
    answers) step answers - answers && wc -l "$WORK/answers.jsonl" ;;
    question) step question - question && tail -n 1 "$RESULTS/question.log" ;;
    chat) step chat - chat ;;
    chat_4bit) step chat_4bit - chat --load-4bit ;;
    *) echo "no step $name; see the list at the top of this file" >&2 && exit 2 ;;
    esac
done
exit "$failed"
