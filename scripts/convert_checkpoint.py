#!/usr/bin/env python3
"""Write a checkpoint in the other layout, as `llava convert` does."""

from __future__ import annotations

import sys

from llava.export.convert import main

if __name__ == "__main__":
    sys.exit(main())
