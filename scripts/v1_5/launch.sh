# shellcheck shell=bash
# Sourced by the scripts beside it: `launch FLAGS` starts training with what all stages share.
# LAUNCHER is deepspeed, torchrun (several GPUs) or python (one process). Default: deepspeed where it is on the PATH, else
# by the number of GPUs; one line says which, why and what is lost. docs/multi_gpu.md has the rules.
# ZERO is the DeepSpeed config (scripts/zero2.json, zero3.json, zero3_offload.json) or none; GPUS how many (default: all).
# PORT is for the processes to find each other (default: 29500, torchrun: a free one); two runs on a machine need two.
# SIGTERM and SIGUSR1, which schedulers send, reach the training processes: they save and end.
# A batch that does not fit the GPU's memory is divided (`--fit auto`), rows per step unchanged; --fit off leaves it as it is.
# HOSTFILE lists the machines to use, one "name slots=GPUS" a line (default: this one alone); see docs/multi_gpu.md.
# VAL_SHARE=0.02 holds that share of the images out: loss and accuracy on them are logged every EVAL_STEPS steps, and the
# checkpoint with the best accuracy is what is left at the end. A script passes them on in front of its own flags.

validation=()
if [ -n "${VAL_SHARE:-}" ]; then
    : "${EVAL_STEPS:=500}"
    # shellcheck disable=SC2034 # read by the scripts
    validation=(--val_share "$VAL_SHARE" --eval_strategy steps --eval_steps "$EVAL_STEPS" --save_steps "$EVAL_STEPS"
        --load_best_model_at_end True --metric_for_best_model eval_accuracy)
fi

launch() {
    local code passed_on=yes words word
    words=$(ZERO="$ZERO" GPUS="$GPUS" python scripts/v1_5/choose_launcher.py "$@")
    command=()
    while IFS= read -r word; do command+=("$word"); done <<<"$words"
    start_training "$@" &
    training=$!
    trap 'pass_on TERM' TERM
    trap 'pass_on USR1' USR1
    while [ -n "$passed_on" ]; do # a signal ends `wait` before the training
        passed_on='' code=0
        wait "$training" || code=$?
    done
    return "$code"
}

pass_on() { # signal: to the training processes, which are python itself, torchrun's children, deepspeed's grandchildren
    passed_on=yes
    local parents=$training
    case ${command[0]} in
    python) kill "-$1" "$training" && return ;;
    deepspeed) parents=$(pgrep -d , -P "$training") || true ;;
    esac
    { [ -n "$parents" ] && pkill "-$1" -P "$parents"; } || kill "$training"
}

start_training() {
    exec "${command[@]}" \
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
