"""What ``ppow evaluate`` has measured, on disk as soon as it is measured: one line per answered prompt."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from .files import LOCK, append

FILE = "samples.jsonl"
RESULTS = ("metrics.json", "acceptance.png")
_MINE = {FILE, *RESULTS, LOCK, *(f".{name}.partial" for name in RESULTS)}


@dataclass
class Sample:
    """One prompt answered by the plain target and with a drafter.

    Attributes:
        prompt: number of the prompt; the turns and repetitions of one prompt belong together.
        plain_tokens, plain_seconds: of stock ``generate``; tokens, seconds: with the drafter.
        gained, accepted, drafted, verified: per verification, as in :class:`ppow.transcript_ppow.Acceptance`.
        identical: whether the ids are the same (meaningful at temperature 0 only).
        loops: whether the answer ends in an exact repetition.
        difference: at temperature 0, where it parts from stock ``generate``'s: a
            :class:`ppow.lossless_ppow.Difference` as a dict with its verdict.
        reference: the same against the loop without drafts; empty where they agree, None where it did not run.
        drafting: the :class:`ppow.drafting_ppow.DraftOptions` that ran.
    """

    prompt: int
    plain_tokens: int
    plain_seconds: float
    tokens: int
    seconds: float
    gained: list[int]
    accepted: list[int]
    drafted: list[int]
    identical: bool
    loops: bool
    difference: dict | None = None
    reference: dict | None = None
    drafting: dict | None = None
    verified: list[int] | None = None


class SampleLog:
    """The samples of an evaluation, appended to ``folder/samples.jsonl``.

    Its first line holds what the figures depend on, so that only the same evaluation goes on in it. A line that a kill
    cut off is dropped. The folder is claimed by then (:func:`ppow.training.files.claim_folder`).

    Args:
        folder: the output folder; made when missing.
        made_with: options, weights, prompts, versions and hardware of this evaluation.
        resume: go on in a folder that holds some or all of it.

    Raises:
        ValueError: a folder that holds something else, an earlier result, or another evaluation; nothing is changed.
    """

    def __init__(self, folder: Path, made_with: dict, resume: bool):
        self.path = folder / FILE
        self.warming = 0.0  # seconds that answers took which are no samples, since they warmed up
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in _MINE)
        if foreign:
            raise ValueError(
                f"--output-dir {folder} holds something else ({', '.join(foreign[:3])}); give an empty or a new folder."
            )
        finished, begun = (folder / RESULTS[0]).exists(), self.path.exists()
        if finished and not begun:
            raise ValueError(f"--output-dir {folder} holds an earlier result; move it away, or give another folder.")
        if begun and not resume:
            what = "an earlier result" if finished else "an evaluation that was broken off"
            raise ValueError(
                f"--output-dir {folder} holds {what}. Pass --resume to go on with it, or give another folder."
            )
        self._file = self.path.open("a+b", buffering=0)
        try:
            self.found = self._read(made_with)
        except ValueError:
            self._file.close()
            raise

    def get(self, title: str, index: int) -> list[Sample] | None:
        """The samples of one prompt, one per drafter; None where it is still to be measured."""
        return self.found.get((title, index))

    def add(self, title: str, index: int, samples: list[Sample]) -> None:
        """Keep one prompt's samples, on disk when this returns."""
        self.found[title, index] = samples
        self._write({"set": title, "index": index, "samples": [dataclasses.asdict(sample) for sample in samples]})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, made_with: dict) -> dict:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        made_with = json.loads(json.dumps(made_with))  # as it is read back
        try:
            head, *rows = [json.loads(line) for line in whole.splitlines()] or [{"evaluation": made_with}]
            found = {(row["set"], row["index"]): [Sample(**sample) for sample in row["samples"]] for row in rows}
            before = head["evaluation"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.path} was not written by `ppow evaluate`; give another --output-dir.") from None
        changed = sorted(key for key in {*before, *made_with} if before.get(key) != made_with.get(key))
        if changed:
            raise ValueError(
                f"{self.path.parent} holds an evaluation with other {', '.join(changed)}, and figures of two runs do "
                "not mix. Restore them, or give another --output-dir."
            )
        self._file.truncate(len(whole))
        if not whole:
            self._write({"evaluation": made_with})
        return found

    def _write(self, row: dict) -> None:
        append(self._file, json.dumps(row).encode() + b"\n")
