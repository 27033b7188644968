"""What one optimizer step of either stage will take: memory and time, before any weight is loaded.

    ppow reinforce --plan h200 --target TARGET --drafter runs/stage1 --data CHATS --output-dir runs/stage2 ...

The figures follow from the configurations alone. Memory is the largest of the step's phases, counted tensor by tensor;
matrix products are counted exactly (the tests compare with a counter of executed operations), and so are the bytes of
the large tensors. The time is a bound: no step is faster than its products at the device's rate, or its bytes at the
device's bandwidth (of ``here``: those that a product and a copy reach, so nearly a bound). ``benchmarks/rollouts.py``
measures the same steps and writes both side by side. All formulas are ours.

Counted for texts of ``max_length`` tokens that are answers throughout, so a real step takes less.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ppow import PPOWConfig, PPOWDrafter
from ppow.probe_ppow import check_rope
from ppow.target_ppow import check_kind, decoder_layers

from .blocks import ROWS
from .config import ReinforceConfig, SupervisedConfig
from .objectives import objective_of
from .text_windows import KEPT, LOGITS

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Ceilings: bytes of memory, bytes/s of it, dense operations/s of a matrix product in each dtype."""

    name: str
    memory: float
    bandwidth: float
    rate: dict[str, float]


# Datasheets of the makers (dense, without sparsity); float32 is TF32 off, as torch leaves it.
DEVICES = {
    "a100": Device("NVIDIA A100 80GB SXM", 80e9, 2.04e12, {"bfloat16": 312e12, "float32": 19.5e12}),
    "h100": Device("NVIDIA H100 SXM", 80e9, 3.35e12, {"bfloat16": 989e12, "float32": 67e12}),
    "h200": Device("NVIDIA H200 SXM", 141e9, 4.8e12, {"bfloat16": 989e12, "float32": 67e12}),
}
# Measured over bound, least and most: steps of both stages at the shape of Llama-3.1-8B on H100s, one text of 1,024
# tokens (benchmarks/results/rollouts-llama-3.1-8b-h100*.json; a test computes them)
MEASURED = (2.7, 9.5)
# Seconds that stock generate() took per token and layer at the shape of Llama-3.1-8B on an H200 and an H100, which is
# what starting its kernels takes (benchmarks/results/decoding-llama-3.1-8b*.json; a test computes it)
EAGER = 0.83e-3


def this_device() -> Device:
    """The machine's own accelerator or CPU, its ceilings measured in a second."""
    cuda = torch.cuda.is_available()
    where, size = ("cuda", 4096) if cuda else ("cpu", 512)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    memory = torch.cuda.mem_get_info()[1] if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rates = {}
    for dtype in ("bfloat16", "float32"):
        a = torch.randn(size, size, device=where, dtype=getattr(torch, dtype))
        rates[dtype] = 2 * size**3 / _seconds(functools.partial(torch.matmul, a, a), cuda)
    block = torch.empty(2**28 if cuda else 2**24, dtype=torch.uint8, device=where)
    return Device(name, memory, 2 * block.numel() / _seconds(block.clone, cuda), rates)


def _seconds(work: Callable[[], Any], cuda: bool, times: int = 5) -> float:
    work()
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


