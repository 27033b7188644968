"""The options of every command, one frozen dataclass each.

"paper" marks a default that arXiv 2605.14978 gives; "ours" one that it leaves open. No torch import here: the command
line reads this file before it starts anything heavy.
"""

import dataclasses
import sys
from typing import Literal

from .options import Config, option

_ROWS = (
    "a file (.jsonl, .json, .csv, .tsv, plain or .gz, .bz2, .xz, .zst; .parquet), a folder of them, or a Hub dataset "
    "id; a row holds messages (role, content), conversations (from, value), prompt and completion or response, "
    "instruction and output, or text, and where the prompt needs them tools, documents, chat_template_kwargs "
    "(docs/data.md)"
)
_SKIP = "go on without rows that cannot be used, count them and name them; else the first one is an error"

_AVERAGING = (
    "after this share of the steps weights are averaged, and the drafter is their mean; the learning rate does not "
    "fall then; 1: the last weights, with a rate that falls to 0"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """What stages 1 and 2 share."""

    target: str = option("target model: Hub id or folder")
    data: str = option(f"chats or texts: {_ROWS}")
    output_dir: str = option(
        "folder for the drafter, checkpoints/, metrics.jsonl, its curve training.png, provenance.json"
    )
    split: str = option("split of a Hub dataset", "train")
    limit: int | None = option("read at most this many rows", None, at_least=1)
    max_length: int = option("tokens of a row that are kept; never more than the target's positions", 2048, at_least=8)
    drop_long: bool = option("drop rows whose answer starts beyond max_length instead of stopping", False)
    skip_bad_rows: bool = option(_SKIP, False)
    eval_data: str | None = option("held-out chats, same forms as data", None)
    eval_every: int = option("steps between evaluations on eval_data", 200, at_least=1)

    steps: int = option("optimizer steps", 1000, at_least=1)
    batch_size: int = option("sequences per process and micro step", 1, at_least=1)
    accumulation: int = option("micro steps per optimizer step", 1, at_least=1)
    learning_rate: float = option("peak learning rate of AdamW", 1e-4, above=0)
    warmup_steps: int = option("steps of linear warm-up", 0, at_least=0)
    average_from: float = option(f"{_AVERAGING} (ours)", 0.5, at_least=0, at_most=1)
    max_grad_norm: float = option("clip the gradient to this norm", 1.0, above=0)
    weight_decay: float = option("decoupled weight decay", 0.0, at_least=0)
    betas: list[float] = option("AdamW's two averaging factors", [0.9, 0.95], at_least=0, below=1)
    dtype: Literal["float32", "bfloat16"] = option("of the target and of the drafter's forward pass", "float32")
    seed: int = option("everything random follows from it", 0, at_least=0)
    shard_target: bool = option("spread the target's weights over the processes (FSDP), if it does not fit", False)

    save_every: int = option("steps between checkpoints", 200, at_least=1)
    keep_last: int = option("checkpoints to keep", 2, at_least=1)
    log_every: int = option("steps between lines of metrics.jsonl", 10, at_least=1)
    resume: bool = option("go on from the latest complete checkpoint in output_dir", False)
    plan: Literal["here", "a100", "h100", "h200"] | None = option(
        "print the memory and time of a step on this or that device, and stop", None
    )
    trackers: list[str] = option("accelerate trackers, e.g. tensorboard,wandb", [])
    push_to_hub: str | None = option("ORG/NAME: push every checkpoint and the drafter there, in the background", None)

    def __post_init__(self):
        super().__post_init__()
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas}.")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be smaller than steps={self.steps}: the peak is never reached."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedConfig(TrainingConfig):
    """Stage 1: train an EAGLE-3 style drafter on the target's answers with the training-time test."""

    drafter: str | None = option("drafter to start from instead of a fresh one", None)
    ttt_steps: int = option("draft steps unrolled by the training-time test (EAGLE-3: 7)", 7, at_least=1)
    step_weight: float = option(
        "draft step i weighs step_weight ** i in the loss (EAGLE-3: 0.8)", 0.8, above=0, at_most=1
    )

    draft_vocab_size: int | None = option("draft vocabulary, most frequent answer tokens; none: all", None, at_least=1)
    num_layers: int = option("decoder layers of a fresh drafter", 1, at_least=1)
    taps: list[int] | None = option("hidden-state indices of the target to read; none: EAGLE-3's", None, at_least=0)
    hidden_size: int | None = option("width of a fresh drafter; none: the target's", None, at_least=1)
    intermediate_size: int | None = option("width of its MLPs; none: the target's", None, at_least=1)
    num_attention_heads: int | None = option("its attention heads; none: the target's", None, at_least=1)
    num_key_value_heads: int | None = option("its key-value heads; none: the target's", None, at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.drafter is None:
            return
        shape = ("draft_vocab_size", "num_layers", "taps", "hidden_size", "intermediate_size", "num_attention_heads")
        fresh = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in (*shape, "num_key_value_heads") if getattr(self, name) != fresh[name]]
        if given:
            raise ValueError(f"{', '.join(given)} shape a fresh drafter, but --drafter {self.drafter} has its shape.")


