"""Precision of training: bf16, fp16 with loss scaling, or fp32, from the flags and the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from llava.model.capabilities import Capabilities


class Precision(NamedTuple):
    """Which mixed precision is on; neither = fp32."""

    bf16: bool
    fp16: bool


def choose_precision(can: Capabilities, bf16: bool | None, fp16: bool | None, tf32: bool | None = None) -> Precision:
    """Return the precision that the flags ask for, or else the device's.

    Args:
        can: of the device.
        bf16, fp16: flags; None = not given.
        tf32: flag for products of fp32 values.

    Raises:
        ValueError: if the device does not compute as a flag says; the message names the flag and the way out.
    """
    machine, kind = can.machine, can.machine.device_type
    if bf16 and not can.has_bf16:
        raise ValueError(f"--bf16 True: {machine} does not compute in bf16; leave it out for fp16 with loss scaling")
    if fp16 and kind == "cpu":
        raise ValueError("--fp16 True: the CPU trains in fp32 or bf16; leave it out, or pass --bf16 True")
    if tf32 and not (kind == "cuda" and can.has_bf16):  # the same generations have both
        raise ValueError(f"--tf32 True: {machine} does not compute in TF32; leave it out")
    if bf16 is None and fp16 is None:
        return Precision(can.dtype is torch.bfloat16, can.dtype is torch.float16)
    return Precision(bool(bf16), bool(fp16))
