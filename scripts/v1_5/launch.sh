# Sourced by the scripts beside it: `launch FLAGS` starts training through DeepSpeed with what all stages share.
# ZERO is the DeepSpeed config (scripts/zero2.json, zero3.json, zero3_offload.json), GPUS how many to use (default: all).

launch() {
    deepspeed ${GPUS:+--num_gpus "$GPUS"} llava/train/train_mem.py \
        --deepspeed "$ZERO" \
        --num_train_epochs 1 \
        --gradient_accumulation_steps 1 \
        --eval_strategy no \
        --save_strategy steps --save_total_limit 2 \
        --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine \
        --logging_steps 1 \
        --model_max_length 2048 \
        --gradient_checkpointing True \
        --dataloader_num_workers 4 \
        --report_to tensorboard \
        "$@"
}
