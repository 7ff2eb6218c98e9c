#!/usr/bin/env bash
# From a fresh clone to a finetuned model, on the small model in playground/llava-tiny; no GPU needed.
# The steps and programs are the same for the 7B model. A second run reuses the files of the first.
# Example: bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${RUN:=quickstart}" "${BASE:=playground/llava-tiny}"
source scripts/environment.sh

step() { printf '\n== %s\n' "$*"; }
tune="$RUN/task-lora" merged="$RUN/merged"

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
