#!/usr/bin/env bash
# From a fresh clone to a finetuned model, on the small model in playground/llava-tiny; no GPU needed.
# The steps and programs are the same for the 7B model. A second run reuses the files of the first.
# Example: bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# VENV=none uses the active environment; RUN is the folder for its files. It trains in one process, which needs no launcher.
: "${RUN:=quickstart}" "${BASE:=playground/llava-tiny}"
export LAUNCHER="${LAUNCHER:-python}" ZERO="${ZERO:-none}"
# Threads that wait actively for each other make small steps ten times slower where other programs use the cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" # else DeepSpeed's import warns
tune="$RUN/task-lora" merged="$RUN/merged"
number=0 steps=10 title='' began=0

step() {
    finish_step
    number=$((number + 1)) title=$1 began=$SECONDS
    printf '\n[%d/%d] %s\n' "$number" "$steps" "$title"
}
absolute() { case $1 in /* | [A-Za-z]:*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
finish_step() { [ "$number" = 0 ] || printf '[%d/%d] done in %d s\n' "$number" "$steps" $((SECONDS - began)); }
report_failure() {
    local code=$?
    [ "$code" = 0 ] || printf '\nerror: step %d of %d (%s) ended with exit code %d; the reason is above. The same command %s\n' \
        "$number" "$steps" "$title" "$code" "goes on from here: what earlier steps wrote is kept." >&2
}
trap report_failure EXIT

cat <<TEXT
Teach a small LLaVA to answer questions about drawn scenes, on this machine's CPU or GPU: $steps steps.
The first run downloads Python packages into ${VENV:-.venv}: about 300 MB for a CPU, 3 GB for an NVIDIA GPU; then it takes
4 minutes on two CPU cores that nothing else uses. Everything else goes into $RUN/.
TEXT

step "Environment: Python packages"
source scripts/environment.sh

step "World: scenes with questions, as two tables and two folders of images"
python examples/shapes_world/make_world.py --output "$RUN"

step "Preprocessing: tables become data.json and questions.jsonl"
python task_data_preprocessing.py --input "$RUN/data_train/Train_Qs.csv" --output "$RUN/data_train/data.json"
python task_data_preprocessing.py --mode infer --input "$RUN/data_infer/Test_Qs.csv" \
    --output "$RUN/data_infer/questions.jsonl"

step "Answers of the base model"
MODEL="$BASE" DATA="$RUN/data_infer" OUT="$RUN/base.jsonl" bash inference.sh

step "Finetuning"
if [ -f "$tune/adapter_model.safetensors" ]; then
    echo "$tune exists already"
else
    BASE_MODEL="$BASE" DATA="$RUN/data_train" OUT="$tune" GPUS=1 bash scripts/v1_5/finetune_task_lora.sh \
        --lora_r 16 --lora_alpha 32 --lora_dropout 0 --learning_rate 1e-3 --mm_projector_lr 2e-4 \
        --per_device_train_batch_size 16 --gradient_checkpointing False --dataloader_num_workers 0 --logging_steps 20
fi

step "Merging"
if [ -f "$merged/model.safetensors" ]; then
    echo "$merged exists already"
else
    python scripts/merge_lora_weights.py --model-path "$tune" --model-base "$BASE" --save-model-path "$merged"
fi

step "Answers of the finetuned model"
MODEL="$merged" DATA="$RUN/data_infer" OUT="$RUN/finetuned.jsonl" bash inference.sh

step "Scores by kind of question, before and after"
python -m llava.eval.vqa_score --annotations "$RUN/data_infer/Test_Qs.csv" \
    --answers-file "$RUN/base.jsonl" --answers-file "$RUN/finetuned.jsonl" --json "$RUN/scores.json"

step "One question from Python"
python - "$merged" "$RUN/data_infer" <<'PYTHON'
import json
import sys
from pathlib import Path

from llava.eval.run_llava import eval_model
from llava.mm_utils import get_model_name_from_path

model_path, data = sys.argv[1], Path(sys.argv[2])
question = json.loads((data / "questions.jsonl").read_text(encoding="utf-8").splitlines()[-1])
print(question["image"], question["text"])
args = type("Args", (), {
    "model_path": model_path,
    "model_base": None,
    "model_name": get_model_name_from_path(model_path),
    "query": question["text"],
    "conv_mode": None,
    "image_file": str(data / "images" / question["image"]),
    "sep": ",",
    "temperature": 0,
    "top_p": None,
    "num_beams": 1,
    "max_new_tokens": 512,
})()
eval_model(args)
PYTHON

step "Report"
python -m llava.eval.report --answers "$RUN/base.jsonl" "$RUN/finetuned.jsonl" \
    --questions "$RUN/data_infer/questions.jsonl" --images "$RUN/data_infer/images" \
    --annotations "$RUN/data_infer/Test_Qs.csv" --output "$RUN/report.html"

finish_step
[ "$VENV" = none ] && enter="" || enter="    source $(activation)
"
cat <<TEXT

Open this page in a browser: $(absolute "$RUN/report.html")
It shows every image with its questions, and the answers before and after finetuning.

Next, your own table with LLaVA-1.5-7B (downloads 14 GB of weights; wants a GPU, llava.model.plan says what fits on yours):
put Train_Qs.csv (columns image_id, question, question_id, answer) and the folder images/ into playground/data_train/, then
$enter    python task_data_preprocessing.py
    bash scripts/v1_5/finetune_task_lora.sh
    python scripts/merge_lora_weights.py --model-path checkpoints/llava-v1.5-7b-task-lora \\
        --model-base liuhaotian/llava-v1.5-7b --save-model-path llava_merged_model
and for new questions Test_Qs.csv and images/ into playground/data_infer/, then
    python task_data_preprocessing.py --mode infer
    bash inference.sh
README.md has other tables, several GPUs and scores.
TEXT
