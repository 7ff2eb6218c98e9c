"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_path() -> Callable[[str], Path]:
    """Return the function name -> path of a file beside the repository, which skips where it is absent.

    Continuous integration (`CI=true`) always has the file, so there its absence is a failure.
    """

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            message = f"{path} is not here"
            if os.environ.get("CI") == "true":
                pytest.fail(message)
            pytest.skip(message)
        return path

    return find
