"""What ``ppow train`` chooses where its options say nothing: a table by the target's size, and the device's memory.

Every figure says where it comes from. "measured" is by us, on SmolLM2-135M-Instruct (0.13B, 576 wide; 20,000 of its own
greedy answers, texts of up to 448 tokens, 64 a step, draft vocabulary 16,384, 2e-3, one H200, 85 s of training). The
acceptance length of its chains of 7 was then 2.18 with AdamW, 3.02 with Muon, 3.47 with AdamW and EAGLE-3.1's two
norms, and 3.74 with both. Rates and windows: benchmarks/results/smollm2-stage1-options.json, 45 s of one H200; over all
windows at 2e-3, half of them gain 0.16 [0.14, 0.18] at temperature 0, and 4e-3 gains 0.18 [0.16, 0.21]. A run of
390 s took 100 windows at 3e-3 (smollm2-eagle3-390s.json). "published" is others' and not measured by us. "ours" is a
choice between such points.
"""

import math
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ppow import PPOWConfig
from ppow.triton_ppow import HAS_TRITON

from . import plan
from .arguments import Config
from .config import EvaluateConfig, PromptsConfig, RegenerateConfig, ReinforceConfig, SupervisedConfig, TrainConfig
from .loading import positions
from .preparation import fresh_config


class Recipe(NamedTuple):
    """A row of the table.

    Attributes:
        below: parameters of a target, in billions, that the row is for.
        prompts: to train on.
        answer: tokens of an answer, at most.
        length: tokens of a text, prompt and answer, that are learned from.
        texts: of an optimizer step.
        draft_vocabulary: tokens that the drafter can draft, where the target knows more.
        steps, reinforce_steps: of stage 1 and stage 2.
        windows: of a text that a step of stage 1 learns from; None: all.
        hint: where the target's size asks for more than one GPU.
    """

    below: float
    prompts: int
    answer: int
    length: int
    texts: int
    draft_vocabulary: int
    steps: int
    reinforce_steps: int
    windows: int | None = None
    hint: str = ""


_SPREAD = "spread it: `accelerate launch -m ppow.training.cli supervised --shard-target ...`, likewise reinforce"
RECIPES = (
    # measured, but for the steps: ours (with 128 texts a step acceptance still rose at 1,700), and stage 2's default
    Recipe(0.3, 20_000, 256, 448, 64, 16_384, 3_000, 500, windows=100),
    # ours: as measured, with a little more room for the texts
    Recipe(2.0, 30_000, 256, 512, 64, 16_384, 4_000, 500, windows=100),
    # ours: half-way to the next row; a draft vocabulary of 32,000 is EAGLE-3's (published)
    Recipe(5.0, 40_000, 384, 1_024, 32, 32_000, 6_000, 500),
    # the draft vocabulary and texts of 2,048 tokens are EAGLE-3's (published), which learned from ShareGPT and
    # UltraChat-200k; a tenth of that many texts in what one GPU writes and reads in a working day (ours)
    Recipe(15.0, 60_000, 512, 2_048, 16, 32_000, 10_000, 500),
    # ours: the same; in bfloat16 a target of 32B leaves no room for the texts on a GPU of 80 GB
    Recipe(math.inf, 60_000, 512, 2_048, 16, 32_000, 10_000, 500, hint=_SPREAD),
)
# A stage's peak learning rate falls with the target's width w, on the line (in logarithms) through two points. Stage 1:
# measured 3e-3 at 576 and published 1e-4 at 4,096 (EAGLE-3 trainers at 8B, AdamW; our Muon takes AdamW's rate, see
# optimizers). At 256 the line gives 1.2e-2; the 14M pair did best with 6e-3 (measured, AdamW), the most that is taken.
# Stage 2: measured 3e-4 at 576, where higher rates lose what the mean of stage 1's weights had gained
# (benchmarks/results/objectives-smollm2.json), and 5e-5 at 4,096 (the paper's preset).
_RATES = {"supervised": ((576, 3e-3), (4096, 1e-4)), "reinforce": ((576, 3e-4), (4096, 5e-5))}
_HIGHEST = 6e-3
_PROMPT = 256  # tokens of a prompt that the target writes: the default of `ppow prompts`
TEMPLATE = 64  # tokens that a chat template puts around it, with a system message
_WARMUP = 50  # of the 14M pair's stage 1; never more than a twentieth of the steps
EVALUATED = 60  # prompts of the final figures, as on docs/results.md
# share of a device's memory that a plan may take: its figures are bounds of tensors, without the allocator's waste
_USED = {"cuda": 0.9, "cpu": 0.5}
_AT_ONCE = 1024  # texts that one call of generate writes, at most, on a GPU; on a CPU the commands' own defaults


