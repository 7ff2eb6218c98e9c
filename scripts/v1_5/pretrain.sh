#!/usr/bin/env bash
# Pretrain the projector on captions: Vicuna-1.5 and CLIP stay as they are, mm_projector.bin comes out.
# Example: DATA=/mnt/LLaVA-Pretrain bash scripts/v1_5/pretrain.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${BASE_MODEL:=lmsys/vicuna-7b-v1.5}" "${VISION_TOWER:=openai/clip-vit-large-patch14-336}"
: "${DATA:=playground/data/LLaVA-Pretrain}" "${DATA_FILE:=$DATA/blip_laion_cc_sbu_558k.json}"
: "${OUT:=checkpoints/llava-v1.5-7b-pretrain}" "${ZERO:=scripts/zero2.json}" "${GPUS:=}"
source scripts/v1_5/launch.sh

launch \
    --tune_mm_mlp_adapter True \
    --model_name_or_path "$BASE_MODEL" --version plain \
    --vision_tower "$VISION_TOWER" --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu \
    --data_path "$DATA_FILE" --image_folder "$DATA/images" --image_aspect_ratio square \
    --output_dir "$OUT" --save_steps 2000 \
    --learning_rate 1e-3 \
    --per_device_train_batch_size 32 \
    "$@"
