"""fp16 training, on the CPU: the loss is scaled, parameters stay in fp32, overflows skip updates and stop no run."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from llava.model.checkpoint.read_tensors import open_tensor_file
from llava.train.fault_tolerance.loss_scaling import MOST_IN_A_ROW, SkippedUpdates
from llava.train.flags import training_arguments
from llava.train.flags.precision import Precision

LORA = ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0", "--learning_rate", "1e-3"]
ROWS = [
    {
        "id": index,
        "image": "square.png",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat number is {index}?"},
            {"from": "gpt", "value": f"it is {index}"},
        ],
    }
    for index in range(4)
]


def deepspeed():
    """An accelerator under DeepSpeed, which scales the loss itself and says what it skipped."""
    return SimpleNamespace(scaler=None, optimizer_step_was_skipped=False)


def test_skipped_updates_are_counted_and_logged(caplog):
    caplog.set_level(logging.INFO)
    accelerator = deepspeed()
    skipped = SkippedUpdates(accelerator)
    skipped.log_total()
    for step, was_skipped in enumerate([True, True, False, True, False], start=1):
        accelerator.optimizer_step_was_skipped = was_skipped
        skipped.note(step)
    skipped.log_total()
    assert (skipped.total, skipped.in_a_row, skipped.steps) == (3, 0, 5)
    assert [message.partition(":")[0] for message in caplog.messages] == [
        *("step 1", "step 2", "step 4", "fp16 loss scaling skipped 3 of 5 updates")
    ]
    assert caplog.messages[1].endswith("normal in the first steps (2 skipped so far)")


def test_a_lower_scale_tells_of_a_skipped_update():
    scales = iter([4.0, 4.0, 2.0, 2.0, 8.0, 4.0])
    accelerator = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: next(scales)))
    skipped, totals = SkippedUpdates(accelerator), []
    for step in range(5):
        skipped.note(step)
        totals.append(skipped.total)
    assert totals == [0, 1, 1, 1, 2]


def test_updates_that_are_skipped_without_end():
    accelerator = deepspeed()
    accelerator.optimizer_step_was_skipped = True
    skipped = SkippedUpdates(accelerator)
    for step in range(MOST_IN_A_ROW):
        assert not skipped.are_endless
        skipped.note(step)
    assert skipped.are_endless
    accelerator.optimizer_step_was_skipped = False
    skipped.note(MOST_IN_A_ROW)
    assert not skipped.are_endless


@pytest.fixture
def fp16_on_the_cpu(monkeypatch):
    """Return the function (initial loss scale) -> nothing that makes the CPU train as a GPU of the Turing generation.

    PyTorch computes fp16 there, accelerate alone leaves out the autocast and the scaling.
    """

    def prepare(init_scale):
        build = Accelerator.__init__

        def build_scaling(self, *words, **options):
            build(self, *words, **options)
            assert self.mixed_precision == "fp16"
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=init_scale)

        monkeypatch.setattr(Accelerator, "__init__", build_scaling)
        monkeypatch.setattr(training_arguments, "choose_precision", lambda *flags: Precision(bf16=False, fp16=True))

    return prepare


def test_fp16_learns_what_fp32_learns(train_tiny, read_log, fp16_on_the_cpu, tmp_path, caplog):
    flags = [*LORA, "--max_steps", "8", "--per_device_train_batch_size", "4"]
    assert train_tiny(tmp_path / "fp32", ROWS, *flags) == 0
    fp16_on_the_cpu(2.0**10)
    assert train_tiny(tmp_path / "fp16", ROWS, *flags) == 0
    assert "skipped" not in caplog.text
    found, expected = read_log(tmp_path / "fp16", "loss"), read_log(tmp_path / "fp32", "loss")
    assert expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=0.02)
    weights = open_tensor_file(tmp_path / "fp16" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_overflows_skip_the_first_updates_alone(train_tiny, read_log, fp16_on_the_cpu, tmp_path, caplog):
    """The loss scale starts at 2^24, and gradients overflow above 2^16 or so."""
    caplog.set_level(logging.INFO)
    fp16_on_the_cpu(2.0**24)
    flags = [*LORA, "--max_steps", "16", "--per_device_train_batch_size", "4"]
    assert train_tiny(tmp_path / "out", ROWS, *flags) == 0
    losses, norms = (read_log(tmp_path / "out", name) for name in ("loss", "grad_norm"))
    skipped = norms.count(None)
    assert 0 < skipped < 12
    assert norms[:skipped] == [None] * skipped
    assert losses[: skipped + 1] == pytest.approx([losses[0]] * (skipped + 1), rel=1e-3)  # the order in a pack changes
    assert losses[-1] < 0.9 * losses[0]
    assert f"fp16 loss scaling skipped {skipped} of 16 updates" in caplog.messages
    for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_gradients_that_overflow_at_every_scale_stop_the_run(
    train_tiny, fp16_on_the_cpu, tmp_path, capsys, monkeypatch
):
    fp16_on_the_cpu(2.0**16)
    scale = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: scale(self, loss) * float("inf"))
    flags = [*LORA, "--max_steps", "20", "--per_device_train_batch_size", "4"]
    assert train_tiny(tmp_path / "out", ROWS, *flags) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: step {MOST_IN_A_ROW + 1}: the loss is 10.")
    assert ", the gradient's norm nan after 15 updates in a row that fp16 loss scaling skipped, on rows " in message
    assert f"checkpoint-{MOST_IN_A_ROW} holds the state before it" in message


def test_a_resumed_run_goes_on_with_its_loss_scale(train_tiny, read_log, fp16_on_the_cpu, tmp_path):
    fp16_on_the_cpu(2.0**22)
    flags = [*LORA, "--max_steps", "12", "--per_device_train_batch_size", "4", "--save_strategy", "steps"]
    assert train_tiny(tmp_path / "whole", ROWS, *flags, "--save_steps", "4") == 0
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "again" / "checkpoint-4")
    assert train_tiny(tmp_path / "again", ROWS, *flags, "--save_steps", "4") == 0
    whole = read_log(tmp_path / "whole", "grad_norm")
    assert None in whole[:4]
    assert read_log(tmp_path / "again", "grad_norm") == whole[4:]
    one, two = (open_tensor_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
