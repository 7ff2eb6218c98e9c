"""Entry point of the training scripts; its name is the original's, where it chose memory-efficient attention."""

from __future__ import annotations

import sys

from llava.train.train import main

if __name__ == "__main__":
    sys.exit(main())
