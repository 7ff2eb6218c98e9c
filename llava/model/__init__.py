"""LLaVA: vision tower, projector and language model; their checkpoints, adapters and training on packs.

Shape letters, the same in the whole package: `B` rows of a batch, `T` prompt tokens (an image is one), `N` images, `P`
patches of an image (LLaVA-1.5: 576), `S` spliced length (text tokens and patches), `V` vision width (1024), `D` LLM
width (4096), `H` attention heads, `Hkv` key heads, `d` head width, `W` vocabulary (32000). Pixels: (3, height, width).
"""

from __future__ import annotations

from llava.original_names import lazy_names

__getattr__ = lazy_names(__name__)
