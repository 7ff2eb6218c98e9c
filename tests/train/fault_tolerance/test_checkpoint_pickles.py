"""No file of a checkpoint runs code when a run resumes from it, with DeepSpeed and without."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from llava.train.fault_tolerance import resume
from llava.train.fault_tolerance.checkpoint_dir import verify
from llava.train.fault_tolerance.checkpoint_pickles import DEEPSPEED_GLOBALS, refuse_code, weights_only

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork"),
]

ROOT = Path(__file__).parents[3]
LORA = ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0.3"]
SAVED = ["--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "1e-3"]
SAVED += ["--lr_scheduler_type", "constant"]
SAVED += ["--per_device_train_batch_size", "1", "--dataloader_num_workers", "0"]
ROWS = [
    {"id": number, "conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": f"it is {number}"}]}
    for number in range(4)
]
STAGES = {"plain": [], "zero2": ["--deepspeed", "scripts/zero2.json"], "zero3": ["--deepspeed", "scripts/zero3.json"]}
MODEL_STATES = {"zero2": "mp_rank_00_model_states.pt", "zero3": "zero_pp_rank_0_mp_rank_00_model_states.pt"}
OPTIMIZER_STATES = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def plant(path, payload):
    """Add the payload to a file; the manifest has its new size and hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"x": torch.zeros(1)}
    if path.exists():
        content = torch.load(path, weights_only=False)
    torch.save({**content, "payload": payload} if isinstance(content, dict) else [content, payload], path)
    checkpoint = next(parent for parent in path.parents if parent.name.startswith("checkpoint-"))
    manifest = checkpoint / "manifest.json"
    known = json.loads(manifest.read_text())
    known["files"][path.relative_to(checkpoint).as_posix()] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(known))
    assert verify(checkpoint)


@pytest.fixture
def run(train_forked, monkeypatch):
    """Return the function (name, stage, *flags, code=) -> output directory of a run of one process."""
    monkeypatch.chdir(ROOT)

    def run(name, stage, *flags, **options):
        return train_forked(name, ROWS, *LORA, *SAVED, *STAGES[stage], *flags, processes=1, **options)

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Return the function (stage, files, before=) -> the messages of a resume from checkpoints with a payload each."""

    def refused(stage, files, before=None):
        output = run("out", stage, "--max_steps", "2")
        spare, messages = tmp_path / "spare", []
        shutil.copytree(output, spare)
        for name in files:
            shutil.rmtree(output)
            shutil.copytree(spare, output)
            plant(output / "checkpoint-2" / name, Payload(tmp_path / "it-ran"))
            run("out", stage, "--max_steps", "3", before=before, code=1)
            assert not (tmp_path / "it-ran").exists()
            printed = (tmp_path / "out.0.log").read_text()
            assert "Traceback" not in printed
            assert "weights_only" not in printed
            messages.append(printed.splitlines()[-1])
        return messages

    return refused


def message_of(path):
    return (
        f"error: {path} holds more than tensors and was not loaded (it names posix.mkdir); don't trust its source; "
        "pass another checkpoint with --resume_from_checkpoint, or none to start over"
    )


def test_a_payload_runs_without_the_check(tmp_path):
    """Without this the other tests would prove nothing."""
    torch.save({"payload": Payload(tmp_path / "it-ran")}, tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "it-ran").is_dir()


def test_a_plain_resume_refuses_code(refused, tmp_path):
    files = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"]
    files += ["non_lora_trainables.bin", "rng_state_0.pth", "global_step2/mp_rank_00_model_states.pt"]
    files += ["optimizer_0/deep/inside.pt"]
    expected = [message_of(tmp_path / "out" / "checkpoint-2" / name) for name in files]
    assert refused("plain", files) == expected


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_resume_by_deepspeed_refuses_code(refused, deepspeed, tmp_path, stage):
    names = [MODEL_STATES[stage], OPTIMIZER_STATES]
    files = [f"global_step2/{name}" for name in names]
    expected = [message_of(tmp_path / "out" / "checkpoint-2" / name) for name in files]
    assert refused(stage, files) == expected


@pytest.mark.parametrize("stage", ["plain", "zero2", "zero3"])
def test_a_file_exchanged_after_the_check_does_not_run_either(refused, deepspeed, tmp_path, stage):
    """The check is left out here: the load itself must refuse."""
    name = "optimizer.pt" if stage == "plain" else f"global_step2/{MODEL_STATES[stage]}"

    def unchecked():
        resume.refuse_code = lambda checkpoint: None

    assert refused(stage, [name], before=unchecked) == [
        f"error: {tmp_path / 'out' / 'checkpoint-2'} holds more than tensors and was not loaded (it names "
        "posix.mkdir); don't trust its source"
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_genuine_checkpoints_resume(run, deepspeed, tmp_path, stage):
    whole = run("whole", stage, "--max_steps", "3")
    output = run("out", stage, "--max_steps", "2")
    written = (output / "checkpoint-2").stat().st_mtime_ns
    run("out", stage, "--max_steps", "3")
    assert (output / "checkpoint-2").stat().st_mtime_ns == written  # the run went on from it
    left, right = ((path / "adapter_model.safetensors").read_bytes() for path in (whole, output))
    assert left == right


def test_classes_in_genuine_files_are_accepted(deepspeed, tmp_path):
    """Instances of all classes in DeepSpeed's files; its fp16 states can't be trained on every CPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2)
    content = {"stage": ZeroStageEnum(2), "scalers": [LossScaler(1.0), scaler], "place": fragment_address(3, 4)}
    assert len(DEEPSPEED_GLOBALS) == 4
    (tmp_path / "global_step1").mkdir()
    path = tmp_path / "global_step1" / "states.pt"
    torch.save(content, path)
    refuse_code(tmp_path)
    with weights_only(with_deepspeed=True):
        found = torch.load(path, weights_only=False)
    assert (found["stage"], found["place"]) == (content["stage"], content["place"])
    assert found["scalers"][1].__dict__ == scaler.__dict__


