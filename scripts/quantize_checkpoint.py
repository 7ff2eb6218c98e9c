#!/usr/bin/env python3
"""Quantise a model once and write it, as `llava quantize` does."""

from __future__ import annotations

import sys

from llava.export.quantize import main

if __name__ == "__main__":
    sys.exit(main())
