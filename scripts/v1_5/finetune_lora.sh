#!/usr/bin/env bash
# Visual instruction tuning with LoRA: Vicuna-1.5 and a pretrained projector become a LoRA directory.
# Example: DATA=/mnt/llava PROJECTOR=/mnt/mm_projector.bin bash scripts/v1_5/finetune_lora.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${BASE_MODEL:=lmsys/vicuna-7b-v1.5}" "${VISION_TOWER:=openai/clip-vit-large-patch14-336}"
: "${PROJECTOR:=checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}" "${DATA:=playground/data}"
: "${DATA_FILE:=$DATA/llava_v1_5_mix665k.json}" "${OUT:=checkpoints/llava-v1.5-7b-lora}"
: "${ZERO:=scripts/zero3.json}" "${GPUS:=}"
source scripts/v1_5/launch.sh

launch \
    --model_name_or_path "$BASE_MODEL" --version v1 \
    --vision_tower "$VISION_TOWER" --mm_vision_select_layer -2 \
    --pretrain_mm_mlp_adapter "$PROJECTOR" --mm_projector_type mlp2x_gelu \
    --data_path "$DATA_FILE" --image_folder "$DATA" --image_aspect_ratio pad \
    --output_dir "$OUT" --save_steps 500 \
    --lora_enable True --lora_r 128 --lora_alpha 256 --learning_rate 2e-4 --mm_projector_lr 2e-5 \
    --per_device_train_batch_size 16 --group_by_modality_length True \
    "$@"
