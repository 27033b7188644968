"""What a road will take, part by part, before it is gone: ``ppow train --plan``, and the times that it tells.

Memory and least time of both stages are those of :mod:`ppow.training.plan`; those of writing count the target's weights
and the keys and values of what is written (:meth:`ppow.training.recipes.Choices.writing`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from . import plan
from .config import EvaluateConfig, TrainConfig
from .loading import named
from .recipes import EVALUATED, PARTS, TEMPLATE, Choices, held_out_of, mixed_of, parts_of
from .writers import ROWS


def show(config: TrainConfig, target: PreTrainedConfig) -> None:
    """Print what every part takes on ``config.plan``: memory, a bound on the time, whether it fits."""
    here = config.plan == "here"
    device = plan.this_device() if here else plan.DEVICES[str(config.plan)]
    with named("target", config.target):
        choices = Choices(config, target, device, not here or torch.cuda.is_available())
    decided, recipe = choices.all(), choices.recipe
    for name, steps in (("supervised", recipe.steps), ("reinforce", recipe.reinforce_steps)):
        decided[name].setdefault("steps", steps)
    count = decided["prompts"].get("count", recipe.prompts)
    limit = decided["evaluate"].get("limit", EVALUATED)
    rows = list(planned(choices, decided, count, limit))
    available, budget = device.memory / plan.GIB, config.seconds()
    print(f"`ppow train` with {config.target} on {device.name}, {available:.0f} GiB, in {choices.dtype}:")
    form = "{:<32}{:>10}{:>12}{:>26}{:>10}  {}"
    print(form.format("part", "memory", "at least", "likely" * choices.cuda, "given" * bool(budget), "what").rstrip())
    least, low, high = (sum(column) for column in zip(*(row.seconds for row in rows)))
    for row in rows:
        share = PARTS[row.part].share / sum(part.share for part in parts_of(decided).values())
        given = duration(budget * share) if budget else ""
        likely = between(*row.seconds[1:]) if choices.cuda else ""
        what = row.what + "  DOES NOT FIT" * (row.memory > available)
        print(
            form.format(PARTS[row.part].title, f"{row.memory:.1f} GiB", duration(row.seconds[0]), likely, given, what)
        )
    most, likely = max(row.memory for row in rows), between(low, high) if choices.cuda else ""
    print(
        form.format("together", f"{most:.1f} GiB", duration(least), likely, budget and config.budget or "", "").rstrip()
    )
    print("Memory is what a part takes at most, the time what it takes at least by the device's products and memory.")
    if choices.cuda:
        print(
            f"Likely: steps of both stages with an 8B target took {plan.MEASURED[0]} to {plan.MEASURED[1]} times their "
            f"least, and a token of stock generate() {plan.EAGER * 1e3:.3g} ms a layer, when they were measured."
        )
    if budget:
        print("With a budget the counts are decided on the way, by timing a few; these are what would be done without.")
    if most > available:
        hint = f"; or {recipe.hint}" if recipe.hint else ""
        print(f"This does not fit. Give the stage a smaller max_length, or --dtype bfloat16{hint}.")


class Planned(NamedTuple):
    """What a part takes.

    Attributes:
        part: of ``PARTS``.
        memory: GiB at most.
        seconds: at least; likely, from and to.
        what: it does, in words.
    """

    part: str
    memory: float
    seconds: tuple[float, float, float]
    what: str


def planned(choices: Choices, decided: dict, count: int, limit: int) -> Iterator[Planned]:
    """Every part that takes time."""
    held = held_out_of(count)

    def written(part: str, options: dict, rows: int, given: int, what: str) -> Planned:
        options = {**options, "batch_size": min(options["batch_size"], rows)}
        calls = -(-rows // options["batch_size"])
        memory, seconds = choices.writing(options, given)
        eager = max(seconds, options["max_new_tokens"] * choices.shape.layers * plan.EAGER)
        return Planned(part, memory / plan.GIB, (calls * seconds, calls * eager, calls * eager), what)

    if choices.config.data is None:
        options = {"batch_size": 32, **decided["prompts"]}
        what = f"{count + held} of up to {options['max_new_tokens']} tokens, {options['batch_size']} at once"
        yield written("prompts", options, count + held, TEMPLATE, what)
    answered = {"answers": count, "heldout": held, "mixed": mixed_of(count, decided["reinforce"])}
    for name, rows in answered.items():
        if name not in parts_of(decided):
            continue
        options = {"batch_size": ROWS["cpu"], **decided["regenerate"]}
        if "endpoint" in options:
            yield Planned(name, 0.0, (0.0, 0.0, 0.0), f"{rows} by {options['endpoint']}")
            continue
        what = f"{rows} of up to {options['max_new_tokens']} tokens, {min(rows, options['batch_size'])} at once"
        yield written(name, options, rows, choices.given, what)
    for name in ("supervised", "reinforce"):
        options = decided[name]
        found = choices.step(name, options, decided["supervised"])
        least = options["steps"] * max(found["seconds"].values())
        texts = options["batch_size"] * options["accumulation"]
        what = f"{options['steps']} steps of {texts} texts of up to {options['max_length']} tokens"
        what += f", {options['batch_size']} at once" if options["accumulation"] > 1 else ""
        low, high = plan.MEASURED
        yield Planned(name, found["memory_gib"]["total"], (least, low * least, high * least), what)
    config = EvaluateConfig.from_dict(dict.fromkeys(("target", "drafter", "output_dir"), "-") | decided["evaluate"])
    prompts = min(limit, held)
    # of each prompt the plain target's answer, and at temperature 0 one without drafts; drafting takes less than either
    answers = prompts * (len(config.temperatures) + config.reference * (0.0 in config.temperatures))
    options = {"batch_size": 1, "dtype": config.dtype, "max_new_tokens": config.max_new_tokens}
    rest = written("evaluate", options, 1, choices.given, f"{prompts} held-out prompts, both stages")
    least, low, high = rest.seconds
    yield rest._replace(seconds=(answers * least, answers * low, 2 * answers * high))


def between(low: float, high: float) -> str:
    """``2 h 05 min to 3 h 10 min``, or one of them where both read the same."""
    return " to ".join(dict.fromkeys((duration(low), duration(high))))


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``12 min``, ``40 s``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
