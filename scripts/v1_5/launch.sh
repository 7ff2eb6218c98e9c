# Sourced by the scripts beside it: `launch FLAGS` starts training through DeepSpeed with what all stages share.
# ZERO is the DeepSpeed config (scripts/zero2.json, zero3.json, zero3_offload.json), GPUS how many to use (default: all).
# PORT is for the processes to find each other (default: 29500); a second run on the same machine needs another.
# SIGTERM and SIGUSR1, which schedulers send, reach the training processes: they save and end.
# A batch that does not fit the GPU's memory is divided (`--fit auto`), rows per step unchanged; --fit off leaves it as it is.
# HOSTFILE lists the machines to use, one "name slots=GPUS" a line (default: this one alone); see docs/multi_gpu.md.
# VAL_SHARE=0.02 holds that share of the images out: loss and accuracy on them are logged every EVAL_STEPS steps, and the
# checkpoint with the best accuracy is what is left at the end. A script passes them on in front of its own flags.

validation=()
if [ -n "${VAL_SHARE:-}" ]; then
    : "${EVAL_STEPS:=500}"
    validation=(--val_share "$VAL_SHARE" --eval_strategy steps --eval_steps "$EVAL_STEPS" --save_steps "$EVAL_STEPS"
        --load_best_model_at_end True --metric_for_best_model eval_accuracy)
fi

launch() {
    local code passed_on=yes
    start_training "$@" &
    training=$!
    trap 'pass_on TERM' TERM
    trap 'pass_on USR1' USR1
    while [[ -n "$passed_on" ]]; do # a signal ends `wait` before the training
        passed_on='' code=0
        wait "$training" || code=$?
    done
    return "$code"
}

pass_on() {
    passed_on=yes
    local launchers
    launchers=$(pgrep -d , -P "$training") && pkill "-$1" -P "$launchers" || kill "$training"
}

start_training() {
    exec deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${GPUS:+--num_gpus "$GPUS"} \
        ${PORT:+--master_port "$PORT"} llava/train/train_mem.py \
        --deepspeed "$ZERO" \
        --num_train_epochs 1 \
        --gradient_accumulation_steps 1 \
        --fit auto \
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
