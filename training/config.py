"""The options of every command, one frozen dataclass each.

"paper" marks a default that arXiv 2605.14978 gives; "ours" one that it leaves open. No torch import here: the command
line reads this file before it starts anything heavy.
"""

import dataclasses
import random
import re
from typing import Literal

from .arguments import Config, option

_ROWS = (
    "a file (.jsonl, .json, .csv, .tsv, plain or .gz, .bz2, .xz, .zst; .parquet), a folder of them, or a Hub dataset "
    "id; a row holds messages (role, content), conversations (from, value), prompt and completion or response, "
    "instruction and output, or text, and where the prompt needs them tools, documents, chat_template_kwargs "
    "(docs/data.md)"
)
SKIP_BAD_ROWS = "go on without rows that cannot be used, count them and name them; else the first one is an error"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(Config):
    """What stages 1 and 2 share."""

    target: str = option("target model: Hub id, folder or GGUF file", group="basics")
    data: str = option(f"chats or texts: {_ROWS}")
    output_dir: str = option(
        "folder for the drafter, checkpoints/, metrics.jsonl, its curve training.png, provenance.json"
    )
    steps: int = option("optimizer steps", 1000, at_least=1)
    batch_size: int = option("sequences per process and micro step", 1, at_least=1)
    learning_rate: float = option("peak learning rate", 1e-4, above=0)
    eval_data: str | None = option("held-out chats, same forms as data", None)
    seed: int = option("everything random follows from it", 0, at_least=0)
    resume: bool = option("go on from the latest complete checkpoint in output_dir", False)
    plan: Literal["here", "a100", "h100", "h200"] | None = option(
        "print the memory and time of a step on this or that device, and stop", None
    )
    push_to_hub: str | None = option("ORG/NAME: push every checkpoint and the drafter there, in the background", None)

    split: str = option("split of a Hub dataset", "train", group="data")
    limit: int | None = option("read at most this many rows", None, at_least=1)
    max_length: int = option("tokens of a row that are kept; never more than the target's positions", 2048, at_least=8)
    drop_long: bool = option("drop rows whose answer starts beyond max_length instead of stopping", False)
    skip_bad_rows: bool = option(SKIP_BAD_ROWS, False)

    warmup_steps: int = option("steps of linear warm-up", 0, at_least=0, group="method")
    average_from: float = option(
        "after this share of the steps weights are averaged, and the drafter is their mean; the learning rate does not "
        "fall then; 1: the last weights, with a rate that falls to 0 (ours)",
        0.5,
        at_least=0,
        at_most=1,
    )
    max_grad_norm: float = option("clip the gradient to this norm", 1.0, above=0)

    accumulation: int = option("micro steps per optimizer step", 1, at_least=1, group="resources")
    dtype: Literal["float32", "bfloat16"] = option("of the target and of the drafter's forward pass", "float32")
    shard_target: bool = option("spread the target's weights over the processes (FSDP), if it does not fit", False)
    save_every: int = option("steps between checkpoints", 200, at_least=1)
    keep_last: int = option("checkpoints to keep", 2, at_least=1)
    eval_every: int = option("steps between evaluations on eval_data", 200, at_least=1)
    log_every: int = option("steps between lines of metrics.jsonl", 10, at_least=1)
    trackers: list[str] = option("accelerate trackers, e.g. tensorboard,wandb", [])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be smaller than steps={self.steps}: the peak is never reached."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig(StageConfig):
    """Stage 1: train an EAGLE-3 style drafter on the target's answers with the training-time test."""

    drafter: str | None = option("drafter to start from instead of a fresh one", None, group="basics")
    ttt_steps: int = option(
        "draft steps unrolled by the training-time test (EAGLE-3: 7)", 7, at_least=1, group="method"
    )
    step_weight: float = option(
        "draft step i weighs step_weight ** i in the loss (EAGLE-3: 0.8)", 0.8, above=0, at_most=1
    )

    optimizer: Literal["adamw", "muon"] = option("muon: matrices by Muon, the rest by AdamW", "adamw")

    draft_vocab_size: int | None = option(
        "draft vocabulary, most frequent answer tokens; none: all", None, at_least=1, group="shape of a fresh drafter"
    )
    num_layers: int = option("decoder layers of a fresh drafter", 1, at_least=1)
    taps: list[int] | None = option("hidden-state indices of the target to read; none: EAGLE-3's", None, at_least=0)
    hidden_size: int | None = option("width of a fresh drafter; none: the target's", None, at_least=1)
    intermediate_size: int | None = option("width of its MLPs; none: the target's", None, at_least=1)
    num_attention_heads: int | None = option("its attention heads; none: the target's", None, at_least=1)
    num_key_value_heads: int | None = option("its key-value heads; none: the target's", None, at_least=1)
    norm_before_fc: bool = option("normalise the taps before they are fused (EAGLE-3.1)", False)
    norm_output: bool = option("a draft step goes on from its normalised features (EAGLE-3.1)", False)
    qk_norm: bool = option("normalise queries and keys (Qwen3)", False)
    share_embeddings: bool = option("read the target's embedding instead of keeping a copy of it (equal widths)", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drafter is None:
            return
        shape = ["draft_vocab_size", "num_layers", "taps", "hidden_size", "intermediate_size", "num_attention_heads"]
        fresh = {field.name: field.default for field in dataclasses.fields(self)}
        shape += ["num_key_value_heads", "norm_before_fc", "norm_output", "qk_norm", "share_embeddings"]
        given = [name for name in shape if getattr(self, name) != fresh[name]]
        if given:
            raise ValueError(f"{', '.join(given)} shape a fresh drafter, but --drafter {self.drafter} has its shape.")


# What `ppow reinforce --preset NAME` sets where an option is not given: the best settings found for each way to learn
# (ours, benchmarks/README.md). The first is the default.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforceConfig(StageConfig):
    """Stage 2: PPOW reinforcement learning of a supervised drafter (arXiv 2605.14978).

    Without options: the recipe that gained most in benchmarks/README.md. As published: --preset published.
    """

    presets = PRESETS

    drafter: str = option("drafter of stage 1: folder or Hub id", group="basics")
    steps: int = option("optimizer steps (ours)", 500, at_least=1)
    learning_rate: float = option("peak learning rate (ours)", 3e-4, above=0)

    objective: Literal["ppow", "cst", "lk"] = option(
        "PPOW (paper), or continued supervised training or LK, which learn from texts as well", "ppow", group="method"
    )
    estimator: Literal["exact", "rollout"] = option(
        "of PPOW's expected reward: its closed form along the texts (ours), or sampled windows (paper)", "exact"
    )
    verification: Literal["text", "greedy", "sampling"] = option(
        "rule that accepts tokens in training; text: the rule that wrote each text, for texts alone (ours)", "text"
    )
    supervised_coef: float = option(
        "weight of a supervised loss beside PPOW's: LK's along texts, stage 1's beside rollouts (ours)",
        3.0,
        at_least=0,
    )
    window_size: int = option("drafted tokens per window, K (paper)", 10, at_least=1)
    cost_ratio: float = option("cost of a draft step over a target step, gamma (paper)", 0.12, at_least=0)
    kl_coef: float = option("weight of the KL term anchored on the target, beta (ours)", 0.0, at_least=0)

    group_size: int = option(
        "rollouts of one prefix, G_roll (paper)", 8, at_least=2, group="rollouts, with --estimator rollout"
    )
    windows_per_sequence: int = option("windows drawn from a text (ours)", 8, at_least=1)
    adaptive_switch: float = option(
        "share of the steps after which windows are drawn by criticality (ADAW), not uniformly; 1: never (ours)",
        0.5,
        at_least=0,
        at_most=1,
    )
    rollout_temperature: float = option("temperature of the rollouts (ours)", 0.5, above=0)
    proximity_bonus: float = option("size of the proximity reward, eta; 0: off (ours)", 0.5, at_least=0)
    proximity_margin: float = option("its threshold on Delta in nats, epsilon (ours)", 2.0, at_least=0)
    updates_per_rollout: int = option(
        "optimizer steps on each rollout; clipping acts from the second on (ours)", 1, at_least=1
    )
    max_forest_nodes: int = option("drafted nodes verified in one target forward (ours)", 4096, at_least=1)

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
    """Let the target write the answers of a chat data set, so that the drafter learns the target's own text."""

    data: str = option(f"chats: {_ROWS}")
    output: str = option("the .jsonl file to write")
    target: str | None = option("target model: Hub id, folder or GGUF file; not with endpoint", None)
    endpoint: str | None = option("base URL of an OpenAI-compatible server, e.g. http://localhost:8000/v1", None)
    model: str | None = option("the model's name on the endpoint", None)
    concurrency: int = option("requests in flight on the endpoint", 16, at_least=1)
    split: str = option("split of a Hub dataset", "train")
    limit: int | None = option("read at most this many rows", None, at_least=1)
    skip_bad_rows: bool = option(f"{SKIP_BAD_ROWS}; an endpoint's refusal of the first requests is one, too", False)
    max_new_tokens: int = option("longest answer, in tokens", 512, at_least=1)
    temperature: float = option("sampling temperature; 0: greedy", 0.0, at_least=0)
    greedy_share: float | None = option(
        "share of the chats to answer greedily, the others at the temperature; none: all at the temperature",
        None,
        at_least=0,
        at_most=1,
    )
    batch_size: int | None = option(
        "answers of the target under way at once; none: 16, on a GPU 1024 or what fits; 8 in batches of generate",
        None,
        at_least=1,
    )
    dtype: Literal["float32", "bfloat16"] = option("of the target", "float32")
    seed: int = option("seed of the sampling and of which chats are greedy", 0, at_least=0)
    resume: bool = option("go on after the rows that output already holds", False)

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
    """Let a chat model write prompts of its own, where there are no chats to train on (Magpie, arXiv 2406.08464)."""

    target: str = option("target model: Hub id, folder or GGUF file; its tokenizer has a chat template")
    output: str = option("the .jsonl file to write")
    count: int = option("prompts to write", 1000, at_least=1)
    max_new_tokens: int = option("longest prompt, in tokens; a longer one is left out", 256, at_least=1)
    temperature: float = option("sampling temperature", 1.0, above=0)
    batch_size: int = option("prompts per generate call", 32, at_least=1)
    dtype: Literal["float32", "bfloat16"] = option("of the target", "float32")
    seed: int = option("seed of the sampling", 0, at_least=0)
    resume: bool = option("go on after the prompts that output already holds", False)


_SECTIONS = {  # of TrainConfig -> what `ppow train` sets there itself
    "regenerate": {"data", "output", "target", "limit"},
    "supervised": {"data", "output_dir", "target", "drafter", "eval_data", "limit", "plan", "push_to_hub"},
    "reinforce": {"data", "output_dir", "target", "drafter", "eval_data", "limit", "plan", "push_to_hub"},
    "evaluate": {"output_dir", "target", "drafter", "baseline", "prompts", "prompts_dir"},
}
_THE_ROADS = {"seed", "resume", "split", "skip_bad_rows"}  # in any of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """The whole road with one command: prompts, answers, stage 1, stage 2, figures, the drafter's repository."""

    target: str = option("target model: Hub id, folder or GGUF file", group="basics")
    output_dir: str = option("folder for all of it: train.json, prompts, answers, stage1/, stage2/, figures/, drafter/")
    data: str | None = option(f"your chats; none: the target writes prompts of its own. {_ROWS}", None)
    budget: str | None = option(
        "wall time for everything, such as 2h, 30m, 90s or 1h30m; none: as much as docs/train.md has for the target's "
        "size",
        None,
    )
    plan: Literal["here", "a100", "h100", "h200"] | None = option(
        "print what each part takes on this or that device, and stop", None
    )
    prompts: int | None = option(
        "prompts to train on, without those that are held out; none: by the budget, or by the target's size",
        None,
        at_least=1,
    )
    seed: int = option("everything random follows from it", 0, at_least=0)
    resume: bool = option("go on with the run that output_dir holds", False)
    push_to_hub: str | None = option("ORG/NAME: push the drafter there at the end", None)
    split: str = option("split of a Hub dataset", "train")
    skip_bad_rows: bool = option(SKIP_BAD_ROWS, False)
    dtype: Literal["float32", "bfloat16"] | None = option(
        "of the target; none: bfloat16 on a GPU, float32 on a CPU", None
    )

    regenerate: dict = option(
        "of `ppow regenerate`, which writes the answers", {}, group="options of single commands, by name"
    )
    supervised: dict = option("of `ppow supervised`, stage 1", {})
    reinforce: dict = option("of `ppow reinforce`, stage 2", {})
    evaluate: dict = option("of `ppow evaluate`", {})

    def __post_init__(self) -> None:
        super().__post_init__()
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
    """What evaluate and demo share: how to draft, a chain or a whole tree (neither: as the drafter's config says)."""

    window_size: int | None = option("chain of this many drafted tokens; none: the drafter's own", None, at_least=1)
    tree_depth: int | None = option("depth of the draft tree", None, at_least=1)
    tree_top_k: int | None = option("branches kept per level of the tree", None, at_least=1)
    tree_nodes: int | None = option("drafted nodes verified per step", None, at_least=1)
    draft_threshold: float | None = option(
        "end a chain once its joint draft probability is below this; none: the drafter's own", None, at_least=0, below=1
    )
    cuda_graphs: bool | None = option("decode from CUDA graphs; none: where possible", None)
    compile_layers: bool | None = option("let torch.compile fuse what the graphs record; none: as the drafter's", None)
    threads: int | None = option("CPU threads of torch; none: torch's choice", None, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        tree = [self.tree_depth, self.tree_top_k, self.tree_nodes]
        if any(tree) and not all(tree):
            raise ValueError(f"A tree needs tree_depth, tree_top_k and tree_nodes, got {tree}.")
        if (self.window_size is not None or self.draft_threshold is not None) and any(tree):
            raise ValueError("window_size and draft_threshold are for chains, tree_* for trees: give one of the two.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DraftingConfig):
    """Measure a drafter: acceptance length, tokens per second and speedup over the plain target."""

    target: str | None = option("target model: Hub id, folder or GGUF file; not with endpoint", None)
    drafter: str | None = option("drafter: Hub id or folder; not with endpoint", None)
    endpoint: str | None = option(
        "base URL of an OpenAI-compatible server whose drafter is measured by its own counters, e.g. "
        "http://localhost:8000/v1",
        None,
    )
    model: str | None = option("the model's name on the endpoint", None)
    baseline: str | None = option("another drafter to measure in the same run, such as its stage 1", None)
    output_dir: str = option("folder for metrics.json, the plot and samples.jsonl; empty or new")
    prompts: list[str] = option("benchmarks by name or .jsonl files", ["mt_bench", "humaneval", "gsm8k"])
    prompts_dir: str | None = option("folder that holds the named benchmarks; none: the Hub", None)
    limit: int | None = option("prompts per benchmark; none: all", None, at_least=1)
    temperatures: list[float] = option("0 is greedy (paper: 0 and 1)", [0.0, 1.0], at_least=0)
    max_new_tokens: int = option("tokens per answer", 256, at_least=1)
    warmup: int = option("untimed generations before measuring", 3, at_least=0)
    repetitions: int = option("timed runs over all prompts", 1, at_least=1)
    bootstrap: int = option("resamples for the 95% intervals", 1000, at_least=100)
    dtype: Literal["float32", "bfloat16"] = option("of target and drafter", "float32")
    reference: bool = option("compare greedy answers with the same loop without drafts too, untimed", True)
    resume: bool = option("go on with the evaluation that output_dir holds", False)
    seed: int = option("seed of sampling and bootstrap", 0, at_least=0)

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

    target: str = option("target model: Hub id, folder or GGUF file")
    drafter: str = option("drafter: Hub id or folder; of another trainer, too")
    data: list[str] = option("prompts: benchmarks by name or files of rows (docs/data.md); none: the demo's", [])
    prompts_dir: str | None = option("folder that holds the named benchmarks; none: the Hub", None)
    limit: int = option("prompts of each of them", 12, at_least=2)
    max_new_tokens: int = option("tokens per answer", 64, at_least=2)
    window_size: int | None = option("chain of this many drafted tokens; none: the drafter's own", None, at_least=1)
    dtype: Literal["float32", "bfloat16"] = option("of target and drafter; the other one is tried, too", "float32")
    output: str | None = option("write all figures to this .json file", None)
    threads: int | None = option("CPU threads of torch; none: torch's choice", None, at_least=1)


def _both_or_neither(target: str | None, drafter: str | None) -> None:
    if (target is None) != (drafter is None):
        raise ValueError(
            f"A drafter belongs to one target: give both or neither, got target={target!r} and drafter={drafter!r}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig(DraftingConfig):
    """Generate with and without a drafter on real prompts; without arguments, with SmolLM2-135M-Instruct."""

    target: str | None = option("target model: Hub id, folder or GGUF file; none: SmolLM2-135M-Instruct", None)
    drafter: str | None = option("its drafter: Hub id or folder; none: the bundled one", None)
    prompts: str | None = option("a .jsonl file of prompts; none: those of the page", None)
    limit: int | None = option("prompts to run; none: all", None, at_least=1)
    max_new_tokens: int = option("tokens per answer", 128, at_least=1)
    temperature: float = option("0 is greedy", 0.0, at_least=0)
    repetitions: int = option("timed runs of each system per prompt", 3, at_least=1)
    output: str | None = option("write the figures to this .json file", None)
    seed: int = option("seed of the sampling", 0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _both_or_neither(self.target, self.drafter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpaceConfig(Config):
    """Serve the page on which plain target and drafter race; without arguments, with SmolLM2-135M-Instruct."""

    target: str | None = option("target model: Hub id, folder or GGUF file; none: SmolLM2-135M-Instruct", None)
    drafter: str | None = option("its drafter: Hub id or folder; none: the bundled one", None)
    baseline: str | None = option("a second drafter to race, such as the drafter's stage 1", None)
    host: str = option("address to listen on; 0.0.0.0: all", "127.0.0.1")
    port: int = option("port to listen on", 7860, at_least=0, at_most=65535)
    threads: int | None = option("CPU threads of torch; none: torch's choice", None, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _both_or_neither(self.target, self.drafter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig(Config):
    """Turn an EAGLE-3 drafter of another trainer into a PPOW drafter for plain transformers and `ppow reinforce`."""

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
    format: Literal["speculators", "vllm", "sglang", "specforge", "eagle", "gguf"] = option("who is to read it")
    target: str | None = option("its target: Hub id, folder or GGUF file; none: as the drafter records it", None)
    out: str | None = option("folder to write; none: the drafter's name with the format, here", None)
    dry_run: bool = option("only print what would be mapped, dropped and assumed", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushConfig(Config):
    """Make a drafter a repository of the Hub, in one commit, with its card; or push the Space that shows it."""

    _positional = "drafter"

    drafter: str = option("drafter to push: a folder, or a Hub id")
    repo: str = option("ORG/NAME on the Hub; made when missing")
    space: bool = option("push the demo Space of a drafter that is on the Hub", False)
    target: str | None = option("Hub id of the target; none: the one that the drafter records", None)
    baseline: str | None = option("Hub id of a second drafter for the Space to race, such as stage 1", None)
    metrics: str | None = option("output folder of `ppow evaluate`; none: metrics.json beside the drafter", None)
    private: bool = option("a new repository is private", False)
    revision: str = option("branch to push to; made when missing", "main")
    create_pr: bool = option("open a pull request instead of pushing to the branch", False)
    tag: str | None = option("tag the commit, and pin the card's snippets to the tag", None)
    license: str | None = option("licence of the weights, as the Hub names it", None)
    dry_run: bool = option("show the files and the card, and upload nothing", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tag and self.create_pr:
            raise ValueError("A pull request is tagged after it was merged: give --tag or --create-pr, not both.")
        if self.baseline and not self.space:
            raise ValueError(f"--baseline {self.baseline} is raced in a Space: give it with --space.")
