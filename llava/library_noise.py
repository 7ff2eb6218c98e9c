"""Filters for log messages and warnings of libraries that don't help a user."""

from __future__ import annotations

import logging
import warnings


def quiet_bitsandbytes() -> None:
    """Leave out bitsandbytes' advice to install another package, which peft's import brings to every program.

    It appears at import on CPUs with AVX512-BF16, whatever is done. Its other messages are still logged.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_other_message)


def quiet_pillow() -> None:
    """Leave out Pillow's warning of damaged EXIF data: the pixels are whole, and the orientation counts as none."""
    warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)


def _is_other_message(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
