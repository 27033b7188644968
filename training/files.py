"""Writing files so that nobody ever reads half of one: beside their place first, then moved there."""

import json
import os
import shutil
from pathlib import Path


def write_json(path: Path, content) -> None:
    """Write ``content`` as indented JSON, all of it or nothing; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        os.replace(partial, path)
    except OSError:
        partial.unlink()
        raise


def move_in(partial: Path, folder: Path) -> None:
    """Move what a finished ``partial`` folder holds into ``folder`` and remove it.

    config.json goes first out of ``folder`` and last into it, so a folder with a config is complete. A move that was
    interrupted is repaired by doing it again from a new ``partial``.
    """
    (folder / "config.json").unlink(missing_ok=True)
    for entry in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        place = folder / entry.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(entry, place)
    partial.rmdir()
