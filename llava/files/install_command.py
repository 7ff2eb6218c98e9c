"""The pip command that adds an extra's libraries, for the messages that name a missing one."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def install_command(extra: str, package: Path = _PACKAGE) -> str:
    """Return the command that installs an extra of `pyproject.toml`; for a checkout it runs in its root.

    Args:
        extra: "web", "train", ...
        package: directory of the package.

    Example:
        >>> install_command("web", Path("site-packages/llava"))
        'pip install "llava[web]"'
    """
    if (package.parent / "pyproject.toml").is_file():
        return f'pip install -e ".[{extra}]"'
    return f'pip install "{package.name}[{extra}]"'