class Shape:
    """Sizes of target and drafter, from models that exist without memory (on torch's meta device)."""

    def __init__(self, target_config: PreTrainedConfig, drafter_config: PPOWConfig):
        config = target_config.get_text_config(decoder=True)
        with torch.device("meta"):
            target = AutoModelForCausalLM.from_config(target_config)
            drafter = PPOWDrafter.class_for(drafter_config.architecture)(drafter_config)
        check_kind(target)
        self.target_parameters = sum(p.numel() for p in target.parameters())
        used = sum(p.numel() for p in decoder_layers(target).parameters() if p.dim() >= 2)
        experts = sum(p.numel() for name, p in target.named_parameters() if ".experts." in name)
        if experts:
            count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
            used -= experts * (1 - config.num_experts_per_tok / count)
        self.target_used = used  # weights of the blocks that a token meets
        self.vocabulary, self.hidden = config.vocab_size, config.hidden_size
        self.layers, self.inner = config.num_hidden_layers, getattr(config, "intermediate_size", 4 * config.hidden_size)
        self.heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads

        self.drafter = drafter_config
        self.fuse = drafter.fc.weight.numel()
        self.step = sum(p.numel() for p in drafter.layers.parameters() if p.dim() >= 2)
        rows = drafter_config.draft_vocab_size or self.vocabulary
        self.frozen_head = rows * self.hidden if drafter_config.share_target_head else 0  # the target's
        self.borrowed = self.frozen_head if rows < self.vocabulary else 0  # copied, side by side
        self.head = self.frozen_head or drafter.lm_head.weight.numel()
        self.head += drafter_config.markov_rank * self.vocabulary
        both = "k_proj.weight", "v_proj.weight"
        self.context = sum(p.numel() for name, p in drafter.named_parameters() if name.endswith(both))
        self.drafter_parameters = sum(p.numel() for p in drafter.parameters())
        embedding = drafter.get_input_embeddings()
        frozen = embedding is not None and drafter_config.hidden_size == drafter_config.target_hidden_size
        self.trained = self.drafter_parameters - (embedding.weight.numel() if frozen else 0)


def show(
    config: SupervisedConfig | ReinforceConfig, target_config: PreTrainedConfig, drafter_config: PPOWConfig
) -> dict[str, Any]:
    """Print the plan of a stage for ``config.plan``: a device of ``DEVICES``, or this one."""
    device = this_device() if config.plan == "here" else DEVICES[config.plan]
    found = plan(config, target_config, drafter_config, device)
    memory, seconds = dict(found["memory_gib"]), found["seconds"]
    total, available = memory.pop("total"), memory.pop("available")
    texts = f"texts of {config.max_length} tokens that are answers throughout; others take less"
    print(f"One optimizer step of `ppow {config.command()}` on {device.name}, per process, for {texts}.")
    print("Memory, at most:")
    for name, value in memory.items():
        print(f"  {value:9.2f} GiB  {name}")
    print(f"  {total:9.2f} GiB  together, of {available:.0f} GiB")
    for name, value in found["operations"].items():
        print(f"  {value / 1e12:9.2f} TFLOP  {name}")
    least = max(seconds.values())
    parts = ", ".join(f"{name} {value:.3g}" for name, value in seconds.items())
    print(f"  {least:9.3g} s at least at the device's rates ({parts})")
    low, high = (f"{config.steps * least * factor / 60:.3g}" for factor in MEASURED)
    times = f"{MEASURED[0]} to {MEASURED[1]} times its least, as steps with an 8B target did when they were measured"
    print(f"{config.steps} steps: {low} to {high} min, if each takes {times}.")
    if total > available:
        print(
            "This does not fit. Lower batch_size (raise accumulation instead), max_length or max_forest_nodes, use "
            "dtype=bfloat16, or spread the target with shard_target."
        )
    return found


def plan(
    config: SupervisedConfig | ReinforceConfig,
    target_config: PreTrainedConfig,
    drafter_config: PPOWConfig,
    device: Device,
) -> dict[str, Any]:
    """Memory and time of one optimizer step of one process.

    Args:
        config: of the stage; texts are taken to have ``max_length`` tokens, all of them answer.
        target_config, drafter_config: of the pair.
        device: its ceilings.

    Returns:
        memory_gib: parts by name, with ``total`` (the peak) and ``available``; operations: of matrix products, by part;
        seconds: that the products take at least (``products``), and the bytes (``memory``).

    Rollouts with a proximity bonus continue the target's argmax after windows whose first draft was rejected, one
    token a forward, where the text is not that continuation: counted in time, as if every step had such a window, but
    not in operations, which are few.

    Raises:
        ValueError: for a target that decoding would refuse, as far as its configuration tells.
    """
    check_rope(target_config, start=0, prompt=1, end=config.max_length)
    step = _Step(config, Shape(target_config, drafter_config))
    standing, passing = step.standing(), step.passing()
    phase = max(passing, key=lambda name: passing[name])
    memory = {**standing, f"the step's largest phase ({phase})": passing[phase]}
    memory = {name: value / GIB for name, value in memory.items()}
    memory |= {"total": sum(memory.values()), "available": device.memory / GIB}
    operations = {name: value * config.accumulation for name, value in step.operations().items()}
    seconds = {
        "products": sum(operations.values()) / device.rate[config.dtype],
        "memory": step.moved() * config.accumulation / device.bandwidth,
    }
    return {"device": device.name, "memory_gib": memory, "operations": operations, "seconds": seconds}


