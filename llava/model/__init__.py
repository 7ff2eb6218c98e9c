"""The model and its files.

Letters in shape comments: `B` batch rows, `T` prompt tokens with one placeholder per image, `N` images, `P` patches of
an image (576), `V` vision width (1024), `D` LLM width (4096), `S` spliced length (tokens and patches), `W` vocabulary
(32000).
"""

from __future__ import annotations

from llava.model.versions import check_versions

check_versions()
