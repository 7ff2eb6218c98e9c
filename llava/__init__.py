"""LLaVA-1.5 for one job: teach it to answer your questions about images, then answer thousands of them."""

from __future__ import annotations

from llava.library_noise import quiet_bitsandbytes, quiet_pillow
from llava.original_names import install, lazy_names

__version__ = "2.0.0"
__getattr__ = lazy_names(__name__)

quiet_bitsandbytes()
quiet_pillow()
install()
