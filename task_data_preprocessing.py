"""Convert a table of questions about images to LLaVA's training records, as `llava prepare` does."""

from __future__ import annotations

import sys

from llava.data.table.prepare import main

if __name__ == "__main__":
    sys.exit(main())
