"""What one optimizer step of either stage will take: memory and time, before any weight is loaded.

    ppow reinforce --plan h200 --target TARGET --drafter runs/stage1 --data CHATS --output-dir runs/stage2 ...

The figures follow from the configurations alone. Memory is the largest of the step's phases, counted tensor by tensor;
matrix products are counted exactly (the tests compare with a counter of executed operations), and their time comes
from the device's rate. Around them stand the reading and writing of the large tensors at the device's bandwidth, and
the time that the host takes to launch kernels, below which no step gets. ``benchmarks/rollouts.py`` measures the same
steps and writes both side by side. All formulas are ours.

Counted for texts of ``max_length`` tokens that are answers throughout, so a real step takes less.
"""

import os
import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ppow import PPOWConfig, PPOWDrafter

from .config import ReinforceConfig, SupervisedConfig
from .objectives import objective_of

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Ceilings: bytes of memory, bytes/s of it, dense operations/s of a matrix product in each dtype."""

    name: str
    memory: float
    bandwidth: float
    rate: dict[str, float]
    launch: float = 25e-6  # seconds of the host per kernel of a model's block, eager; as measured beside H100s


# Datasheets of the makers (dense, without sparsity); float32 is TF32 off, as torch leaves it.
DEVICES = {
    "a100": Device("NVIDIA A100 80GB SXM", 80e9, 2.04e12, {"bfloat16": 312e12, "float32": 19.5e12}),
    "h100": Device("NVIDIA H100 SXM", 80e9, 3.35e12, {"bfloat16": 989e12, "float32": 67e12}),
    "h200": Device("NVIDIA H200 SXM", 141e9, 4.8e12, {"bfloat16": 989e12, "float32": 67e12}),
}
EFFICIENCY = {
    "matmul": 0.6,
    "memory": 0.8,
}  # of a ceiling, what real products and copies reach
LARGE_PRODUCT = 0.8  # of a ceiling, what a single large product reaches
KERNELS_PER_BLOCK = 20


def this_device() -> Device:
    """The machine's own accelerator or CPU, its ceilings measured in a second."""
    cuda = torch.cuda.is_available()
    where, size = ("cuda", 4096) if cuda else ("cpu", 512)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    memory = torch.cuda.mem_get_info()[1] if cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rates = {}
    for dtype in ("bfloat16", "float32"):
        a = torch.randn(size, size, device=where, dtype=getattr(torch, dtype))
        rates[dtype] = 2 * size**3 / _seconds(lambda a=a: a @ a, cuda) / LARGE_PRODUCT
    block = torch.empty(2**28 if cuda else 2**24, dtype=torch.uint8, device=where)
    copy = 2 * block.numel() / _seconds(block.clone, cuda) / EFFICIENCY["memory"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    blocks = 16  # far too small for anything but the launches to take time
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=16, num_hidden_layers=blocks)).to(where)
    ids = torch.zeros(1, 1, dtype=torch.long, device=where)
    with torch.no_grad():
        launch = _seconds(lambda: model(ids, use_cache=False), cuda) / (blocks * KERNELS_PER_BLOCK)
    return Device(name, memory, copy, rates, launch)


def _seconds(work, cuda: bool, times: int = 5) -> float:
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

    def __init__(self, target_config, drafter_config: PPOWConfig):
        config = target_config.get_text_config(decoder=True)
        with torch.device("meta"):
            target, drafter = AutoModelForCausalLM.from_config(target_config), PPOWDrafter(drafter_config)
        self.target_parameters = sum(p.numel() for p in target.parameters())
        used = sum(p.numel() for p in target.get_decoder().layers.parameters() if p.dim() >= 2)
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
        self.head = drafter.lm_head.weight.numel()
        self.drafter_parameters = sum(p.numel() for p in drafter.parameters())
        embedding = drafter.get_input_embeddings()
        frozen = embedding is not None and drafter_config.hidden_size == drafter_config.target_hidden_size
        self.trained = self.drafter_parameters - (embedding.weight.numel() if frozen else 0)


