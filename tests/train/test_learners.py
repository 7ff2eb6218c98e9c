"""What learns is found once, is what an optimizer would find, and loses its gradients as a module's parameters do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava.train.learners import Learners


def make():
    """Two layers, of which the first's weight is frozen; gradients of ones where one can be."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].weight.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    return model


def test_parameters_are_those_that_learn_in_the_models_order():
    model = make()
    assert list(map(id, Learners(model).parameters())) == list(map(id, [model[0].bias, model[1].weight, model[1].bias]))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_go_as_a_modules_do(set_to_none):
    model, other = make(), make()
    model[1].bias.grad = other[1].bias.grad = None
    Learners(model).zero_grad(set_to_none=set_to_none)
    other.zero_grad(set_to_none=set_to_none)
    for one, its in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (its.grad is None)
        assert one.grad is None or torch.equal(one.grad, its.grad)
