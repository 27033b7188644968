"""What a training run tells about itself: at its start where and on what it trains, at its end what came out of it."""

import shlex
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import ReinforceConfig, SupervisedConfig
from .files import whole
from .metrics import read_metrics

CURVE = "training.png"
_SHOWN = {  # panel of the curve -> keys of the metrics, in training and held out; as far as a run has them
    "loss": {"loss": "", "eval_loss": "held-out ", "heldout_loss": "held-out "},
    "acceptance length": {"acceptance_length": "", "eval_acceptance_length": "held-out "},
    "reward": {"reward": ""},
}
# options about the texts that are the same in the next stage
_CARRIED = ("split", "limit", "max_length", "drop_long", "skip_bad_rows", "eval_data", "dtype")


def begun(trainer: Any, target: nn.Module, held_out: Sized) -> str:
    """The first lines of a run of either stage, which a :class:`ppow.training.loop.Trainer` is about to begin."""
    ours, config = trainer.accelerator, trainer.config
    whole, learned = (sum(p.numel() for p in part) for part in (trainer.drafter.parameters(), trainer.parameters))
    lines = [
        f"{device(ours.device)}, {ours.num_processes} process{'es' * (ours.num_processes > 1)}, {config.dtype}, "
        f"seed {config.seed}",
        f"target {config.target}: {millions(sum(p.numel() for p in target.parameters()))} parameters",
        f"drafter: {millions(whole)} parameters, {millions(learned)} of them learn",
        rows(config.data, trainer.examples),
        *([rows(config.eval_data, held_out, "held out")] if config.eval_data else []),
        f"steps {trainer.first_step + 1} to {config.steps} of {trainer.micro_steps * config.batch_size} texts, into "
        f"{trainer.folder}"
        if trainer.first_step < config.steps
        else f"all {config.steps} steps are done, in {trainer.folder}",
    ]
    return "\n".join(lines)


def device(found: torch.device) -> str:
    """A torch device, in words."""
    if found.type != "cuda":
        return f"{found.type}, {torch.get_num_threads()} threads"
    return f"{found} ({torch.cuda.get_device_name(found)})"


def millions(count: int) -> str:
    """A number of parameters, to three digits: ``1.24M``."""
    return f"{count / 1e6:.3g}M"


def rows(source: str, examples: Sized, title: str = "data") -> str:
    """``data chats.jsonl: 90 texts kept, 10 dropped (7: fewer than 9 tokens; 3: ...)``; a row gives one or several."""
    dropped = getattr(examples, "dropped", {})
    why = "; ".join(f"{count}: {reason}" for reason, count in dropped.items())
    return f"{title} {source}: {len(examples)} texts kept, {sum(dropped.values())} dropped{f' ({why})' if why else ''}"


def ended(config: SupervisedConfig | ReinforceConfig, folder: Path, longest: int | None = None) -> str:
    """The last lines of a run of either stage; draws its curve, too. ``longest``: a block drafter's window."""
    log = folder / "metrics.jsonl"
    lines = read_metrics(log)
    return "\n".join(
        [
            f"The drafter is in {folder}, its checkpoints in {folder / 'checkpoints'}.",
            *([figures(lines)] if lines else []),
            draw(lines, folder / CURVE, log),
            f"Next: {next_command(config, longest)}",
        ]
    )


def figures(lines: list[dict]) -> str:
    """First and last value of what a run measured: ``steps 1 to 500: loss 5.21 to 2.09, ...``."""
    found = []
    for title, keys in _SHOWN.items():
        for key, kind in keys.items():
            values = [line[key] for line in lines if line.get(key) is not None]
            if values:
                found.append(f"{kind}{title} {values[0]:.3f} to {values[-1]:.3f}")
    return f"steps {lines[0]['step']} to {lines[-1]['step']}: {', '.join(found)}"


def next_command(config: SupervisedConfig | ReinforceConfig, longest: int | None = None) -> str:
    """What follows a stage: stage 2, or measuring.

    Args:
        longest: a block drafter's window. It costs the same however many tokens are accepted; they are its reward.
    """
    place = config.output_dir.rstrip("/")
    pair = ["--target", config.target, "--drafter", place]
    if isinstance(config, ReinforceConfig):
        command = ["ppow", "evaluate", *pair, "--baseline", config.drafter, "--output-dir", f"{place}-figures"]
        return shlex.join(command)
    command = ["ppow", "reinforce", *pair]
    defaults = {name: field.default for name, field in type(config).__dataclass_fields__.items()}
    for name in ("data", *_CARRIED):
        value = getattr(config, name, None)
        if value not in (None, defaults.get(name)):
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    if longest is not None:
        command += ["--window-size", str(longest), "--cost-ratio", "0"]
    return shlex.join([*command, "--output-dir", f"{place}-ppow"])


def draw(lines: list[dict], path: Path, log: Path) -> str:
    """Draw the curves of a run, the ``lines`` of its ``log``, into a PNG file: -> a line about it.

    Whatever goes wrong, the run has ended well.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"Without matplotlib there is no {path.name}; pip install matplotlib, and the next run draws it."
    there = {key for line in lines for key, value in line.items() if value is not None}
    panels = {title: {key: kind for key, kind in keys.items() if key in there} for title, keys in _SHOWN.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    if not panels:
        return f"No step was logged, so there is no {path.name}."
    try:
        figure = Figure(figsize=(7, 2.4 * len(panels)), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items()):
            for key, kind in keys.items():
                points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
                axes.plot(*zip(*points), marker="o" if kind else None, label=f"{kind}{title}")
            axes.set(ylabel=title, xlabel="step" if title == list(panels)[-1] else "")
            axes.grid(alpha=0.3)
            axes.legend()
        with whole(path) as partial:
            figure.savefig(partial, format="png", dpi=120)
    except Exception as error:  # a picture is never worth a run's exit status
        return f"The curve {path} was not drawn: {error}"
    return f"The figures of every step are in {log}, their curve in {path}."
