"""Finetune LLaVA-1.5, or pretrain its projector: open the base, load and check the data, build, train, save.

Run by the scripts in `scripts/v1_5`: `deepspeed llava/train/train_mem.py --model_name_or_path ... --data_path ...`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import torch
import transformers
from torch import nn

from llava.data.dataset import ImageSettings
from llava.data.records import EncodedRecord
from llava.files.terminal_text import log_to_terminal, report_error
from llava.model.checkpoint.checkpoint import Checkpoint
from llava.model.configuration import features_per_image
from llava.original_names import lazy_names
from llava.train.activation_checkpointing import FewestCheckpoints
from llava.train.batch_fit import describe_way_out, fit_batches
from llava.train.callbacks import CurvePlot, EarlyStopping, FileLog, LastValidation, UnlinkSharedMemory
from llava.train.data_setup import check_records, load_records
from llava.train.distributed import is_lost_connection
from llava.train.fault_tolerance.out_of_memory import OutOfMemory, explained_out_of_memory
from llava.train.fault_tolerance.resume import find_resume_point
from llava.train.fault_tolerance.signals import Stopped
from llava.train.flags.arguments import DataArguments, ModelArguments, TrainingArguments, is_first_process
from llava.train.flags.command_line import parse_arguments
from llava.train.flags.requirements import refuse_missing_launcher
from llava.train.model_setup import adapter_rank, add_trained_weights, build_saver, load_model, open_base
from llava.train.packing_setup import BatchPlan, Loader, build_loader, plan_batches, prepare_model
from llava.train.run_summary import print_summary
from llava.train.saving import Saver
from llava.train.trainer import LlavaTrainer
from llava.train.validation.evaluator import Evaluator
from llava.train.validation.packed_evaluator import build_evaluator

__getattr__ = lazy_names(__name__)

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    log_to_terminal(logging.INFO if is_first_process() else logging.WARNING)
    try:
        arguments = parse_arguments(argv)
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, code=2)
    try:
        run_training(*arguments)
    except Stopped as stop:
        if is_first_process():
            print(stop, file=sys.stderr)
        return stop.code
    except (ValueError, OSError, ImportError) as error:
        logger.debug("", exc_info=True)
        return _fail(error, code=1)
    except OutOfMemory as error:
        report_error(error)
        _end_with_others(code=1)
        return 1
    except RuntimeError as error:
        if is_lost_connection(error):
            report_error(f"process {os.environ.get('RANK', '0')} lost another one, whose message says why")
            _end_with_others(code=1)
        if "ImageError" not in str(error):  # how an image that can't be decoded arrives from a worker process
            raise
        return _fail(str(error).strip().splitlines()[-1], code=1)
    finally:
        if torch.distributed.is_initialized():  # left open, ZeRO-3 aborts at the interpreter's exit
            torch.distributed.destroy_process_group()
    return 0


def run_training(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Finetune as the flags say: open, check, build, train, save.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if data, checkpoint and flags contradict each other, or a loss is not finite.
        Stopped: on a signal, after the state is saved.
        OutOfMemory: if the memory ran out; the message says what to pass.
    """
    prepare_process(training_args)
    base = open_base(model_args, data_args, training_args)
    records, held_out = load_records(base, data_args, training_args)
    check_records(records, held_out, training_args)
    plan = plan_batches(records, features_per_image(base.config, base.config.mm_vision_config), training_args)
    plan, fitted = fit_batches(plan, base.config, model_args, training_args)
    with explained_out_of_memory(training_args, lambda: describe_way_out(fitted)):
        train_model(base, plan, held_out, model_args, data_args, training_args)


def train_model(
    base: Checkpoint,
    plan: BatchPlan,
    held_out: Sequence[EncodedRecord],
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> None:
    """Load the weights, train on the planned batches, validate on the records held out, save.

    Raises:
        ValueError, Stopped: as `run_training`.
    """
    records = plan.records
    start = add_trained_weights(base, model_args, training_args)
    model = load_model(start, model_args, training_args)
    execution = prepare_model(model, training_args)
    images = ImageSettings(base.config.image_aspect_ratio, base.config.image_grid_pinpoints)
    loader = build_loader(
        plan, base.image_processor, images, base.tokenizer.pad_token_id or 0, training_args, execution
    )
    evaluator = build_evaluator(held_out, start, model, data_args, training_args)
    saver = build_saver(model, base, records, model_args, data_args, training_args)
    trainer = build_trainer(model, loader, evaluator, saver, training_args)
    print_summary(model, records, start, evaluator, model_args, training_args)

    checkpoint = find_resume_point(training_args, saver.metadata.training)
    if checkpoint is None:
        _check_overfit(trainer, training_args.sanity_check)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    trainer.save_model()


def train(attn_implementation: str | None = None) -> None:
    """Run `main` on the command line, as the original's `train()` does.

    Raises:
        SystemExit: if the training failed; the error is on stderr.
    """
    if attn_implementation not in (None, "sdpa"):
        logger.warning("attn_implementation %s is not used; training attends through PyTorch", attn_implementation)
    if code := main():
        raise SystemExit(code)


def prepare_process(training_args: TrainingArguments) -> None:
    """Check the launcher, hand on `--logging_dir` and seed the random generators.

    Raises:
        ValueError: if DeepSpeed is asked for and no launcher started this process.
    """
    refuse_missing_launcher(training_args)
    warn_of_idle_gpus(training_args)
    choose_log_directory(training_args)
    transformers.set_seed(training_args.seed)


def warn_of_idle_gpus(training_args: TrainingArguments) -> None:
    """Log a warning if a single process leaves GPUs unused."""
    visible = torch.cuda.device_count() if training_args.device.type == "cuda" else 0
    if training_args.world_size == 1 and visible > 1:
        logger.warning(
            "one process trains on one GPU, and %d are visible; start a process for each, as scripts/v1_5 and torchrun "
            "do",
            visible,
        )


def choose_log_directory(training_args: TrainingArguments) -> None:
    """Hand `--logging_dir` to TensorBoard's callback, which reads it from the environment."""
    if training_args.logging_dir is None:
        return
    os.environ["TENSORBOARD_LOGGING_DIR"] = training_args.logging_dir
    if "tensorboard" not in training_args.report_to:
        logger.warning("--logging_dir %s has no effect without --report_to tensorboard", training_args.logging_dir)


def build_trainer(
    model: nn.Module, loader: Loader, evaluator: Evaluator | None, saver: Saver, training_args: TrainingArguments
) -> LlavaTrainer:
    """Return the trainer with the callbacks that the flags ask for."""
    patience, rank = training_args.early_stopping_patience, adapter_rank(training_args)
    return LlavaTrainer(
        model,
        training_args,
        saver=saver,
        train_dataset=loader.dataset,
        train_sampler=loader.sampler,
        data_collator=loader.collator,
        evaluator=evaluator,
        callbacks=[
            FileLog(),
            LastValidation(),
            *([] if patience is None else [EarlyStopping(patience)]),
            CurvePlot(),
            UnlinkSharedMemory(),
            FewestCheckpoints(model, rank=rank, positions=loader.positions),
        ],
    )


def _check_overfit(trainer: LlavaTrainer, steps: int) -> None:
    if steps:
        before, after = trainer.check_first_batch(steps)
        logger.info("overfit check: loss of the first batch %.4f, after %d steps %.4f", before, steps, after)


def _end_with_others(*, code: int) -> None:
    """End the process at once if there are others: they wait in a collective operation that it won't join."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fail(error: str | Exception, *, code: int) -> int:
    if is_first_process():
        report_error(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
