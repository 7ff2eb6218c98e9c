"""The names under which `llava.data.vqa_normalize` was imported before training needed it too."""

from __future__ import annotations

from llava.data.vqa_normalize import normalize_answer, strip_answer

__all__ = ["normalize_answer", "strip_answer"]
