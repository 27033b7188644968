"""The ``ppow`` command: ``ppow COMMAND --key value ...``, one command per stage of the pipeline.

A command's module (and with it torch) is imported when the command runs, so ``ppow --help`` answers at once.
Several processes: ``accelerate launch -m ppow.training.cli COMMAND ...``.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from safetensors import SafetensorError

from .stopping import AGAIN, STATUS, Stopped, ended_by_sigterm


class Command(NamedTuple):
    """A command of ``ppow``: where it is, and its line of ``ppow --help``."""

    module: str  # has main(config)
    config: str  # a class of .config
    help: str


COMMANDS = {
    "train": Command(".train", "TrainConfig", "train a drafter with one command, from prompts to its card"),
    "prompts": Command(".own_prompts", "PromptsConfig", "let the target write prompts, where you have no chats"),
    "regenerate": Command(".regenerate", "RegenerateConfig", "let the target write the answers of a data set"),
    "supervised": Command(
        ".supervised", "SupervisedConfig", "stage 1: train an EAGLE-3 drafter on the target's answers"
    ),
    "reinforce": Command(
        ".reinforce", "ReinforceConfig", "stage 2: train it on so that more drafts are accepted (PPOW)"
    ),
    "evaluate": Command(".evaluate", "EvaluateConfig", "measure acceptance length and speedup"),
    "doctor": Command(".doctor", "DoctorConfig", "find why a drafter accepts less than it should"),
    "push": Command(".push", "PushConfig", "push a drafter, its card and its figures to the Hub"),
    "import": Command(".convert", "ImportConfig", "run another trainer's EAGLE-3 drafter in transformers"),
    "export": Command(".convert", "ExportConfig", "write a drafter for vLLM, SGLang and others"),
    "demo": Command(".demo", "DemoConfig", "answer prompts with and without a drafter, and compare"),
    "space": Command(".space", "SpaceConfig", "serve a page on which both race, token by token"),
}


RESUMING = ("train", "prompts", "regenerate", "supervised", "reinforce", "evaluate")


def usage() -> str:
    """The page that ``ppow --help`` prints."""
    lines = ["usage: ppow COMMAND [--key value ...]", "", "commands:"]
    lines += [f"  {name:<12}{command.help}" for name, command in COMMANDS.items()]
    lines += ["", "ppow COMMAND --help lists the options of a command; PPOW_DEBUG=1 shows tracebacks."]
    return "\n".join(lines)


def run(argv: list[str]) -> None:
    """Run one command. Raises ValueError for bad arguments and whatever the command itself raises."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] == "--version":
        from ppow import __version__

        print(f"ppow {__version__}")
        return
    name, *rest = argv
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no command {name!r}; the nearest is {nearest!r} (ppow --help lists all).")
    command = COMMANDS[name]
    config_class = getattr(importlib.import_module(".config", __package__), command.config)
    config = config_class.from_args(rest)
    importlib.import_module(command.module, __package__).main(config)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, as :func:`guarded` gives it."""
    given = sys.argv[1:] if argv is None else argv
    resumes = bool(given) and given[0] in RESUMING
    return guarded(lambda: run(given), f"`ppow {given[0]}` goes on with --resume" if resumes else AGAIN)


def guarded(action: Callable[[], object], again: str = AGAIN) -> int:
    """Do what a command does, and tell in a line what stopped it.

    Args:
        action: reads its arguments, too.
        again: how to go on after an interruption, in words.

    Returns:
        0; 2 after a bad argument, bad input or a failed file operation; 130 when interrupted, 143 after SIGTERM.
    """
    try:
        with ended_by_sigterm(again):
            action()
    except Stopped as stopped:
        if stopped.told:
            print(f"\nppow: {stopped.told}", file=sys.stderr)
        return STATUS
    except (ValueError, OSError, SafetensorError, KeyboardInterrupt) as error:
        if os.environ.get("PPOW_DEBUG") == "1":
            raise
        if isinstance(error, KeyboardInterrupt):
            print(f"\nppow: interrupted; {again}", file=sys.stderr)
            return 130
        told = f"safetensors could not read or write: {error}" if isinstance(error, SafetensorError) else error
        print(f"ppow: error: {told}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