def show(config: SupervisedConfig | ReinforceConfig, target_config, drafter_config: PPOWConfig) -> dict:
    """Print the plan of a stage for ``config.plan``: a device of ``DEVICES``, or this one."""
    device = this_device() if config.plan == "here" else DEVICES[config.plan]
    found = plan(config, target_config, drafter_config, device)
    memory, seconds = dict(found["memory_gib"]), found["seconds"]
    total, available = memory.pop("total"), memory.pop("available")
    print(f"One optimizer step of `ppow {config.command()}` on {device.name}, per process, at most:")
    for name, value in memory.items():
        print(f"  {value:9.2f} GiB  {name}")
    print(f"  {total:9.2f} GiB  together, of {available:.0f} GiB")
    for name, value in found["operations"].items():
        print(f"  {value / 1e12:9.2f} TFLOP  {name}")
    parts = ", ".join(f"{name} {value:.3g}" for name, value in seconds.items() if name != "total")
    minutes = config.steps * seconds["total"] / 60
    print(f"  {seconds['total']:9.3g} s or so ({parts}); {config.steps} steps: {minutes:.0f} min")
    if total > available:
        print(
            "This does not fit. Lower batch_size (raise accumulation instead), max_length or max_forest_nodes, use "
            "dtype=bfloat16, or spread the target with shard_target."
        )
    return found


