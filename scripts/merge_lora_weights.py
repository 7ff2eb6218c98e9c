#!/usr/bin/env python3
"""Merge a LoRA adapter (or a projector) into its base, as `llava merge` does."""

from __future__ import annotations

import sys

from llava.export.merge import main

if __name__ == "__main__":
    sys.exit(main())
