"""The original's builder of projectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llava.model.projector import build_projector


class IdentityMap(nn.Module):
    """Projector that changes nothing."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `x`."""
        return x

    @property
    def config(self) -> dict[str, str]:
        """Setting that makes this projector."""
        return {"mm_projector_type": "identity"}


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """Return a fresh projector.

    Args:
        config: with `mm_projector_type`, `mm_hidden_size` and `hidden_size`.
        delay_load: no effect, as in the original.
        kwargs: no effect, as in the original.

    Raises:
        ValueError: if there is no such type.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    return IdentityMap() if kind == "identity" else build_projector(kind, config.mm_hidden_size, config.hidden_size)
