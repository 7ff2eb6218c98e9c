#!/usr/bin/env python3
"""Upload a model to the Hugging Face hub with a model card; `llava push` is the same.

Example:
    python scripts/push_to_hub.py --path llava_merged_model --repo me/llava-vqa --private --dry-run
"""

from __future__ import annotations

import sys

from llava.export.push import main

if __name__ == "__main__":
    sys.exit(main())
