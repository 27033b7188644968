"""What ``ppow doctor`` finds, and the commands that it names for it. All are meant for a shell, in the same folder."""

import shlex
from pathlib import Path
from typing import NamedTuple

from .config import DoctorConfig

# a statement about a loaded drafter: its draft vocabulary in the order in which every trainer writes it
IN_ORDER = "drafter.d2t.copy_(drafter.t2d.nonzero()[:, 0] - drafter.d2t.new_tensor(range(len(drafter.d2t))))"


class Finding(NamedTuple):
    """Something that is wrong with a pair.

    Attributes:
        fault: its name.
        words: what was found.
        next: the command to run next.
        gain: tokens of a window that fixing it may bring; 0: that was not measured.
        first: whether it comes before all that was measured.
    """

    fault: str
    words: str
    next: str
    gain: float = 0.0
    first: bool = False


def beside(config: DoctorConfig, ending: str) -> str:
    """A place here for what is made of the drafter."""
    return f"{Path(config.drafter.rstrip('/')).name}-{ending}"


def command(config: DoctorConfig, name: str, *more: str, drafter: str | None = None) -> str:
    """A command of ``ppow`` about the pair, or about another ``drafter``."""
    return shlex.join(["ppow", name, "--target", config.target, "--drafter", drafter or config.drafter, *more])


def imported_again(config: DoctorConfig) -> str:
    """The command that makes the drafter of another trainer's checkpoint anew."""
    return shlex.join(["ppow", "import", "CHECKPOINT", "--target", config.target, "--out", beside(config, "anew")])


def trained(config: DoctorConfig, *more: str, fresh: bool = False) -> str:
    """The commands that train the drafter on, or a fresh one, with the target's own answers in its chat template."""
    answers = "--data", "chats.jsonl", "--output", "answers.jsonl"
    start = [] if fresh else ["--drafter", config.drafter]
    given = [*start, "--data", "answers.jsonl", *more, "--output-dir", beside(config, "anew")]
    first, second = ("regenerate", *answers), ("supervised", *given)
    return " && ".join(shlex.join(["ppow", name, "--target", config.target, *rest]) for name, *rest in (first, second))


def fixed(config: DoctorConfig, statement: str) -> str:
    """The commands that fix the loaded ``drafter`` by a statement, and examine it again."""
    place = beside(config, "fixed")
    load = f"PPOWDrafter.from_pretrained({config.drafter!r}, target={config.target!r}, dtype='auto')"
    code = f"from ppow import PPOWDrafter; drafter = {load}; {statement}; drafter.save_pretrained({place!r})"
    return f"{shlex.join(['python', '-c', code])} && {command(config, 'doctor', drafter=place)}"
