#!/usr/bin/env bash
# LoRA-finetune LLaVA-1.5 on playground/data_train, which task_data_preprocessing.py prepares.
# Example: DATA=/mnt/vqa GPUS=2 bash scripts/v1_5/finetune_task_lora.sh --num_train_epochs 2
# Example: VAL_SHARE=0.02 EVAL_STEPS=200 bash scripts/v1_5/finetune_task_lora.sh, to validate and keep the best.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${BASE_MODEL:=liuhaotian/llava-v1.5-7b}" "${DATA:=playground/data_train}"
: "${OUT:=checkpoints/llava-v1.5-7b-task-lora}" "${ZERO:=scripts/zero2.json}" "${GPUS:=}"
source scripts/v1_5/launch.sh

launch \
    --model_name_or_path "$BASE_MODEL" --version v1 \
    --data_path "$DATA/data.json" --image_folder "$DATA/images" --image_aspect_ratio pad \
    --output_dir "$OUT" --save_steps 500 \
    --lora_enable True --lora_r 128 --lora_alpha 256 --learning_rate 2e-4 --mm_projector_lr 2e-5 \
    --per_device_train_batch_size 16 --group_by_modality_length True \
    ${validation[@]+"${validation[@]}"} "$@"
