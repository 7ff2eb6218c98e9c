#!/usr/bin/env bash
# Pretrain the projector on captions: Vicuna-1.5 and CLIP stay as they are, mm_projector.bin comes out.
# Example: DATA=/mnt/LLaVA-Pretrain bash scripts/v1_5/pretrain.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${BASE_MODEL:=lmsys/vicuna-7b-v1.5}" "${VISION_TOWER:=openai/clip-vit-large-patch14-336}"
: "${DATA:=playground/data/LLaVA-Pretrain}" "${DATA_FILE:=$DATA/blip_laion_cc_sbu_558k.json}"
: "${OUT:=checkpoints/llava-v1.5-7b-pretrain}" "${ZERO:=scripts/zero2.json}" "${GPUS:=}"

deepspeed ${GPUS:+--num_gpus "$GPUS"} llava/train/train_mem.py \
    --deepspeed "$ZERO" \
    --tune_mm_mlp_adapter True \
    --model_name_or_path "$BASE_MODEL" \
    --version plain \
    --data_path "$DATA_FILE" \
    --image_folder "$DATA/images" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --image_aspect_ratio square \
    --output_dir "$OUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 32 \
    --gradient_accumulation_steps 1 \
    --eval_strategy no \
    --save_strategy steps --save_steps 2000 --save_total_limit 1 \
    --learning_rate 1e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --report_to tensorboard \
    "$@"