class _Step:
    """What one micro step of a stage computes, keeps and moves: counts of states, then sums over them."""

    def __init__(self, config: SupervisedConfig | ReinforceConfig, shape: Shape):
        self.config, self.shape = config, shape
        self.half = config.dtype == "bfloat16"
        self.bytes = 2 if self.half else 4  # of a number
        self.batch, self.length, self.pairs = config.batch_size, config.max_length, config.max_length - 1
        self.reinforce = isinstance(config, ReinforceConfig)
        self.rolls = self.reinforce and objective_of(config).batch == "rollouts"
        self.block = shape.drafter.block_size if shape.drafter.is_block else 0  # rows of a window's one forward
        self.size = config.window_size if self.reinforce else shape.drafter.longest_window or config.ttt_steps
        if self.rolls:
            self.rows = config.windows_per_sequence * config.group_size
        else:
            self.rows = min(config.windows_of(self.block) or self.pairs, self.pairs)
        self.nodes = self.rows * (self.size - 1)  # after the first, of each text
        self.forest = 0  # of them, verified in one forward
        if self.rolls:
            at_once = max(1, config.max_forest_nodes // (self.size * self.batch))
            self.forest = min(self.nodes, at_once * (self.size - 1))
        self.states = self.batch * self.rows * self.size  # at which the drafter is compared with the target
        kept = config.compile_loss and self.states * int(shape.drafter.draft_vocab_size or 0) <= KEPT
        self.along = (self.reinforce or self.block > 0) and not self.rolls  # by windows of the texts
        self.again = self.along and not kept  # logits are computed twice
        beside = self.rolls and config.supervised_coef  # a supervised term beside rollouts
        self.taught = self.batch * self.pairs * self.size if beside else 0  # its states
        self.inside = shape.drafter.num_hidden_layers
        self.narrow = shape.drafter.num_attention_heads * shape.drafter.head_dim
        self.seen = shape.drafter.num_attention_heads * self.pairs * (self.bytes + 4)  # attention weights, kept twice

    # -- operations of matrix products: two per weight and token, attention over everything that is there

    def _read(self, tokens: int, seen: int) -> float:
        shape = self.shape
        attention = 4 * shape.layers * shape.heads * shape.head_dim * seen
        return self.batch * tokens * (2 * (shape.target_used + shape.vocabulary * shape.hidden) + attention)

    def _unroll(self, rows: int) -> float:  # a text's pairs, then windows over them
        if self.block:
            seen = self.length + min(rows, max(1, ROWS // self.block)) * self.block
            own = 2 * self.shape.step + 4 * self.inside * self.narrow * seen
            return self.batch * (self.length * 2 * (self.shape.fuse + self.shape.context) + rows * self.block * own)
        own = 2 * self.shape.step + 4 * self.inside * self.narrow * self.pairs
        return self.batch * (self.pairs * (2 * self.shape.fuse + own) + rows * (self.size - 1) * own)

    def operations(self) -> dict[str, float]:
        head, states, taught = 2 * self.shape.head, self.states, self.taught
        learnt = 3 * head - 2 * self.shape.frozen_head  # 1 forward, 2 backward, but of a frozen head no gradient itself
        found = {"target reads": self._read(self.length, self.length) * (2 if taught else 1)}
        if self.rolls:
            drawn = self._unroll(self.rows) + head * states
            criticality = head * self.batch * self.pairs + (self._unroll(self.pairs) if self.block else 0)
            found["target verifies"] = self._read(self.nodes, self.length + self.forest)
            found["drafter draws"] = drawn + criticality  # which is that of the whole text
            found["drafter learns"] = 3 * self._unroll(self.rows) + learnt * states
            found["drafter learns"] += 3 * self._unroll(self.pairs) + learnt * taught if taught else 0
            return found
        found["drafter learns"] = 3 * self._unroll(self.rows) + (learnt + head * self.again) * states
        return found

    # -- bytes

    def _reading(self) -> float:
        """The target's logits and taps along the texts."""
        shape = self.shape
        numbers = shape.vocabulary + len(shape.drafter.target_taps) * shape.hidden
        return self.batch * self.length * numbers * self.bytes

    def standing(self) -> dict[str, float]:
        """Bytes that are there all the time."""
        shape, e = self.shape, self.bytes
        frozen = (shape.drafter_parameters - shape.trained) * 4
        mean = 4 * shape.trained if self.config.average_from < 1 else 0
        cached = self.batch * (self.length + self.forest) if self.rolls else 0
        return {
            "target": (shape.target_parameters + shape.borrowed) * e,
            "drafter, gradient, optimizer": (16 + e * self.half) * shape.trained + frozen + mean,
            "target's word on the text": self._reading()
            + 2 * shape.layers * shape.kv_heads * shape.head_dim * cached * e,
        }

    def passing(self) -> dict[str, float]:
        """Bytes of each phase of the step, gone before the next."""
        shape, e, batch, states = self.shape, self.bytes, self.batch, self.states
        h, d = shape.drafter.hidden_size, int(shape.drafter.draft_vocab_size or 0)
        # kept of a drafter's layer and row, for the way back
        layer = (12 * h + 4 * self.narrow + 4 * shape.drafter.intermediate_size) * e + 12 * h

        def kept(rows: int) -> float:
            if self.block:
                inside = self.length + min(rows * self.block, ROWS)  # keys of a row; its mask serves all layers
                entries = 2 * self.narrow * (self.length + rows * self.block) * e
                mask = rows * self.block * inside * 4
                return batch * (rows * self.block * self.inside * layer + self.inside * entries + mask)
            windows = batch * rows * (self.size - 1) * self.inside * (layer + self.seen)
            return batch * self.pairs * self.inside * layer + windows

        found = {"target reads": batch * self.length * (3 * shape.inner + 4 * shape.hidden) * e}
        if self.rolls:
            judged = batch * self.forest
            found["target verifies"] = judged * (shape.vocabulary * 2 + 3 * shape.inner) * e + states * d * e
            found["learning"] = kept(self.rows) + states * d * (3 * e + 6 * 4)
        else:
            one = min(batch * self.rows * d, max(LOGITS, d)) if self.again else batch * self.rows * d
            saved = 0 if self.again else states * d * (e + 4)
            numbers = 2 * e + (8 if self.again else 3) * 4
            labels = 0 if d == shape.vocabulary and self.along else batch * self.length * d * e
            found["learning"] = kept(self.rows) + labels + saved + one * numbers
        if self.taught:
            found["learning"] += kept(self.pairs) + self.taught * d * (e + 4)
        return found

    def moved(self) -> float:
        """Bytes read and written."""
        shape, e, d = self.shape, self.bytes, self.shape.drafter.draft_vocab_size
        weights = shape.target_parameters * e * self._forwards()
        logits = self.batch * self.nodes * shape.vocabulary * (2 * e + 12) if self.rolls else 0  # and their norms
        # float32 numbers read or written per logit: counted in objectives.compare, run twice, and its way back
        numbers = 115 if self.again else 24
        compared = (self.states + self.taught) * d * (4 * e + numbers * 4)
        attention = 3 * self.batch * self.rows * (self.size - 1) * self.inside * 3 * self.seen
        return weights + 40 * shape.trained + 4 * self._reading() + logits + compared + attention

    def _forwards(self) -> int:
        """Of the target."""
        continued = self.size - 1 if self.rolls and self.config.proximity_bonus else 0
        return 1 + self.rolls + continued
