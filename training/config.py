"""The options of every command, one frozen dataclass each.

"paper" marks a default that the PPOW paper (arXiv 2605.14978) gives; "ours" marks one that it leaves open. No torch
import here: the command line reads this file before it starts anything heavy.
"""

import dataclasses
import random
import re
from typing import Literal

from .arguments import Config, option

_ROWS = (
    "a file (.jsonl, .json, .csv, .tsv or .parquet, also compressed), a folder of such files, or the id of a data set "
    "on the Hub; a row holds messages (role, content), conversations (from, value), prompt and completion, instruction "
    "and output, or text. All forms: docs/data.md"
)
SKIP_BAD_ROWS = "skip rows that cannot be used, and report them; without it the first bad row is an error"
_TARGET = "the large model whose output is kept: Hub id, folder or GGUF file"
_NAMED = "benchmarks by name (mt_bench, humaneval, gsm8k, mbpp) or files of rows"
_PROMPTS_DIR = "folder with the files of the named benchmarks; none: they come from the Hub"
_PLAN = "print memory and time for this device, then stop; nothing is loaded"
_ARCHITECTURE = "a new drafter computes a window token by token (eagle3) or in one forward (block, as DFlash)"
_OPENINGS = (
    'JSONL file of how prompts begin, rows of "system" (a message that sets the subject) and "user" (first words), '
    "which take turns; none: those of training/openings.py"
)
_WINDOW = "draft chains of this many tokens; none: as the drafter was made"
_THREADS = "CPU threads; none: torch decides"
_DTYPE = "number format of the target's and drafter's weights; bfloat16 on a GPU"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(Config):
    """What stages 1 and 2 share."""

    target: str = option(_TARGET, group="basics")
    data: str = option(f"chats or texts to learn from: {_ROWS}")
    output_dir: str = option(
        "folder to write: the drafter, checkpoints/, metrics.jsonl, the curve training.png, provenance.json"
    )
    steps: int = option("optimizer steps", 1000, at_least=1)
    batch_size: int = option("texts that are computed at once, in each process", 1, at_least=1)
    learning_rate: float = option("highest learning rate, after the warm-up", 1e-4, above=0)
    eval_data: str | None = option("chats to measure on during training, in the same forms as data", None)
    seed: int = option("random seed", 0, at_least=0)
    resume: bool = option("continue from the latest complete checkpoint in output_dir", False)
    plan: Literal["here", "a100", "h100", "h200"] | None = option(_PLAN, None)
    push_to_hub: str | None = option("push each checkpoint and the drafter to this Hub repository (ORG/NAME)", None)

    split: str = option("split of a Hub data set", "train", group="data")
    limit: int | None = option("use at most this many rows", None, at_least=1)
    max_length: int = option(
        "cut each text after this many tokens; never more than the target can read", 2048, at_least=8
    )
    drop_long: bool = option("drop rows whose answer starts after max_length; without it such a row is an error", False)
    skip_bad_rows: bool = option(SKIP_BAD_ROWS, False)

    anchors: int | None = option(
        "windows of each text that a step learns from, drawn at random; none: all, of a block drafter 64 (ours)",
        None,
        at_least=1,
        group="method",
    )
    warmup_steps: int = option("steps in which the learning rate rises to its highest value", 0, at_least=0)
    average_from: float = option(
        "the drafter is the mean of its weights over the steps after this share of the run, and the learning rate "
        "stays constant; 1: no averaging, and the rate falls to 0 (ours)",
        0.5,
        at_least=0,
        at_most=1,
    )
    max_grad_norm: float = option("scale larger gradients down to this norm", 1.0, above=0)
    optimizer: Literal["adamw", "muon"] = option("muon: Muon for the matrices, AdamW for the rest", "adamw")

    accumulation: int = option("batches of batch_size that make one optimizer step", 1, at_least=1, group="resources")
    dtype: Literal["float32", "bfloat16"] = option(
        "number format of the target and of the drafter's forward pass; bfloat16 on a GPU", "float32"
    )
    shard_target: bool = option(
        "split the target's weights over the GPUs (FSDP), where one GPU cannot hold them", False
    )
    compile_loss: bool = option("on a GPU, compile the loss of a block drafter or of stage 2: faster steps", False)
    save_every: int = option("steps between checkpoints", 200, at_least=1)
    keep_last: int = option("newest checkpoints to keep", 2, at_least=1)
    eval_every: int = option("steps between measurements on eval_data", 200, at_least=1)
    log_every: int = option("steps between lines of metrics.jsonl", 10, at_least=1)
    trackers: list[str] = option("also log to these trackers, e.g. tensorboard,wandb", [])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be smaller than steps={self.steps}: the peak is never reached."
            )

    def windows_of(self, block: bool) -> int | None:
        """Windows drawn from each text in a step, of a block drafter or another; None: all of them."""
        return self.anchors or (BLOCKS if block else None)


