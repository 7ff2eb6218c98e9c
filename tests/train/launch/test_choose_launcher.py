"""The launcher of a training: which one, with which words, and what is said or refused without DeepSpeed."""

from __future__ import annotations

import itertools

import pytest

from llava.train.launch.choose_launcher import Machine, choose_launcher, read_request

SMALL, SHARDED, OFFLOADED = "scripts/zero2.json", "scripts/zero3.json", "scripts/zero3_offload.json"


@pytest.fixture
def choose(monkeypatch, request):
    """Return the function (has_deepspeed, GPUs of the machine, *flags, **variables) -> Launch."""
    monkeypatch.chdir(request.config.rootpath)

    def run(has_deepspeed, gpus, *flags, **variables):
        return choose_launcher(read_request(variables, flags), Machine(has_deepspeed, lambda: gpus))

    return run


TRAIN = "llava/train/train_mem.py"


@pytest.mark.parametrize(
    ("has_deepspeed", "gpus", "variables", "words"),
    [
        (True, 1, {}, f"deepspeed {TRAIN}"),
        (True, 8, {"ZERO": SHARDED, "GPUS": "2"}, f"deepspeed --num_gpus 2 {TRAIN} --deepspeed {SHARDED}"),
        (True, 8, {"ZERO": "none", "HOSTFILE": "hosts", "PORT": "7"},
         f"deepspeed --hostfile hosts --master_port 7 {TRAIN}"),
        (True, 8, {"LAUNCHER": "torchrun", "ZERO": SMALL}, f"torchrun --nproc_per_node 8 --standalone {TRAIN}"),
        (True, 8, {"LAUNCHER": "python", "ZERO": SHARDED}, f"python {TRAIN}"),
        (False, 0, {"ZERO": SHARDED}, f"python {TRAIN}"),
        (False, 1, {"ZERO": SMALL}, f"python {TRAIN}"),
        (False, 4, {"ZERO": SMALL}, f"torchrun --nproc_per_node 4 --standalone {TRAIN}"),
        (False, 4, {"ZERO": SMALL, "GPUS": "1"}, f"python {TRAIN}"),
        (False, 0, {"ZERO": SMALL, "GPUS": "2", "PORT": "7"}, f"torchrun --nproc_per_node 2 --master_port 7 {TRAIN}"),
    ],
)  # fmt: skip
def test_words(choose, has_deepspeed, gpus, variables, words):
    assert " ".join(choose(has_deepspeed, gpus, **variables).words) == words


@pytest.mark.parametrize(
    ("gpus", "flags", "variables", "line"),
    [
        (1, (), {"ZERO": SMALL}, "python, one process (deepspeed is not on the PATH); nothing is lost: one process "
         "has nothing to shard with ZERO=scripts/zero2.json"),
        (2, (), {"ZERO": SMALL}, "torchrun, 2 process(es) (deepspeed is not on the PATH); ZeRO-2 is lost: each GPU "
         "holds all gradients and the whole optimizer"),
        (2, ("--fsdp",), {"ZERO": SHARDED, "LAUNCHER": "torchrun"}, "torchrun, 2 process(es) (LAUNCHER=torchrun); "
         "--fsdp shards weights, gradients and optimizer over the GPUs"),
        (2, (), {}, "torchrun, 2 process(es) (deepspeed is not on the PATH); no DeepSpeed config is asked for"),
    ],
)  # fmt: skip
def test_line_says_which_why_and_what_is_lost(choose, gpus, flags, variables, line):
    assert choose(False, gpus, *flags, **variables).line == f"launcher: {line}"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ZERO": SHARDED},
            "shards the weights over 2 GPUs with DeepSpeed, and deepspeed is not on the PATH; .*--fsdp",
        ),
        ({"ZERO": OFFLOADED, "GPUS": "1"}, "keeps the optimizer in CPU memory, .*; run pip install .*--bits 4"),
        ({"HOSTFILE": "hosts"}, "HOSTFILE=hosts is read by deepspeed alone, .*multi_gpu.md"),
        ({"LAUNCHER": "deepspeed"}, "LAUNCHER=deepspeed, but deepspeed is not on the PATH; .*leave LAUNCHER out"),
        ({"LAUNCHER": "python", "GPUS": "2"}, "LAUNCHER=python starts one process, and GPUS=2; choose torchrun"),
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun is unknown; choose deepspeed, torchrun or python"),
        ({"GPUS": "two"}, "GPUS=two is not a number of GPUs; give 1 or more"),
        ({"GPUS": "0"}, "GPUS=0 is not a number"),
        ({"ZERO": "absent.json"}, r"--deepspeed absent.json can't be read .*use scripts/zero2.json"),
    ],
)
def test_refusals_name_the_way_out(choose, variables, message):
    with pytest.raises(ValueError, match=message):
        choose(False, 2, **variables)


def test_every_request_ends_in_a_launcher_or_a_reason(choose):
    """Law: DeepSpeed's config reaches DeepSpeed alone, and python never stands for several processes."""
    choices = itertools.product(
        (True, False), (0, 1, 2), ("", "deepspeed", "torchrun", "python"), ("", "1", "3"),
        ("none", SMALL, SHARDED, OFFLOADED), ((), ("--fsdp",)),
    )  # fmt: skip
    for has_deepspeed, visible, launcher, gpus, zero, flags in choices:
        try:
            launch = choose(has_deepspeed, visible, *flags, LAUNCHER=launcher, GPUS=gpus, ZERO=zero)
        except ValueError as error:
            assert ";" in str(error)
            continue
        assert launch.words[0] == (launcher or launch.words[0])
        assert ("--deepspeed" in launch.words) == (launch.words[0] == "deepspeed" and zero != "none")
        assert launch.words[0] != "python" or (gpus or "1") == "1"
        assert launch.words[0] != "deepspeed" or has_deepspeed
