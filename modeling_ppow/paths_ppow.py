"""Paths told from Hub ids."""

import os
from pathlib import Path


def only_a_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name can be a path alone: no Hub id starts with a dot, ~ or separator, ends in one, or has two."""
    text = os.fspath(name)
    return (
        not isinstance(name, str)
        or text.startswith((".", "/", "~"))
        or text.endswith("/")
        or text.count("/") > 1
        or "\\" in text
    )


def check_path(name: str | os.PathLike[str]) -> None:
    """Raise a ValueError for a path that leads to no folder, which the Hub's client would take for an id."""
    if only_a_path(name) and not Path(name).is_dir():
        raise ValueError(f"There is no folder {name}: give the folder or Hub id of a drafter.")
