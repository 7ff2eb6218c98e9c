"""Write `README.md` and the run's files into a checkpoint that is being written."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

from llava.constants import CARD_FILE, PLOT_FILE, TRAINING_FILE
from llava.files.regular_files import is_file
from llava.hub.licences import find_licence
from llava.hub.model_card import build_card, is_untouched
from llava.hub.model_facts import read_facts

logger = logging.getLogger(__name__)


def write_card(
    directory: Path, target: Path, *, source: Path | None = None, has_loss_curve: bool | None = None
) -> None:
    """Write the model card of a complete checkpoint before it is moved into place.

    A `README.md` that somebody wrote or changed in `target` stays: it is copied, and a log line says so.

    Args:
        directory: holds the new checkpoint, complete but for the card.
        target: directory that it replaces or is moved into; it need not exist.
        source: checkpoint that it was made from without training, whose run manifest and loss curve are copied.
        has_loss_curve: whether `loss.png` will be beside the card; None = if it is in `directory`.
    """
    for name in (TRAINING_FILE, PLOT_FILE) if source else ():
        if is_file(source / name):
            shutil.copyfile(source / name, directory / name)
    own = target / CARD_FILE
    if is_file(own) and not is_untouched(read_card(own)):
        logger.warning("%s was not written here, or was changed, so it stays as it is; it may not fit the model", own)
        shutil.copyfile(own, directory / CARD_FILE)
        return
    facts = read_facts(directory)
    licence = facts.licence or (find_licence(str(source)) if source else None)
    curve = facts.has_loss_curve if has_loss_curve is None else has_loss_curve
    facts = dataclasses.replace(facts, licence=licence, has_loss_curve=curve)
    text = build_card(facts, target.resolve().name).content
    (directory / CARD_FILE).write_text(text, encoding="utf-8", newline="\n")


def read_card(path: Path) -> str:
    """Return the text of a model card; bytes that are not UTF-8 are replaced, so that no card of ours has them."""
    return path.read_text(encoding="utf-8", errors="replace")