BLOCKS = 64  # windows of a text in a step of a block drafter (ours)
# What shapes drafters of one architecture alone.
BLOCK_SHAPE = ["block_size", "predict_from_anchor", "mask_token_id", "markov_rank", "confidence_head"]
_NOT_OF_BLOCKS = ["hidden_size", "share_head", "norm_before_fc", "norm_output", "ttt_steps"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig(StageConfig):
    """Stage 1: train a drafter to predict the target's own answers (supervised)."""

    drafter: str | None = option(
        "continue from this drafter (Hub id or folder) instead of a new one", None, group="basics"
    )
    architecture: Literal["eagle3", "block"] = option(_ARCHITECTURE, "eagle3")
    ttt_steps: int = option(
        "draft steps in a row that are trained, each on the output of the one before (EAGLE-3: 7)",
        7,
        at_least=1,
        group="method",
    )
    step_weight: float = option(
        "the loss of draft step or slot i counts step_weight ** i, i from 0 (EAGLE-3: 0.8; DFlash: 0.78 to 0.87)",
        0.8,
        above=0,
        at_most=1,
    )
    block_loss: Literal["ce", "kl", "d_pace", "dspark"] = option(
        "what a block drafter learns: the text's tokens (ce), the same weighted by what depends on them (d_pace), the "
        "target's distribution (kl), or both, the latter by how much of it is accepted (dspark)",
        "dspark",
    )

    draft_vocab_size: int | None = option(
        "the drafter can propose only this many tokens, the most frequent ones; none: all",
        None,
        at_least=1,
        group="shape of a new drafter",
    )
    num_layers: int | None = option("decoder layers; none: 1, of a block drafter 3", None, at_least=1)
    taps: list[int] | None = option(
        "hidden states of the target that the drafter reads, by index; none: EAGLE-3's three, of a block drafter "
        "DFlash's five",
        None,
        at_least=0,
    )
    hidden_size: int | None = option("width; none: the target's", None, at_least=1)
    intermediate_size: int | None = option("width of its MLPs; none: the target's", None, at_least=1)
    num_attention_heads: int | None = option("its attention heads; none: the target's", None, at_least=1)
    num_key_value_heads: int | None = option("its key-value heads; none: the target's", None, at_least=1)
    norm_before_fc: bool = option(
        "normalise the hidden states that are read, before they are combined (EAGLE-3.1)", False
    )
    norm_output: bool = option("feed normalised features into the next draft step (EAGLE-3.1)", False)
    qk_norm: bool = option("normalise queries and keys, as Qwen3 does", False)
    share_embeddings: bool = option(
        "use the target's embeddings instead of a copy of them; needs the target's width", False
    )
    share_head: bool = option(
        "use the target's embeddings, and its head instead of one that is trained: a drafter of the same size can have "
        "more tokens to draft and wider layers",
        False,
    )

    block_size: int = option(
        "rows of a block, that of the last known token among them", 10, at_least=1, group="shape of a new block drafter"
    )
    predict_from_anchor: bool = option(
        "the last known token's row predicts, too: B tokens of a block of B (DSpark), not B - 1 (DFlash)", True
    )
    mask_token_id: int | None = option(
        "token whose embedding stands for what is not known yet; none: the last one that no text holds",
        None,
        at_least=0,
    )
    markov_rank: int = option(
        "rank of the head that corrects each token by the one before it (DSpark); 0: none", 64, at_least=0
    )
    confidence_head: bool = option("also learn how likely each token is accepted, to end windows early", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_architecture()
        if self.drafter is None:
            return
        shape = ["draft_vocab_size", "num_layers", "taps", "hidden_size", "intermediate_size", "num_attention_heads"]
        fresh = {field.name: field.default for field in dataclasses.fields(self)}
        shape += ["num_key_value_heads", "norm_before_fc", "norm_output", "qk_norm", "share_embeddings", "share_head"]
        shape += ["architecture", *BLOCK_SHAPE]
        given = [name for name in shape if getattr(self, name) != fresh[name]]
        if given:
            raise ValueError(f"{', '.join(given)} shape a fresh drafter, but --drafter {self.drafter} has its shape.")

    def _check_architecture(self) -> None:
        fresh = {field.name: field.default for field in dataclasses.fields(self)}
        others = [*BLOCK_SHAPE, "block_loss"] if self.architecture == "eagle3" else _NOT_OF_BLOCKS
        given = [name for name in others if getattr(self, name) != fresh[name]]
        if given and self.drafter is None:
            raise ValueError(
                f"{', '.join(given)}: not for a fresh drafter of architecture {self.architecture}; leave it out, or "
                f"choose --architecture {'block' if self.architecture == 'eagle3' else 'eagle3'}."
            )


# What `ppow reinforce --preset NAME` sets where an option is not given: the best settings found for each way to learn
# (ours, docs/results.md). The first is the default.
PRESETS = {
    "ppow": {  # PPOW's expected reward in closed form, beside LK's loss
        "objective": "ppow",
        "estimator": "exact",
        "verification": "text",
        "supervised_coef": 3.0,
        "kl_coef": 0.0,
        "learning_rate": 3e-4,
        "average_from": 0.5,
    },
    "published": {  # PPOW as published
        "objective": "ppow",
        "estimator": "rollout",
        "verification": "greedy",
        "supervised_coef": 0.0,
        "kl_coef": 0.1,
        "learning_rate": 5e-5,
        "average_from": 1.0,
    },
}
_TEXTS = {**PRESETS["ppow"], "supervised_coef": 0.0}  # of the controls that learn from texts
PRESETS |= {name: {**_TEXTS, "objective": name} for name in ("cst", "lk")}
PRESETS["head"] = {**_TEXTS, "confidence_head": True, "freeze_drafter": True, "learning_rate": 3e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforceConfig(StageConfig):
    """Stage 2: train a drafter on so that more of what it drafts is accepted (PPOW, arXiv 2605.14978).

    By default: the expected PPOW reward in closed form, plus LK's loss. The paper's method: --preset published.
    """

    presets = PRESETS

    drafter: str = option("drafter to train, usually of stage 1: folder or Hub id", group="basics")
    steps: int = option("optimizer steps (ours)", 500, at_least=1)
    learning_rate: float = option("highest learning rate, after the warm-up (ours)", 3e-4, above=0)

    objective: Literal["ppow", "cst", "lk"] = option(
        "what is trained: ppow, the reward of accepted tokens; cst, stage 1's loss continued (of a block drafter "
        "--block-loss kl); lk, the chance that a draft is accepted (arXiv 2602.23881)",
        "ppow",
        group="method",
    )
    estimator: Literal["exact", "rollout"] = option(
        "how the expected reward is computed: exact, in closed form along the target's texts (ours); rollout, from "
        "sampled windows (paper)",
        "exact",
    )
    verification: Literal["text", "greedy", "sampling"] = option(
        "when a drafted token counts as accepted in training: greedy, as at temperature 0; sampling, as at temperature "
        "1; text, by how each text was written, not with rollouts (ours)",
        "text",
    )
    supervised_coef: float = option(
        "weight of a supervised loss that is added to ppow's: LK's with exact, stage 1's with rollout (ours)",
        3.0,
        at_least=0,
    )
    confidence_head: bool = option(
        "also train a small head that tells how likely each draft is accepted, to end windows early (ours)", False
    )
    freeze_drafter: bool = option(
        "with confidence_head: train it alone; drafts stay as they are, but for what --dtype rounds (ours)", False
    )
    window_size: int = option("drafted tokens of a window, K (paper)", 10, at_least=1)
    cost_ratio: float = option(
        "cost of a draft step relative to one step of the target, gamma (paper)", 0.12, at_least=0
    )
    kl_coef: float = option(
        "weight of a penalty for moving away from the target's distribution, beta (ours)", 0.0, at_least=0
    )

    group_size: int = option(
        "rollouts that are compared, all from the same place, G_roll (paper)",
        8,
        at_least=2,
        group="only with --estimator rollout",
    )
    windows_per_sequence: int = option("places in a text where rollouts begin (ours)", 8, at_least=1)
    adaptive_switch: float = option(
        "after this share of the steps, windows begin where the target is sure and the drafter differs (ADAW), before "
        "it anywhere; 1: never (ours)",
        0.5,
        at_least=0,
        at_most=1,
    )
    rollout_temperature: float = option("temperature at which rollouts are drafted (ours)", 0.5, above=0)
    proximity_bonus: float = option(
        "reward of a rejected window that is close to the target's (eta); 0: none (ours)", 0.5, at_least=0
    )
    proximity_margin: float = option(
        "how close it must be: difference of log-probabilities, in nats, epsilon (ours)", 2.0, at_least=0
    )
    updates_per_rollout: int = option("optimizer steps on the same rollouts (ours)", 1, at_least=1)
    max_forest_nodes: int = option(
        "drafted tokens that one target forward verifies at most, a bound on memory (ours)", 4096, at_least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rolls = self.objective == "ppow" and self.estimator == "rollout"
        if self.verification == "text" and rolls:
            raise ValueError(
                "estimator='rollout' verifies rollouts, and verification='text' is for texts: --preset published sets "
                "all that suits rollouts."
            )
        if self.supervised_coef and self.objective != "ppow":
            raise ValueError(
                f"supervised_coef={self.supervised_coef} adds a supervised loss to PPOW's, but objective="
                f"{self.objective} is one already; --preset {self.objective} sets it to 0."
            )
        if self.confidence_head and rolls:
            raise ValueError(
                "confidence_head learns along texts, and estimator='rollout' has none: use --estimator exact."
            )
        if self.freeze_drafter:
            if not self.confidence_head:
                raise ValueError(
                    "freeze_drafter leaves nothing to train without confidence_head: --preset head sets both."
                )
            if self.optimizer == "muon" or self.supervised_coef or self.kl_coef:
                raise ValueError(
                    f"With freeze_drafter the head alone is trained, by AdamW and its own loss, but optimizer="
                    f"{self.optimizer}, supervised_coef={self.supervised_coef}, kl_coef={self.kl_coef}: leave them out."
                )
        if rolls and self.group_size * self.window_size > self.max_forest_nodes:
            raise ValueError(
                f"max_forest_nodes={self.max_forest_nodes} does not hold one group of {self.group_size} rollouts x "
                f"{self.window_size} tokens; raise it to {self.group_size * self.window_size} or more."
            )
        first = 1 / (self.cost_ratio + 1)
        if rolls and self.proximity_bonus >= first:
            raise ValueError(
                f"proximity_bonus={self.proximity_bonus} must stay below {first:.3g}, what the first accepted token "
                "earns; otherwise a rejected window is worth more than an accepted one."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegenerateConfig(Config):
    """Let the target answer the prompts of a data set: a drafter learns best from the target's own answers."""

    data: str = option(f"chats to answer: {_ROWS}", group="basics")
    output: str = option("the .jsonl file to write")
    target: str | None = option(f"{_TARGET}; or give endpoint", None)
    resume: bool = option("continue after the rows that output already holds", False)

    endpoint: str | None = option(
        "base URL, e.g. http://localhost:8000/v1", None, group="a server that answers (OpenAI's protocol)"
    )
    model: str | None = option("the model's name on that server", None)
    concurrency: int = option("requests in flight at once", 16, at_least=1)

    split: str = option("split of a Hub data set", "train", group="data")
    limit: int | None = option("use at most this many rows", None, at_least=1)
    skip_bad_rows: bool = option(f"{SKIP_BAD_ROWS}; so is a server's refusal of the first requests", False)

    max_new_tokens: int = option("longest answer, in tokens", 512, at_least=1, group="answers")
    temperature: float = option("0: the likeliest token each time (greedy); above 0: sampled", 0.0, at_least=0)
    greedy_share: float | None = option(
        "answer this share of the chats greedily, the others at the temperature; none: all at the temperature",
        None,
        at_least=0,
        at_most=1,
    )
    seed: int = option("random seed", 0, at_least=0)

    batch_size: int | None = option(
        "answers that are written at once; none: on a CPU 16, on a GPU 1024 or what fits (8 where the target needs "
        "generate)",
        None,
        at_least=1,
        group="resources",
    )
    dtype: Literal["float32", "bfloat16"] = option("number format of the target; bfloat16 on a GPU", "float32")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.target is None) == (self.endpoint is None):
            raise ValueError(
                f"regenerate needs either --target or --endpoint, got target={self.target!r} and "
                f"endpoint={self.endpoint!r}."
            )
        if self.endpoint is not None:
            if not self.endpoint.startswith(("http://", "https://")):
                raise ValueError(f"endpoint must be a URL such as http://localhost:8000/v1, got {self.endpoint!r}.")
            if self.model is None:
                raise ValueError("With --endpoint, name the model that it serves: --model NAME.")
        if self.temperature == 0 and self.greedy_share not in (None, 1):
            raise ValueError(
                f"greedy_share={self.greedy_share} leaves chats to be sampled, but temperature=0 is greedy: give a "
                "--temperature above 0, or no --greedy-share."
            )

    def temperature_of(self, row: int) -> float:
        """Of a row's answers: 0 for the greedy share, which follows from seed and number alone."""
        greedy = random.Random(f"{self.seed} {row}").random() < (self.greedy_share or 0)
        return 0.0 if greedy else self.temperature


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig(Config):
    """Let a chat model write prompts, where you have no chats to train on (Magpie, arXiv 2406.08464)."""

    target: str = option(f"{_TARGET}; needs a chat template")
    output: str = option("the .jsonl file to write")
    count: int = option("prompts to write", 1000, at_least=1)
    openings: str | None = option(_OPENINGS, None)
    max_new_tokens: int = option("longest prompt, in tokens; longer ones are left out", 256, at_least=1)
    temperature: float = option("sampling temperature", 0.8, above=0)
    batch_size: int = option("prompts that are written at once", 32, at_least=1)
    dtype: Literal["float32", "bfloat16"] = option("number format of the target; bfloat16 on a GPU", "float32")
    seed: int = option("random seed", 0, at_least=0)
    resume: bool = option("continue after the prompts that output already holds", False)


_SECTIONS = {  # of TrainConfig -> what `ppow train` sets there itself
    "regenerate": {"data", "output", "target", "limit"},
    "supervised": {"data", "output_dir", "target", "drafter", "eval_data", "limit", "plan", "push_to_hub"}
    | {"architecture"},
    "reinforce": {"data", "output_dir", "target", "drafter", "eval_data", "limit", "plan", "push_to_hub"},
    "evaluate": {"output_dir", "target", "drafter", "baseline", "prompts", "prompts_dir"},
}
_THE_ROADS = {"seed", "resume", "split", "skip_bad_rows"}  # in any of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Train a drafter from nothing to its card: prompts, answers, stage 1, stage 2, figures, Hub repository."""

    target: str = option(_TARGET, group="basics")
    output_dir: str = option("folder to write: train.json, prompts, answers, stage1/, stage2/, figures/, drafter/")
    data: str | None = option(f"your chats; none: the target writes the prompts. {_ROWS}", None)
    budget: str | None = option(
        "time for everything, such as 2h, 30m, 90s or 1h30m; none: the counts of docs/train.md, however long they take",
        None,
    )
    openings: str | None = option(f"without data: {_OPENINGS}", None)
    architecture: Literal["eagle3", "block"] = option(_ARCHITECTURE, "eagle3")
    plan: Literal["here", "a100", "h100", "h200"] | None = option(_PLAN, None)
    prompts: int | None = option(
        "prompts to train on, besides those held out; none: by the budget, or by the target's size",
        None,
        at_least=1,
    )
    seed: int = option("random seed", 0, at_least=0)
    resume: bool = option("continue the run that output_dir holds", False)
    push_to_hub: str | None = option("at the end, push the drafter to this Hub repository (ORG/NAME)", None)
    split: str = option("split of a Hub data set", "train")
    skip_bad_rows: bool = option(SKIP_BAD_ROWS, False)
    dtype: Literal["float32", "bfloat16"] | None = option(
        "number format of the target; none: bfloat16 on a GPU, float32 on a CPU", None
    )

    regenerate: dict = option(
        "options of `ppow regenerate`, which writes the answers", {}, group="options of the single commands"
    )
    supervised: dict = option("options of `ppow supervised`, stage 1", {})
    reinforce: dict = option("options of `ppow reinforce`, stage 2", {})
    evaluate: dict = option("options of `ppow evaluate`", {})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None and self.openings is not None:
            raise ValueError(
                f"openings={self.openings!r} begins prompts that the target writes, and data={self.data!r} brings "
                "prompts: give one of the two."
            )
        self.seconds()
        for name in _SECTIONS:
            self._check_section(name)

    def seconds(self) -> float | None:
        """The budget in seconds. Raises ValueError for what is no time."""
        if self.budget is None:
            return None
        found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", self.budget.strip().lower())
        hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
        total = 3600 * hours + 60 * minutes + seconds
        if not total:
            raise ValueError(f"budget must be a time such as 2h, 30m, 90s or 1h30m, got {self.budget!r}.")
        return float(total)

    def _check_section(self, name: str) -> None:
        """Refuse now what a single command would refuse hours later."""
        kinds = RegenerateConfig, SupervisedConfig, ReinforceConfig, EvaluateConfig
        kind: type[Config] = next(kind for kind in kinds if kind.command() == name)
        section = {key.replace("-", "_"): value for key, value in getattr(self, name).items()}
        object.__setattr__(self, name, section)
        if mine := sorted(section.keys() & (_SECTIONS[name] | _THE_ROADS)):
            raise ValueError(f"{name}: `ppow train` sets {', '.join(mine)} itself; leave it out there.")
        filled: dict = dict.fromkeys(kind._required(), "-")
        if name == "supervised":
            filled["architecture"] = self.architecture
        if name == "regenerate" and "endpoint" not in section:
            filled["target"] = "-"
        if name == "evaluate":
            filled |= {"target": "-", "drafter": "-"}
        if isinstance(warmup := section.get("warmup_steps"), int):
            filled["steps"] = warmup + 1  # at least so many will be taken
        try:
            kind.from_dict(filled | section)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftingConfig(Config):
    """What evaluate and demo share: how to draft, a chain or a tree (neither given: as the drafter's config says)."""

    window_size: int | None = option(_WINDOW, None, at_least=1, group="how to draft")
    draft_threshold: float | None = option(
        "end a chain early when the drafter's probability of the whole chain falls below this (no effect with CUDA "
        "graphs); none: as the drafter was made",
        None,
        at_least=0,
        below=1,
    )
    window_schedule: Literal["auto", "constant", "heuristic", "gammatune", "cost"] | None = option(
        "how long each chain is, at most window_size: all alike (constant), by what was accepted before (heuristic, "
        "gammatune), by measured time (cost); none: the drafter's, constant where a size or threshold is given",
        None,
    )
    tree_depth: int | None = option(
        "draft a tree of this depth instead of a chain; needs top_k and nodes", None, at_least=1
    )
    tree_top_k: int | None = option("branches of the tree at each level", None, at_least=1)
    tree_nodes: int | None = option("drafted tokens of the tree that the target verifies", None, at_least=1)

    cuda_graphs: bool | None = option("the fast path on a GPU; none: where possible", None, group="resources")
    threads: int | None = option(_THREADS, None, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        tree = [self.tree_depth, self.tree_top_k, self.tree_nodes]
        if any(tree) and not all(tree):
            raise ValueError(f"A tree needs tree_depth, tree_top_k and tree_nodes, got {tree}.")
        chain = self.window_size, self.draft_threshold, self.window_schedule
        if any(tree) and any(value is not None for value in chain):
            raise ValueError(
                "window_size, draft_threshold and window_schedule are for chains, tree_* for trees: give one of both."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DraftingConfig):
    """Measure a drafter: acceptance length, tokens per second and speedup over the plain target."""

    dtype: Literal["float32", "bfloat16"] = option(_DTYPE, "float32", group="resources")

    target: str | None = option(f"{_TARGET}; not with endpoint", None, group="basics")
    drafter: str | None = option("drafter: Hub id or folder; not with endpoint", None)
    endpoint: str | None = option(
        "base URL of an OpenAI-compatible server whose drafter is measured by its own counters, e.g. "
        "http://localhost:8000/v1",
        None,
    )
    model: str | None = option("the model's name on the endpoint", None)
    output_dir: str = option("folder to write: metrics.json, the plot and samples.jsonl; new or empty")
    baseline: str | None = option("another drafter to compare with in the same run, such as its stage 1", None)
    resume: bool = option("continue the evaluation that output_dir holds", False)

    prompts: list[str] = option(_NAMED, ["mt_bench", "humaneval", "gsm8k"], group="what to measure")
    prompts_dir: str | None = option(_PROMPTS_DIR, None)
    limit: int | None = option("prompts of each benchmark; none: all", None, at_least=1)
    temperatures: list[float] = option("sampling temperatures; 0: greedy", [0.0, 1.0], at_least=0)
    max_new_tokens: int = option("tokens per answer", 256, at_least=1)
    warmup: int = option("answers before the clock starts", 3, at_least=0)
    repetitions: int = option("timed runs over all prompts", 1, at_least=1)
    bootstrap: int = option("resamples of the prompts for the 95% intervals", 1000, at_least=100)
    reference: bool = option("also compare greedy answers with the same loop without drafts (not timed)", True)
    seed: int = option("random seed", 0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts or not self.temperatures:
            raise ValueError(f"prompts={self.prompts} and temperatures={self.temperatures} must not be empty.")
        if self.endpoint is None:
            if self.target is None or self.drafter is None or self.model is not None:
                raise ValueError(
                    "evaluate needs --target and --drafter, or the --endpoint of a server with its --model, got "
                    f"target={self.target!r}, drafter={self.drafter!r}, endpoint=None, model={self.model!r}."
                )
            return
        if not self.endpoint.startswith(("http://", "https://")) or self.model is None:
            raise ValueError(
                f"--endpoint is a URL such as http://localhost:8000/v1, and --model names what it serves; got "
                f"{self.endpoint!r} and {self.model!r}."
            )
        local = {field.name for field in dataclasses.fields(DraftingConfig)}
        local |= {"target", "drafter", "baseline", "repetitions", "dtype", "reference", "resume"}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if given := sorted(name for name in local if getattr(self, name) != defaults[name]):
            raise ValueError(f"With --endpoint the server decides these: leave {', '.join(given)} out.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig(Config):
    """Find why a drafter accepts less than it should: what is wrong with a pair, and the command to run next."""

    target: str = option(_TARGET)
    drafter: str = option("drafter: Hub id or folder, also of another trainer")
    data: list[str] = option(f"prompts to try: {_NAMED} (docs/data.md); empty: the demo's", [])
    prompts_dir: str | None = option(_PROMPTS_DIR, None)
    limit: int = option("prompts of each benchmark or file", 12, at_least=2)
    max_new_tokens: int = option("tokens per answer", 64, at_least=2)
    window_size: int | None = option(_WINDOW, None, at_least=1)
    dtype: Literal["float32", "bfloat16"] = option(
        "number format to examine; the other one is tried as well", "float32"
    )
    output: str | None = option("write all figures to this .json file", None)
    threads: int | None = option(_THREADS, None, at_least=1)


def _both_or_neither(target: str | None, drafter: str | None) -> None:
    if (target is None) != (drafter is None):
        raise ValueError(
            f"A drafter belongs to one target: give both or neither, got target={target!r} and drafter={drafter!r}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig(DraftingConfig):
    """Answer real prompts with and without a drafter, and compare. Without arguments: SmolLM2-135M-Instruct."""

    target: str | None = option(f"{_TARGET}; none: SmolLM2-135M-Instruct", None, group="basics")
    drafter: str | None = option("its drafter: Hub id or folder; none: the bundled one", None)
    prompts: str | None = option("a .jsonl file of prompts; none: the eight of the demo", None)
    limit: int | None = option("prompts to run; none: all", None, at_least=1)
    max_new_tokens: int = option("tokens per answer", 128, at_least=1)
    temperature: float = option("0: greedy; above 0: sampled", 0.0, at_least=0)
    repetitions: int = option("timed runs of each system on each prompt", 3, at_least=1)
    output: str | None = option("write the figures to this .json file", None)
    seed: int = option("random seed", 0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _both_or_neither(self.target, self.drafter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpaceConfig(Config):
    """Serve a page on which the target answers with and without a drafter. Without arguments: SmolLM2-135M-Instruct."""

    target: str | None = option(f"{_TARGET}; none: SmolLM2-135M-Instruct", None)
    drafter: str | None = option("its drafter: Hub id or folder; none: the bundled one", None)
    baseline: str | None = option("a second drafter to compare, such as the drafter's stage 1", None)
    host: str = option("address to listen on; 0.0.0.0: reachable from other machines", "127.0.0.1")
    port: int = option("port to listen on", 7860, at_least=0, at_most=65535)
    threads: int | None = option(_THREADS, None, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _both_or_neither(self.target, self.drafter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig(Config):
    """Turn another trainer's EAGLE-3 or DFlash drafter into one for plain transformers and `ppow reinforce`."""

    _positional = "source"

    source: str = option("the drafter: Hub id, folder or GGUF file")
    target: str = option("the target that it was trained for: Hub id, folder or GGUF file")
    out: str | None = option("folder to write; none: the drafter's name with -ppow, here", None)
    rope_theta: float | None = option("base of its RoPE; none: as stored, or as its trainer is known to set it", None)
    norm_output: bool | None = option("whether normed states are fed back; none: as stored", None)
    norm_before_residual: bool | None = option("whether its residual is the normed state; none: as stored", None)
    taps: list[int] | None = option("hidden-state indices of the target that it reads; none: as stored", None)
    dry_run: bool = option("only print what would be mapped, dropped and assumed", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Write a PPOW drafter as a serving engine or another trainer reads it, and print the command that serves it."""

    _positional = "drafter"

    drafter: str = option("PPOW drafter: Hub id or folder")
    format: Literal["speculators", "vllm", "sglang", "specforge", "eagle", "gguf", "dflash"] = option(
        "who is to read it; gguf: llama.cpp; dflash: z-lab, vLLM and SGLang, a block drafter"
    )
    target: str | None = option("its target: Hub id, folder or GGUF file; none: as the drafter records it", None)
    out: str | None = option("folder to write; none: the drafter's name with the format, here", None)
    dry_run: bool = option("only print what would be mapped, dropped and assumed", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushConfig(Config):
    """Push a drafter to the Hub with its code, card and figures; or push the Space that shows it."""

    _positional = "drafter"

    drafter: str = option("drafter to push: a folder, or a Hub id", group="basics")
    repo: str = option("Hub repository to push to (ORG/NAME); created when missing")
    dry_run: bool = option("show the files and the card, and upload nothing", False)

    target: str | None = option(
        "Hub id of the target; none: the one that the drafter records", None, group="what the card says"
    )
    metrics: str | None = option(
        "output folder of `ppow evaluate`, for the figures; none: metrics.json beside the drafter", None
    )
    license: str | None = option("licence of the weights, as the Hub names it, e.g. apache-2.0", None)

    private: bool = option("create the repository as a private one", False, group="repository")
    revision: str = option("branch to push to; created when missing", "main")
    create_pr: bool = option("open a pull request instead of pushing to the branch", False)
    tag: str | None = option("tag the commit; the card's snippets then load this tag", None)

    space: bool = option("push a Space that shows this drafter, which is already on the Hub", False, group="Space")
    baseline: str | None = option("Hub id of a second drafter that the page compares, such as stage 1", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tag and self.create_pr:
            raise ValueError("A pull request is tagged after it was merged: give --tag or --create-pr, not both.")
        if self.baseline and not self.space:
            raise ValueError(f"--baseline {self.baseline} is raced in a Space: give it with --space.")