def recipe_of(parameters: float) -> Recipe:
    """The row for a target of so many parameters."""
    return next(recipe for recipe in RECIPES if parameters < recipe.below * 1e9)


def rate_for(width: int, stage: str = "supervised") -> float:
    """A stage's peak learning rate for a target of hidden size ``width``, to two digits."""
    (narrow, high), (wide, low) = _RATES[stage]
    slope = math.log(high / low) / math.log(wide / narrow)
    return float(f"{min(_HIGHEST, high * (narrow / width) ** slope):.2g}")


def held_out_of(rows: int) -> int:
    """How many of all rows are set aside: a twentieth, at least 1 and at most 200."""
    return min(200, max(1, rows // 20))


class Part(NamedTuple):
    """A part of the road.

    Attributes:
        title: what it makes, in words.
        share: of the time that a budget gives.
        results: files that are there when it is done.
    """

    title: str
    share: float
    results: tuple[str, ...]


# The shares (ours): stage 1 decides what a drafter is worth (docs/results.md, "Stage 1 matters most"), so it has nearly
# half. The texts for it have a fifth, and their prompts, which are shorter, a quarter of that. Stage 2 gains a few
# percent. The figures need some sixty prompts to tell the two apart.
PARTS = {
    "prompts": Part("prompts", 0.06, ("prompts.jsonl", "heldout.jsonl")),
    "answers": Part("answers", 0.21, ("answers.jsonl",)),
    "heldout": Part("answers to the held-out prompts", 0.02, ("heldout-answers.jsonl",)),
    "mixed": Part("answers for stage 2, half sampled", 0.05, ("mixed-answers.jsonl",)),
    "supervised": Part("stage 1, supervised", 0.44, ("stage1/config.json",)),
    "reinforce": Part("stage 2, PPOW", 0.14, ("stage2/config.json",)),
    "evaluate": Part("figures", 0.08, ("figures/metrics.json",)),
    "repository": Part("the drafter's repository", 0.0, ("drafter/README.md",)),
}


# Stage 2 on greedy answers alone loses at temperature 1; half of them sampled, it gained there and lost nothing at 0
# (measured, benchmarks/results/objectives-smollm2-mixed.json and -mixed-again.json). Stage 1 keeps greedy ones: sampled
# ones there cost more at 0
MIXED = {"temperature": 1.0, "greedy_share": 0.5}


def parts_of(decided: dict) -> dict[str, Part]:
    """The parts of a run, by what was decided for it: stage 2 has answers of its own where it says how to choose them.

    A run of an earlier version has none.
    """
    return {name: part for name, part in PARTS.items() if name != "mixed" or name in decided}


def mixed_of(rows: int, options: dict) -> int:
    """How many of all prompts are answered for stage 2: what its steps take, at most all.

    Never less than two steps take, since answers that are too short to learn from are lost.
    """
    return min(rows, max(2, options["steps"]) * options["batch_size"] * options["accumulation"])


class Choices:
    """What the commands of a road are given beside names and places, for one target on one device.

    Args:
        config: its options, which come before what is chosen here.
        target: the target's configuration.
        device: its ceilings.
        cuda: whether it is a GPU.
    """

    def __init__(self, config: TrainConfig, target: PreTrainedConfig, device: plan.Device, cuda: bool):
        text = target.get_text_config(decoder=True)
        self.config, self.target, self.device, self.cuda = config, target, device, cuda
        self.dtype = config.dtype or ("bfloat16" if cuda else "float32")
        self.shape = plan.Shape(target, PPOWConfig.from_target(target))
        self.recipe = recipe = recipe_of(self.shape.target_parameters)
        self.given = recipe.length if config.data else _PROMPT + TEMPLATE  # tokens of a prompt, at most
        answer = config.regenerate.get("max_new_tokens", recipe.answer)
        length = min(recipe.length, self.given + answer, positions(target) or recipe.length)
        width = text.hidden_size
        shared: dict[str, Any] = {"dtype": self.dtype, "max_length": length, "drop_long": True}
        if config.architecture == "block" and cuda and HAS_TRITON:
            shared["compile_loss"] = True  # a step of stage 1 took 0.20 s instead of 0.31 (measured at 0.13B)
        first = {"architecture": config.architecture, "optimizer": _optimizer(), "learning_rate": rate_for(width)}
        if config.architecture == "eagle3":
            first |= {"norm_before_fc": True, "norm_output": True}
            if config.supervised.get("hidden_size") in (None, text.hidden_size):
                first["share_embeddings"] = True  # a copy of it would not be trained, and a repository is half as large
            if text.vocab_size > recipe.draft_vocabulary:
                first["draft_vocab_size"] = recipe.draft_vocabulary
            if recipe.windows:
                first["anchors"] = recipe.windows
        second = {} if "preset" in config.reinforce else {"learning_rate": rate_for(width, "reinforce")}
        self.stages = {"supervised": shared | first, "reinforce": shared | second}
        if (longest := self.drafter(self.stages["supervised"] | config.supervised).longest_window) is not None:
            # a block costs the same however much of it is accepted, so its reward is that count
            self.stages["reinforce"] |= {"window_size": longest, "cost_ratio": 0.0}

    def all(self) -> dict[str, dict[str, Any]]:
        """Options by command, those of ``config`` among them; steps and counts only where no budget decides them."""
        config, recipe = self.config, self.recipe
        found: dict[str, dict[str, Any]] = {
            "prompts": {"max_new_tokens": _PROMPT, "dtype": self.dtype, "openings": config.openings},
            "regenerate": {"max_new_tokens": recipe.answer, "dtype": self.dtype} | config.regenerate,
            "mixed": {} if MIXED.keys() & config.regenerate.keys() else dict(MIXED),  # {}: stage 2 has those of stage 1
            "supervised": self.stages["supervised"] | config.supervised,
            "reinforce": self.stages["reinforce"] | config.reinforce,
            "evaluate": {"dtype": self.dtype} | config.evaluate,
        }
        found = {name: {k: v for k, v in own.items() if v is not None} for name, own in found.items() if own}
        for name in ("prompts", "regenerate"):
            if self.cuda and "endpoint" not in found[name]:
                most = found[name]["max_new_tokens"] + (self.given if name == "regenerate" else TEMPLATE)
                found[name].setdefault("batch_size", self._at_once(most))
        for name in ("supervised", "reinforce"):
            found[name].setdefault("batch_size", self._micro_batch(name, found[name]))
            found[name].setdefault("accumulation", max(1, recipe.texts // found[name]["batch_size"]))
        if config.budget is None:
            found["supervised"].setdefault("steps", recipe.steps)
            found["reinforce"].setdefault("steps", recipe.reinforce_steps)
            found["evaluate"].setdefault("limit", EVALUATED)
        if config.prompts or (config.budget is None and config.data is None):
            found["prompts"]["count"] = config.prompts or recipe.prompts
        for name in ("supervised", "reinforce"):
            complete(found[name])
        return found

    def most(self) -> float:
        """Bytes of the device's memory that may be taken."""
        return self.device.memory * _USED["cuda" if self.cuda else "cpu"]

    def stage(self, name: str, options: dict) -> SupervisedConfig | ReinforceConfig:
        """A stage with these options, its names left open: for a plan."""
        names = dict.fromkeys(("target", "drafter", "data", "output_dir"), "-")
        if name == "reinforce":
            return ReinforceConfig.from_dict(names | options)
        del names["drafter"]
        return SupervisedConfig.from_dict(names | options)

    def drafter(self, options: dict) -> PPOWConfig:
        """Of the drafter that stage 1 makes with these options."""
        config = self.stage("supervised", options)
        assert isinstance(config, SupervisedConfig)
        return fresh_config(config, self.target)

    def step(self, name: str, options: dict, supervised: dict) -> dict[str, Any]:
        """The plan of a stage's step: :func:`ppow.training.plan.plan`."""
        return plan.plan(self.stage(name, options), self.target, self.drafter(supervised), self.device)

    def writing(self, options: dict, given: int) -> tuple[float, float]:
        """Of one call of ``generate`` that writes answers: bytes at most, seconds at least.

        Args:
            options: of the command.
            given: tokens of a prompt.
        """
        shape, size = self.shape, options.get("batch_size", 1)
        number = 2 if options["dtype"] == "bfloat16" else 4
        weights, new = shape.target_parameters * number, options["max_new_tokens"]
        memory = weights + size * ((given + new) * self._kept(number) + shape.vocabulary * (number + 8))
        moved = weights + size * (given + new / 2) * self._kept(number)  # for every token
        products = 2 * size * (shape.target_used + shape.vocabulary * shape.hidden)
        return memory, new * max(moved / self.device.bandwidth, products / self.device.rate[options["dtype"]])

    def _kept(self, number: int) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim * number

    def _at_once(self, tokens: int) -> int:
        """How many texts of so many tokens a call of ``generate`` writes: what takes two thirds of the room."""
        number = 2 if self.dtype == "bfloat16" else 4
        row = tokens * self._kept(number) + self.shape.vocabulary * (number + 8)
        room = (self.most() - self.shape.target_parameters * number) * 2 / 3 / row
        return _power(min(_AT_ONCE, room))

    def _micro_batch(self, name: str, options: dict) -> int:
        """The most texts of an optimizer step that fit at once; 1 where not even one does."""
        size, supervised = self.recipe.texts, self.stages["supervised"] | self.config.supervised
        while size > 1:
            memory = self.step(name, {**options, "batch_size": size, "steps": 10**9}, supervised)["memory_gib"]
            if memory["total"] * plan.GIB <= self.most():
                break
            size //= 2
        return size


def complete(options: dict) -> None:
    """Set of a stage's options those that follow from its steps, once these are known."""
    if "steps" in options:
        steps = options["steps"]
        options.setdefault("warmup_steps", min(_WARMUP, steps // 20))
        options.setdefault("eval_every", max(1, steps // EVALUATIONS))


EVALUATIONS = 5  # on the held-out answers, along a stage
KINDS: dict[str, type[Config]] = {
    "prompts": PromptsConfig,
    "regenerate": RegenerateConfig,
    "supervised": SupervisedConfig,
    "reinforce": ReinforceConfig,
    "evaluate": EvaluateConfig,
}


def _optimizer() -> str:
    """Muon, where torch has it: measured at 0.13B; at 8B the default of speculators (published)."""
    import torch

    return "muon" if hasattr(torch.optim, "Muon") else "adamw"


def _power(number: float) -> int:
    """The largest power of two that is not above ``number``; at least 1."""
    return 1 << max(0, int(number).bit_length() - 1)
