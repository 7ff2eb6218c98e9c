"""Recipe of finetuning and pretraining: open the base, load and check the data, build, train, save."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
import transformers
from torch import nn

from llava.data.dataset import ImageSettings
from llava.data.records import EncodedRecord
from llava.model.checkpoint.checkpoint import Checkpoint
from llava.model.configuration import features_per_image
from llava.train.activation_checkpointing import FewestCheckpoints
from llava.train.batch_fit import describe_way_out, fit_batches
from llava.train.callbacks import CurvePlot, EarlyStopping, FileLog, LastValidation, UnlinkSharedMemory
from llava.train.data_setup import check_records, load_records
from llava.train.fault_tolerance.out_of_memory import explained_out_of_memory
from llava.train.fault_tolerance.resume import find_resume_point
from llava.train.flags.arguments import DataArguments, ModelArguments
from llava.train.flags.requirements import refuse_missing_launcher
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.model_setup import adapter_rank, add_trained_weights, build_saver, load_model, open_base
from llava.train.packing_setup import BatchPlan, Loader, build_loader, plan_batches, prepare_model
from llava.train.run_summary import print_machine, print_summary
from llava.train.saving import Saver
from llava.train.trackers.tolerance import tolerate_failures
from llava.train.trackers.wrong_answers import WrongAnswers
from llava.train.trainer import LlavaTrainer
from llava.train.validation.evaluator import Evaluator
from llava.train.validation.packed_evaluator import build_evaluator

logger = logging.getLogger(__name__)


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
    print_machine(base.config, training_args)
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
    trainer = LlavaTrainer(
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
    callbacks = trainer.callback_handler.callbacks
    failures = tolerate_failures(callbacks)
    if evaluator is not None:
        trainer.add_callback(WrongAnswers(evaluator, callbacks, failures))
    return trainer


def _check_overfit(trainer: LlavaTrainer, steps: int) -> None:
    if steps:
        before, after = trainer.check_first_batch(steps)
        logger.info("overfit check: loss of the first batch %.4f, after %d steps %.4f", before, steps, after)