class Attribute:
    """Is pickled as a call of `getattr`, as Python 3.11.0 to 3.11.3 pickle the members of enumerations."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_getattr_gives_members_of_enumerations_alone(deepspeed, tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    path = tmp_path / "state.pt"
    torch.save({"stage": Attribute(ZeroStageEnum, "gradients")}, path)
    with weights_only(with_deepspeed=True):
        assert torch.load(path) == {"stage": ZeroStageEnum.gradients}
    for owner, name in ((ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (LossScaler, "__init__")):
        torch.save({"stage": Attribute(owner, name)}, path)
        with weights_only(with_deepspeed=True), pytest.raises(pickle.UnpicklingError, match="getattr is called for"):
            torch.load(path)
    torch.save({"stage": Attribute(ZeroStageEnum, "gradients")}, path)
    with weights_only(with_deepspeed=False), pytest.raises(pickle.UnpicklingError):
        torch.load(path)


def test_the_process_is_left_as_it_was(tmp_path, monkeypatch):
    torch.save({"payload": Payload(tmp_path / "it-ran")}, tmp_path / "evil.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # some users have it for other programs
    before = dict(os.environ), set(torch.serialization.get_safe_globals())
    with pytest.raises(pickle.UnpicklingError), weights_only(with_deepspeed=False):
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (dict(os.environ), set(torch.serialization.get_safe_globals())) == before
    assert not (tmp_path / "it-ran").exists()


def test_other_forms_of_pickles(tmp_path):
    """TorchScript, tar and bare pickles: PyTorch's own messages about them advise to load them all the same."""
    module = torch.jit.script(torch.nn.Linear(1, 1))
    torch.jit.save(module, tmp_path / "script.pt")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Payload(tmp_path / "it-ran")))
    torch.save(Payload(tmp_path / "it-ran"), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("bare.bin", "old.pth", "script.pt"):
        with pytest.raises(ValueError, match=rf"{name} holds more than tensors and was not loaded \(it ") as caught:
            refuse_code(tmp_path)
        assert "weights_only" not in str(caught.value)
        (tmp_path / name).unlink()
    with zipfile.ZipFile(tmp_path / "cut.pt", "w") as archive:
        archive.writestr("nothing", b"")
    with pytest.raises(ValueError, match=r"cut\.pt is damaged \("):
        refuse_code(tmp_path)
    assert not (tmp_path / "it-ran").exists()
