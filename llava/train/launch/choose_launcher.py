"""Choose what starts the training processes: deepspeed, torchrun or plain python.

LAUNCHER, GPUS, ZERO, HOSTFILE and PORT are read from the environment, `--fsdp` from the training's flags.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llava.files.install_command import install_command
from llava.train.flags.arguments import is_offloaded, zero_stage

LAUNCHERS = ("deepspeed", "torchrun", "python")
_TRAINING = Path(__file__).parents[1] / "train_mem.py"
_ZERO_CONFIGS = Path(__file__).parent
NO_CONFIG = "none"  # ZERO=none: no DeepSpeed config
_INSTALL = f"run {install_command('train')} on Linux"


class Asked(NamedTuple):
    """What the environment and the flags ask for.

    Attributes:
        launcher: one of `LAUNCHERS`, "" to choose.
        gpus: number of GPUs, None for all.
        zero: path of a DeepSpeed config, or "none".
        hostfile: path of DeepSpeed's list of machines, "" for this machine alone.
        port: for the processes to find each other, "" for the launcher's default.
        is_fsdp: the flags hold `--fsdp`.
    """

    launcher: str = ""
    gpus: int | None = None
    zero: str = NO_CONFIG
    hostfile: str = ""
    port: str = ""
    is_fsdp: bool = False


class Machine(NamedTuple):
    """What the machine offers: whether `deepspeed` is on the PATH, and the number of GPUs that torch sees (0: none)."""

    has_deepspeed: bool
    count_gpus: Callable[[], int]


class Launch(NamedTuple):
    """The command's words in front of the training flags, and the line that explains the choice."""

    words: list[str]
    line: str


def read_request(environment: Mapping[str, str], flags: Sequence[str]) -> Asked:
    """Read the request from environment variables and training flags.

    Raises:
        ValueError: naming the variable, its value and the choices.
    """
    launcher, gpus = environment.get("LAUNCHER", ""), environment.get("GPUS", "")
    if launcher and launcher not in LAUNCHERS:
        raise ValueError(f"LAUNCHER={launcher} is unknown; choose deepspeed, torchrun or python, or leave it out")
    if gpus and not (gpus.isascii() and gpus.isdigit() and int(gpus) > 0):
        raise ValueError(f"GPUS={gpus} is not a number of GPUs; give 1 or more, or leave it out to use all")
    return Asked(
        launcher,
        int(gpus) if gpus else None,
        find_zero_config(environment.get("ZERO") or NO_CONFIG),
        environment.get("HOSTFILE", ""),
        environment.get("PORT", ""),
        any(flag.partition("=")[0] == "--fsdp" for flag in flags),
    )


def find_zero_config(name: str) -> str:
    """Return the path of a DeepSpeed config; scripts/zero2.json and others are found without a checkout too.

    Args:
        name: path, or the name of a config beside this module, with any folder and ending; "none" is returned as it is.
    """
    shipped = (_ZERO_CONFIGS / Path(name).name).with_suffix(".json")
    return str(shipped) if name != NO_CONFIG and not Path(name).is_file() and shipped.is_file() else name


def training_program() -> str:
    """Return the path of the program that launchers start, relative to the working directory if it lies below."""
    here = Path.cwd()
    return _TRAINING.relative_to(here).as_posix() if _TRAINING.is_relative_to(here) else str(_TRAINING)


def choose_launcher(asked: Asked, machine: Machine) -> Launch:
    """Take the launcher that was asked for; else deepspeed where it is on the PATH, torchrun for several GPUs, python.

    Raises:
        ValueError: if the request needs DeepSpeed and goes without it, or contradicts itself; with the way out.
    """
    if asked.launcher == "deepspeed" and not machine.has_deepspeed:
        raise ValueError(f"LAUNCHER=deepspeed, but deepspeed is not on the PATH; {_INSTALL}, or leave LAUNCHER out")
    if asked.launcher in ("", "deepspeed") and machine.has_deepspeed:
        return _with_deepspeed(asked, machine)
    return _without_deepspeed(asked, machine)


def _with_deepspeed(asked: Asked, machine: Machine) -> Launch:
    words = ["deepspeed"]
    words += ["--hostfile", asked.hostfile] if asked.hostfile else []
    words += ["--num_gpus", str(asked.gpus)] if asked.gpus else []
    words += ["--master_port", asked.port] if asked.port else []
    config = [] if asked.zero == NO_CONFIG else ["--deepspeed", asked.zero]
    why = "LAUNCHER=deepspeed" if asked.launcher else "it is on the PATH"
    return Launch([*words, training_program(), *config], f"launcher: deepspeed with ZERO={asked.zero} ({why})")


def _without_deepspeed(asked: Asked, machine: Machine) -> Launch:
    why = f"LAUNCHER={asked.launcher}" if asked.launcher else "deepspeed is not on the PATH"
    if asked.hostfile:
        raise ValueError(
            f"HOSTFILE={asked.hostfile} is read by deepspeed alone, and {why}; {_INSTALL}, or start torchrun on each "
            "machine (docs/multi_gpu.md)"
        )
    if asked.launcher == "python" and (asked.gpus or 1) > 1:
        raise ValueError(f"LAUNCHER=python starts one process, and GPUS={asked.gpus}; choose torchrun, or GPUS=1")
    processes = asked.gpus or (1 if asked.launcher == "python" else max(1, machine.count_gpus()))
    lost = _lost(asked, processes, why)
    if (asked.launcher or ("torchrun" if processes > 1 else "python")) == "python":
        return Launch(["python", training_program()], f"launcher: python, one process ({why}); {lost}")
    port = ["--master_port", asked.port] if asked.port else ["--standalone"]  # standalone takes a free port
    words = ["torchrun", "--nproc_per_node", str(processes), *port, training_program()]
    return Launch(words, f"launcher: torchrun, {processes} process(es) ({why}); {lost}")


def _lost(asked: Asked, processes: int, why: str) -> str:
    """What the run goes without; ZeRO-3 on several GPUs and offload are refused, since memory depends on them."""
    if asked.is_fsdp and processes > 1:
        return "--fsdp shards weights, gradients and optimizer over the GPUs"
    if asked.zero == NO_CONFIG:
        return "no DeepSpeed config is asked for"
    stage = zero_stage(asked.zero)
    if is_offloaded(asked.zero):
        raise ValueError(
            f"ZERO={asked.zero} keeps the optimizer in CPU memory, which DeepSpeed alone does, and {why}; {_INSTALL}, "
            "or take ZERO=none and LoRA with --bits 4, whose optimizer is small (docs/multi_gpu.md)"
        )
    if stage == 3 and processes > 1:
        raise ValueError(
            f"ZERO={asked.zero} shards the weights over {processes} GPUs with DeepSpeed, and {why}; {_INSTALL}, or "
            "pass --fsdp, which shards them without DeepSpeed, or take ZERO=none if the model fits on each GPU"
        )
    if processes == 1:
        return f"nothing is lost: one process has nothing to shard with ZERO={asked.zero}"
    return f"ZeRO-{stage} is lost: each GPU holds all gradients and the whole optimizer"


def inspect_machine(path: str | None) -> Machine:
    """Return what this machine offers to a launcher that is searched on `path`; GPUs are counted when asked for."""
    return Machine(shutil.which("deepspeed", path=path) is not None, count_gpus)


def count_gpus() -> int:
    """Return the number of CUDA or ROCm GPUs that torch sees, in a process that gives its memory back."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])  # libraries may log there while they are imported
