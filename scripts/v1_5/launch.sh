# shellcheck shell=bash
# Sourced by the scripts beside it: `launch FLAGS` starts training with what all stages share, which is listed in
# llava/train/launch/__main__.py.
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

launch() { # in the place of this shell, so that signals to it reach the training
    export ZERO GPUS
    exec python -m llava.train.launch "$@"
}
