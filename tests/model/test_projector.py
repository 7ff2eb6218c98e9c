"""The projector's shapes and the names of its tensors."""

from __future__ import annotations

import pytest
import torch

from llava.model.projector import build_projector


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("linear", {"weight": (5, 3), "bias": (5,)}),
        ("mlp1x_gelu", {"0.weight": (5, 3), "0.bias": (5,)}),
        ("mlp2x_gelu", {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (5, 5), "2.bias": (5,)}),
        (
            "mlp3x_gelu",
            {
                "0.weight": (5, 3),
                "0.bias": (5,),
                "2.weight": (5, 5),
                "2.bias": (5,),
                "4.weight": (5, 5),
                "4.bias": (5,),
            },
        ),
    ],
)
def test_tensors(kind, shapes):
    projector = build_projector(kind, 3, 5)
    assert {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()} == shapes
    assert projector(torch.zeros(2, 4, 3)).shape == (2, 4, 5)


def test_mlp_is_linear_gelu_linear():
    projector = build_projector("mlp2x_gelu", 3, 5)
    pixels = torch.randn(4, 3)
    hidden = torch.nn.functional.gelu(pixels @ projector[0].weight.T + projector[0].bias)
    torch.testing.assert_close(projector(pixels), hidden @ projector[2].weight.T + projector[2].bias)


@pytest.mark.parametrize("kind", ["identity", "mlp0x_gelu", "mlp2x_relu", "mlp2x_gelu_x"])
def test_unknown_kind(kind):
    with pytest.raises(ValueError, match=f"^mm_projector_type is '{kind}'; choose linear or mlp2x_gelu$"):
        build_projector(kind, 3, 5)
