#!/usr/bin/env bash
# Visual instruction tuning of all LLM weights and the projector: Vicuna-1.5 and a pretrained projector become LLaVA-1.5.
# Example: DATA=/mnt/llava GPUS=8 bash scripts/v1_5/finetune.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${BASE_MODEL:=lmsys/vicuna-7b-v1.5}" "${VISION_TOWER:=openai/clip-vit-large-patch14-336}"
: "${PROJECTOR:=checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}" "${DATA:=playground/data}"
: "${DATA_FILE:=$DATA/llava_v1_5_mix665k.json}" "${OUT:=checkpoints/llava-v1.5-7b}"
: "${ZERO:=scripts/zero3.json}" "${GPUS:=}"

deepspeed ${GPUS:+--num_gpus "$GPUS"} llava/train/train_mem.py \
    --deepspeed "$ZERO" \
    --model_name_or_path "$BASE_MODEL" \
    --version v1 \
    --data_path "$DATA_FILE" \
    --image_folder "$DATA" \
    --vision_tower "$VISION_TOWER" \
    --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
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
