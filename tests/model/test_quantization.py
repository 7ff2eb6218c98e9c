"""What 4 and 8 bit refuse."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from llava.model.quantization import import_bitsandbytes, plain_parameter, quantize_linears


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r'^4 and 8 bit need bitsandbytes \(.*\); run: pip install -e "\.\[quant\]"$'
    with pytest.raises(ImportError, match=message):
        import_bitsandbytes()


def test_other_numbers_of_bits():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"^bits is 3; choose 4, 8 or 16$"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)), 3, torch.float32)


def test_plain_parameters_are_cast():
    parameter = plain_parameter(nn.Linear(2, 2), torch.ones(2, 2, dtype=torch.float64), torch.bfloat16, "cpu")
    assert isinstance(parameter, nn.Parameter)
    assert parameter.dtype is torch.bfloat16