def plan(config: SupervisedConfig | ReinforceConfig, target_config, drafter_config: PPOWConfig, device: Device) -> dict:
    """Memory and time of one optimizer step of one process.

    Args:
        config: of the stage; texts are taken to have ``max_length`` tokens, all of them answer.
        target_config, drafter_config: of the pair.
        device: its ceilings.

    Returns:
        memory_gib: parts by name, with ``total`` (the peak) and ``available``; operations: of matrix products, by part;
        seconds: matmul, memory, launch, and ``total``.

    Rollouts with a proximity bonus continue the target's argmax behind windows whose first draft was rejected, one
    token a forward, where the text is not that continuation: counted in time, as if every step had such a window, but
    not in operations, which are few.
    """
    shape = Shape(target_config, drafter_config)
    half = config.dtype == "bfloat16"
    e, batch, length = (2 if half else 4), config.batch_size, config.max_length
    pairs = length - 1
    reinforce = isinstance(config, ReinforceConfig)
    rolls = reinforce and objective_of(config).batch == "rollouts"
    size = config.window_size if reinforce else config.ttt_steps
    d, h = shape.drafter.draft_vocab_size, shape.drafter.hidden_size
    if rolls:
        rows = config.windows_per_sequence * config.group_size
    else:
        rows = pairs if not reinforce or config.all_windows else config.windows_per_sequence
    nodes = rows * (size - 1)  # behind the first, of each text
    forest = min(nodes, max(1, config.max_forest_nodes // (size * batch)) * (size - 1)) if rolls else 0
    states = batch * rows * size  # at which the drafter is compared with the target
    taught = batch * pairs * size if rolls and config.supervised_coef else 0  # the supervised term beside rollouts

    # -- operations of matrix products: two per weight and token, attention over everything that is there
    wide, narrow = shape.heads * shape.head_dim, shape.drafter.num_attention_heads * shape.drafter.head_dim
    inside = shape.drafter.num_hidden_layers

    def read(tokens: int, seen: int) -> float:
        attention = 4 * shape.layers * wide * seen
        return batch * tokens * (2 * (shape.target_used + shape.vocabulary * shape.hidden) + attention)

    def unroll(rows: int, steps: int) -> float:  # a text's pairs, then windows over them
        own = 2 * shape.step + 4 * inside * narrow * pairs
        return batch * (pairs * (2 * shape.fuse + own) + rows * (steps - 1) * own)

    operations = {"target reads": read(length, length) * (2 if taught else 1)}
    draws = 2 if reinforce and config.objective == "gto" else 1  # the reference draws and is verified as well
    if rolls:
        operations["target verifies"] = read(nodes, length + forest)
        operations["target verifies"] *= draws
        operations["drafter draws"] = draws * (unroll(rows, size) + 2 * shape.head * states)
        operations["drafter draws"] += 2 * shape.head * batch * pairs  # criticality of the whole text
        operations["drafter learns"] = 3 * (unroll(rows, size) + 2 * shape.head * states)  # 1 forward, 2 backward
        operations["drafter learns"] += 3 * (unroll(pairs, size) + 2 * shape.head * taught) if taught else 0
    else:
        again = 4 if reinforce else 3  # stage 2 computes its logits a second time on the way back
        operations["drafter learns"] = 3 * unroll(rows, size) + again * 2 * shape.head * states
        if reinforce and not config.all_windows:
            operations["drafter learns"] += 2 * shape.head * batch * pairs  # criticality

    # -- memory
    layer = (
        12 * h + 4 * narrow + 4 * shape.drafter.intermediate_size
    ) * e + 12 * h  # kept of a drafter's layer and row
    seen = shape.drafter.num_attention_heads * pairs * (e + 4)  # attention weights, kept twice
    kept = batch * pairs * inside * layer + batch * rows * (size - 1) * inside * (layer + seen)
    reading = batch * length * (shape.vocabulary * e + len(shape.drafter.target_taps) * shape.hidden * e)
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * batch * (length + forest) * e if rolls else 0
    reference = shape.drafter_parameters * 4 if reinforce and config.objective == "gto" else 0
    frozen = (shape.drafter_parameters - shape.trained) * 4
    mean = 4 * shape.trained if config.average_from < 1 else 0
    drafter = 16 * shape.trained + frozen + reference + mean + (e * shape.trained if half else 0)
    standing = {
        "target": shape.target_parameters * e,
        "drafter, gradient, optimizer": drafter,
        "target's word on the text": reading + cache,
    }
    passing = {"target reads": batch * length * (3 * shape.inner + 4 * shape.hidden) * e}
    if rolls:
        judged = batch * min(rows * (size - 1), forest)
        passing["target verifies"] = judged * (shape.vocabulary * 2 * e + 3 * shape.inner * e) + states * d * e
        passing["learning"] = kept + states * d * (3 * e + 6 * 4)
    else:
        one = batch * rows * d
        saved = 0 if reinforce else states * d * (e + 4)
        passing["learning"] = kept + batch * length * d * e + saved + one * (2 * e + (8 if reinforce else 3) * 4)
    if taught:
        beside = batch * pairs * (inside * layer + (size - 1) * inside * (layer + seen)) + taught * d * (e + 4)
        passing["learning"] += beside
    phase = max(passing, key=passing.get)
    memory = {**standing, f"the step's largest phase ({phase})": passing[phase]}
    memory = {name: value / GIB for name, value in memory.items()}
    memory |= {"total": sum(memory.values()), "available": device.memory / GIB}

    # -- time
    moved = shape.target_parameters * e * (1 + rolls * draws) + 40 * shape.trained + 4 * reading
    moved += batch * nodes * shape.vocabulary * (2 * e + 12) if rolls else 0  # the forest's logits and their norms
    # float32 numbers read or written per logit: counted in objectives.compare, run twice, and its way back
    numbers = 115 if reinforce and not rolls else 24
    moved += (states + taught) * d * (4 * e + numbers * 4) + 3 * batch * rows * (size - 1) * inside * 3 * seen
    forwards = 1 + rolls * draws  # of the target
    if rolls and config.proximity_bonus:
        forwards += size - 1
        moved += (size - 1) * shape.target_parameters * e
    kernels = shape.layers * KERNELS_PER_BLOCK * forwards + size * inside * 80 * 3 + size * 60 * (1 + rolls) + 300
    total = sum(operations.values()) * config.accumulation
    seconds = {
        "matmul": total / device.rate[config.dtype] / EFFICIENCY["matmul"],
        "memory": moved * config.accumulation / device.bandwidth / EFFICIENCY["memory"],
        "launch": kernels * config.accumulation * device.launch,
    }
    seconds["total"] = max(seconds["matmul"] + seconds["memory"], seconds["launch"])
    operations = {name: value * config.accumulation for name, value in operations.items()}
    return {"device": device.name, "memory_gib": memory, "operations": operations, "seconds": seconds}
