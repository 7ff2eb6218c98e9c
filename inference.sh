#!/usr/bin/env bash
# Answer playground/data_infer/questions.jsonl. Example: MODEL=checkpoints/my_model bash inference.sh --batch-size 16
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
: "${MODEL:=llava_merged_model}" "${DATA:=playground/data_infer}" "${OUT:=$DATA/finetuned_llava_answers.jsonl}"

python -m llava.eval.model_vqa_loader \
    --model-path "$MODEL" \
    --question-file "$DATA/questions.jsonl" \
    --image-folder "$DATA/images" \
    --answers-file "$OUT" \
    --temperature 0 \
    "$@"
