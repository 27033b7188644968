"""The metrics of a run, one JSON object per line, on disk as soon as a line is written."""

import json
import math
import os
from pathlib import Path
from typing import Any

from .files import append, leads_to


class MetricsLog:
    """Appends to a JSONL file.

    A line that a kill cut off is removed when the file is opened. Numbers that JSON cannot hold (nan, infinity) are
    written as null.

    Args:
        path: the file; made with its folder when missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
        self._file.truncate(len(self._whole_lines()))
        self._sync()

    def log(self, step: int, values: dict) -> None:
        """Write ``{"step": step, **values}``. Values are JSON, or tensors and arrays of one number.

        Raises:
            OSError: the disk is full (the file ends with the line before), or as :meth:`check`.
        """
        self.check()
        row = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        append(self._file, json.dumps(row, allow_nan=False).encode() + b"\n")

    def check(self) -> None:
        """Raise an OSError when the file, or its whole folder, was removed or replaced since it was opened."""
        if not leads_to(self.path, self._file):
            raise OSError(
                f"{self.path} was removed or replaced while this run wrote to it; the run stops here and leaves "
                "alone what is there now."
            )

    def truncate_after(self, step: int) -> None:
        """Drop every line of a later step, so that a run resumed at ``step`` continues without gap or repeat.

        Raises:
            ValueError: a line that this class did not write.
        """
        kept = 0
        for number, line in enumerate(self._whole_lines().splitlines(keepends=True), 1):
            try:
                later = json.loads(line)["step"] > step
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}:{number} is not a line of metrics with a step; move the file away to start anew."
                ) from None
            if later:
                break
            kept += len(line)
        self._file.truncate(kept)
        self._sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _whole_lines(self) -> bytes:
        self._file.seek(0)
        content = self._file.read()
        return content[: content.rfind(b"\n") + 1]

    def _sync(self) -> None:
        os.fsync(self._file.fileno())


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file that are whole; none of a file that is not there."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value
