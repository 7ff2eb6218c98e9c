"""The command that installs an extra works where the package is: in a checkout, or installed from a wheel."""

from __future__ import annotations

import pytest

from llava.files.install_command import install_command


@pytest.mark.parametrize(
    ("is_checkout", "command"), [(True, 'pip install -e ".[web]"'), (False, 'pip install "llava[web]"')]
)
def test_install_command(tmp_path, is_checkout, command):
    if is_checkout:
        (tmp_path / "pyproject.toml").touch()
    assert install_command("web", tmp_path / "llava") == command
