"""What learns of a model, looked up once.

PyTorch's modules look through all that they hold to find their parameters: 3,000 modules of LLaVA-1.5-7B under LoRA,
for which a program takes 5 ms, and a trainer asks twice a step (`benchmarks/host_time.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


class Learners:
    """Stands in for a model where gradients are clipped or dropped.

    Args:
        model: what learns and what doesn't is settled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that learn, in the model's order; others have no gradient."""
        return iter(self._learning)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or set them to zero, as `nn.Module.zero_grad` does."""
        for parameter in self._learning:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.detach_().zero_()
