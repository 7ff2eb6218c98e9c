#!/usr/bin/env bash
# Finetune all LLM weights and the projector of LLaVA-1.5 on playground/data_train.
# Example: DATA=/mnt/vqa GPUS=8 bash scripts/v1_5/finetune_task.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${BASE_MODEL:=liuhaotian/llava-v1.5-7b}" "${DATA:=playground/data_train}"
: "${OUT:=checkpoints/llava-v1.5-7b-task}" "${ZERO:=scripts/zero3.json}" "${GPUS:=}"

deepspeed ${GPUS:+--num_gpus "$GPUS"} llava/train/train_mem.py \
    --deepspeed "$ZERO" \
    --model_name_or_path "$BASE_MODEL" \
    --version v1 \
    --data_path "$DATA/data.json" \
    --image_folder "$DATA/images" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --output_dir "$OUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 1 \
    --eval_strategy no \
    --save_strategy steps --save_steps 500 --save_total_limit 1 \
    --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --report_to tensorboard \
    "$@"