# What `ppow reinforce` takes for options that are not given: the best settings found for each way to learn (ours, from
# benchmarks/README.md).
RECIPES = {
    "exact": {  # PPOW's reward in closed form
        "verification": "text",
        "all_windows": True,
        "supervised_loss": "lk",
        "supervised_coef": 3.0,
        "kl_coef": 0.0,
        "rollout_temperature": 1.0,
        "learning_rate": 3e-4,
        "average_from": 0.5,
    },
    "rollout": {  # PPOW as published, and the controls that roll out
        "verification": "greedy",
        "all_windows": False,
        "supervised_loss": "cst",
        "supervised_coef": 0.0,
        "kl_coef": 0.1,
        "rollout_temperature": 0.5,
        "learning_rate": 5e-5,
        "average_from": 1.0,
    },
    "text": {  # the controls that learn from texts
        "verification": "greedy",
        "all_windows": True,
        "supervised_loss": "cst",
        "supervised_coef": 0.0,
        "kl_coef": 0.0,
        "rollout_temperature": 1.0,
        "learning_rate": 3e-4,
        "average_from": 0.5,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforceConfig(TrainingConfig):
    """Stage 2: PPOW reinforcement learning of a supervised drafter (arXiv 2605.14978).

    Without options: the recipe that gained most in benchmarks/README.md. As published: --estimator rollout. An option
    whose default is none takes the value that served its estimator best, and the run's record says which.
    """

    drafter: str = option("drafter of stage 1: folder or Hub id")
    steps: int = option("optimizer steps (ours)", 500, at_least=1)
    learning_rate: float | None = option(
        "peak learning rate of AdamW; none: 3e-4 along texts, 5e-5 on rollouts (ours)", None, above=0
    )
    average_from: float | None = option(
        f"{_AVERAGING}; none: 0.5 along texts, 1 on rollouts (ours)", None, at_least=0, at_most=1
    )

    objective: Literal["ppow", "cst", "lk", "lk_mixed", "eal", "d_pace", "vat", "gto", "draft_opd"] = option(
        "what to optimise: PPOW, or one of the controls of training/objectives.py (paper)", "ppow"
    )
    estimator: Literal["rollout", "exact"] = option(
        "of PPOW's expected reward: sampled windows (paper), or its closed form along the text (ours)", "exact"
    )
    supervised_coef: float | None = option(
        "weight of a supervised loss beside the objective; none: 3 with PPOW's estimator=exact, else 0 (ours)",
        None,
        at_least=0,
    )
    supervised_loss: Literal["cst", "lk"] | None = option(
        "that loss: stage 1's, or LK's, which knows texts only; none: lk with PPOW's estimator=exact, else cst (ours)",
        None,
    )
    step_weight: float = option(
        "draft step i weighs step_weight ** i in supervised losses; 0.8 as in EAGLE-3 (ours)", 0.8, above=0, at_most=1
    )
    tree_branches: int = option("branches per node of the tree in verification=tree (ours)", 4, at_least=1)

    window_size: int = option("drafted tokens per window, K (paper)", 10, at_least=1)
    group_size: int = option("rollouts of one prefix, G_roll (paper)", 8, at_least=2)
    windows_per_sequence: int = option("prefixes drawn from a sequence (ours)", 8, at_least=1)
    all_windows: bool | None = option(
        "learn from every window of a text instead; none: yes, but not with rollouts (ours)", None
    )
    adaptive_switch: float = option(
        "fraction of the steps after which windows are drawn by criticality (ADAW), not uniformly; 1: never (ours)",
        0.5,
        at_least=0,
        at_most=1,
    )
    rollout_temperature: float | None = option(
        "temperature of the drafter's rollouts, or with estimator=exact of the drafts that greedy rules judge; none: "
        "0.5 for rollouts, else 1 (ours)",
        None,
        above=0,
    )
    verification: Literal["greedy", "sampling", "text", "tree"] | None = option(
        "rule that accepts tokens in training; estimator=exact knows two more: each text's own rule, and a tree; none: "
        "text with estimator=exact, else greedy (ours)",
        None,
    )
    max_forest_nodes: int = option("drafted nodes verified in one target forward (ours)", 4096, at_least=1)

    updates_per_rollout: int = option(
        "optimizer steps on each rollout; clipping acts from the second on (ours)", 1, at_least=1
    )

    reward: Literal["paper", "throughput"] = option(
        "paper: k / (k * cost_ratio + 1); throughput: charges every drafted token and counts the bonus (ours)", "paper"
    )
    cost_ratio: float = option("cost of a draft step over a target step, gamma (paper)", 0.12, at_least=0)
    verify_cost: float = option(
        "cost of verifying a window over one target step, for the throughput reward (ours)", 1.0, above=0
    )
    proximity_bonus: float = option("size of the proximity reward, eta; 0: off (ours)", 0.5, at_least=0)
    proximity_margin: float = option("its threshold on Delta in nats, epsilon (ours)", 2.0, at_least=0)
    proximity_share: float | None = option(
        "instead of a margin: the share of a micro step's rejected rollouts that get it, those of least Delta (ours)",
        None,
        above=0,
        below=1,
    )
    credit: Literal["window", "token"] = option(
        "which rollouts a token is compared with: its window's group (paper), or those of it that got as far (ours)",
        "window",
    )
    normalize_advantages: bool = option("divide advantages by the group's standard deviation (ours)", True)
    clip_range: float = option("clipping of the policy ratio (ours)", 0.2, above=0, below=1)
    kl_coef: float | None = option(
        "weight of the KL term anchored on the target, beta; none: 0.1 on rollouts, else 0 (ours)", None, at_least=0
    )

    def __post_init__(self):
        super().__post_init__()
        learns = {"ppow": self.estimator, "gto": "rollout", "draft_opd": "rollout"}.get(self.objective, "text")
        for name, value in RECIPES[learns].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.group_size * self.window_size > self.max_forest_nodes:
            raise ValueError(
                f"max_forest_nodes={self.max_forest_nodes} does not hold one group of {self.group_size} rollouts x "
                f"{self.window_size} tokens; raise it to {self.group_size * self.window_size} or more."
            )
        rolls = learns == "rollout"
        if self.verification in ("text", "tree") and learns != "exact":
            raise ValueError(
                f"verification={self.verification!r} needs objective=ppow with estimator=exact; otherwise it is greedy "
                "or sampling."
            )
        if self.all_windows and rolls:
            raise ValueError("all_windows would roll out from every position; raise windows_per_sequence instead.")
        if self.supervised_loss != "cst" and rolls:
            raise ValueError(
                f"supervised_loss={self.supervised_loss!r} needs an objective that learns from texts, such as "
                "estimator=exact; beside rollouts it is cst."
            )
        if self.credit != "window" and (self.objective != "ppow" or not rolls):
            raise ValueError(
                f"credit={self.credit!r} says how PPOW's rollouts share their reward: it needs objective=ppow with "
                f"estimator=rollout, got objective={self.objective} with estimator={self.estimator}."
            )
        if self.proximity_share is not None and (self.objective != "ppow" or not rolls or self.proximity_bonus == 0):
            raise ValueError(
                f"proximity_share={self.proximity_share} says which of PPOW's rollouts earn the proximity reward: it "
                f"needs objective=ppow with estimator=rollout and a proximity_bonus above 0, got {self.objective} with "
                f"{self.estimator} and {self.proximity_bonus}."
            )
        throughput = 1 / (self.window_size * self.cost_ratio + self.verify_cost)
        first = 1 / (self.cost_ratio + 1) if self.reward == "paper" else throughput
        if self.proximity_bonus >= first:
            raise ValueError(
                f"proximity_bonus={self.proximity_bonus} must stay below {first:.3g}, what the first accepted token "
                "earns; otherwise a rejected window is worth more than an accepted one."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegenerateConfig(Config):
    """Let the target write the answers of a chat data set, so that the drafter learns the target's own text."""

    data: str = option(f"chats: {_ROWS}")
    output: str = option("the .jsonl file to write")
    target: str | None = option("target model: Hub id or folder; not with endpoint", None)
    endpoint: str | None = option("base URL of an OpenAI-compatible server, e.g. http://localhost:8000/v1", None)
    model: str | None = option("the model's name on the endpoint", None)
    concurrency: int = option("requests in flight on the endpoint", 16, at_least=1)
    split: str = option("split of a Hub dataset", "train")
    limit: int | None = option("read at most this many rows", None, at_least=1)
    skip_bad_rows: bool = option(f"{_SKIP}; an endpoint's refusal of the first requests is one, too", False)
    max_new_tokens: int = option("longest answer, in tokens", 512, at_least=1)
    temperature: float = option("sampling temperature; 0: greedy", 0.0, at_least=0)
    batch_size: int = option("prompts per generate call", 8, at_least=1)
    dtype: Literal["float32", "bfloat16"] = option("of the target", "float32")
    seed: int = option("seed of the sampling", 0, at_least=0)
    resume: bool = option("go on after the rows that output already holds", False)

    def __post_init__(self):
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

    def __post_init__(self):
        super().__post_init__()
        tree = [self.tree_depth, self.tree_top_k, self.tree_nodes]
        if any(tree) and not all(tree):
            raise ValueError(f"A tree needs tree_depth, tree_top_k and tree_nodes, got {tree}.")
        if (self.window_size is not None or self.draft_threshold is not None) and any(tree):
            raise ValueError("window_size and draft_threshold are for chains, tree_* for trees: give one of the two.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DraftingConfig):
    """Measure a drafter: acceptance length, tokens per second and speedup over the plain target."""

    target: str = option("target model: Hub id or folder")
    drafter: str = option("drafter: Hub id or folder")
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

    def __post_init__(self):
        super().__post_init__()
        if not self.prompts or not self.temperatures:
            raise ValueError(f"prompts={self.prompts} and temperatures={self.temperatures} must not be empty.")


def _both_or_neither(target: str | None, drafter: str | None) -> None:
    if (target is None) != (drafter is None):
        raise ValueError(
            f"A drafter belongs to one target: give both or neither, got target={target!r} and drafter={drafter!r}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig(DraftingConfig):
    """Generate with and without a drafter on real prompts, side by side; without arguments, with the bundled pair."""

    target: str | None = option("target model: Hub id or folder; none: the bundled one", None)
    drafter: str | None = option("its drafter: Hub id or folder; none: the bundled one", None)
    prompts: str | None = option("a .jsonl file of prompts; none: the bundled ones", None)
    limit: int | None = option("prompts to run; none: all", None, at_least=1)
    max_new_tokens: int = option("tokens per answer", 128, at_least=1)
    temperature: float = option("0 is greedy", 0.0, at_least=0)
    repetitions: int = option("timed runs per prompt", 1, at_least=1)
    output: str | None = option("write the figures to this .json file", None)
    seed: int = option("seed of the sampling", 0, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        _both_or_neither(self.target, self.drafter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpaceConfig(Config):
    """Serve the page on which plain target and drafter race; without arguments, with the bundled pair."""

    target: str | None = option("target model: Hub id or folder; none: the bundled one", None)
    drafter: str | None = option("its drafter: Hub id or folder; none: the bundled one", None)
    baseline: str | None = option("a second drafter to race, such as the drafter's stage 1", None)
    host: str = option("address to listen on; 0.0.0.0: all", "127.0.0.1")
    port: int = option("port to listen on", 7860, at_least=0, at_most=65535)
    threads: int | None = option("CPU threads of torch; none: torch's choice", None, at_least=1)

    def __post_init__(self):
        super().__post_init__()
        _both_or_neither(self.target, self.drafter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig(Config):
    """Turn an EAGLE-3 drafter of another trainer into a PPOW drafter for plain transformers and `ppow reinforce`."""

    _positional = "source"

    source: str = option("the drafter: Hub id or folder")
    target: str = option("the target that it was trained for: Hub id or folder")
    out: str | None = option("folder to write; none: the drafter's name with -ppow, here", None)
    dry_run: bool = option("only print what would be mapped, dropped and assumed", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Write a PPOW drafter as a serving engine or another trainer reads it, and print the command that serves it."""

    _positional = "drafter"

    drafter: str = option("PPOW drafter: Hub id or folder")
    format: Literal["speculators", "vllm", "sglang", "specforge", "eagle"] = option("who is to read it")
    target: str | None = option("its target: Hub id or folder; none: as the drafter records it", None)
    out: str | None = option("folder to write; none: the drafter's name with the format, here", None)
    dry_run: bool = option("only print what would be mapped, dropped and assumed", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Train the small target of the bundled pair, tokenizer included, for a budget of tokens or minutes."""

    data: str = option("folder of GROUP-NN.jsonl.xz files with messages or text rows")
    output: str = option("folder for the model; its work/ keeps tokens and checkpoints")
    groups: list[str] = option(
        "group:weight[:max characters]; weight = expected copies of a row in one pass",
        ["math:3", "chat:1", "instruct:0.25:1200", "reasoning:0.15:1500"],
    )
    skip_bad_rows: bool = option(_SKIP, False)
    python_share: float = option("share of characters that is Python source", 0.1, at_least=0, below=1)
    python_packages: list[str] = option(
        "installed packages read besides the standard library; permissive licences only", []
    )
    heldout: float = option("share of rows held out", 0.005, at_least=0, below=1)
    # 256 bytes and 4 special tokens; the packed tokens are uint16.
    vocab_size: int = option("tokens of the byte-level BPE, special ones included", 4096, at_least=260, at_most=65536)
    num_layers: int = option("transformer blocks", 10, at_least=1)
    hidden_size: int = option("width of the residual stream", 192, at_least=1)
    intermediate_size: int = option("width of the MLP", 384, at_least=1)
    num_heads: int = option("query heads", 4, at_least=1)
    num_kv_heads: int = option("key and value heads", 2, at_least=1)
    max_positions: int = option("max_position_embeddings of the saved config", 2048, at_least=1)
    rope_theta: float = option("RoPE base", 10000.0, above=0)
    sequence_length: int = option("tokens in a packed training sequence", 512, at_least=2)
    batch_size: int = option("sequences in an optimizer step", 8, at_least=1)
    tokens: int = option("budget in training tokens; this or minutes", 0, at_least=0)
    minutes: float = option("budget in minutes of training; this or tokens", 0.0, at_least=0)
    optimizer: Literal["muon", "adamw"] = option("muon: matrices by Muon, the rest by AdamW", "muon")
    learning_rate: float = option("peak rate of AdamW", 4e-3, above=0)
    muon_learning_rate: float = option("peak rate of Muon", 1e-2, above=0)
    weight_decay: float = option("decay of the matrices, as a factor of their rate", 0.05, at_least=0)
    warmup: float = option("share of the budget in which the rate rises", 0.02, at_least=0, below=1)
    max_grad_norm: float = option("clip the gradient to this norm", 1.0, above=0)
    dtype: Literal["bfloat16", "float32"] = option("bfloat16: autocast over float32 weights", "bfloat16")
    device: Literal["cpu", "cuda"] = option("where to train", "cpu")
    compile_layers: bool = option("let torch.compile fuse what lies between a block's products", False)
    seed: int = option("seed of the split, the weights and the order", 0, at_least=0)
    checkpoint_minutes: float = option("minutes between checkpoints", 5.0, above=0)

    def __post_init__(self):
        super().__post_init__()
        if (self.tokens > 0) == (self.minutes > 0):
            raise ValueError(
                f"Give exactly one budget, --tokens 10000000 or --minutes 75; got tokens={self.tokens} and "
                f"minutes={self.minutes}."
            )
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide hidden_size={self.hidden_size}, and "
                f"num_kv_heads={self.num_kv_heads} must divide num_heads."
            )
        for group in self.groups:
            parse_group(group)


def parse_group(text: str) -> tuple[str, float, int]:
    """``name:weight[:max_chars]`` -> (name, weight, max_chars); without a limit, ``sys.maxsize``."""
    name, *numbers = text.split(":")
    try:
        weight = float(numbers[0])
        max_chars = int(numbers[1]) if len(numbers) > 1 else sys.maxsize
    except (IndexError, ValueError):
        weight, max_chars = -1.0, 0
    if not name or len(numbers) > 2 or not 0 < weight < float("inf") or max_chars <= 0:
        raise ValueError(f"group {text!r} must be name:weight[:max characters], positive numbers, as in chat:1:1500.")
    return name, weight, max_chars


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

    def __post_init__(self):
        super().__post_init__()
        if self.tag and self.create_pr:
            raise ValueError("A pull request is tagged after it was merged: give --tag or --create-pr, not both.")
        if self.baseline and not self.space:
            raise ValueError(f"--baseline {self.baseline} is raced in a Space: give it with --space.")
