"""Names of the files and folders that a run writes into `--output_dir`."""

from __future__ import annotations

from llava.constants import CARD_FILE, CHECKPOINT_PREFIX, PLOT_FILE, STATE_FILE
from llava.files.overwrite_check import MODEL_FILES

LOG_FILE = "train_log.jsonl"
SKIPPED_FILE = "skipped_rows.jsonl"
SKIPPED_VALIDATION_FILE = "skipped_validation_rows.jsonl"
NONFINITE_FILE = "nonfinite_step_{}.json"
STAGING_FOLDER = ".writing"

WRITTEN = (
    *MODEL_FILES,
    CARD_FILE,
    LOG_FILE,
    PLOT_FILE,
    SKIPPED_FILE,
    SKIPPED_VALIDATION_FILE,
    STATE_FILE,
    NONFINITE_FILE.format("*"),
    STAGING_FOLDER,
    f"{CHECKPOINT_PREFIX}*",  # removed by --save_total_limit, set aside when a run starts over
    f".{CHECKPOINT_PREFIX}*",
)
"""Patterns of everything that a run writes, replaces or removes in its output directory."""
