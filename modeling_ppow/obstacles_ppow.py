"""What keeps a call from the fast path: where its models lie, what they are, how it is made, and memory."""

import torch
from transformers import PreTrainedModel

from .graphs_ppow import PREFILL, SHORT_PROMPT, unrecorded
from .probe_ppow import PROMPT, is_known, trial
from .prompt_ppow import Prompt
from .target_ppow import has_hooks, is_split
from .triton_ppow import HAS_TRITON

SPARE = 0.1  # of a GPU's memory, which others need: buffers of more than one batch size, or of twice the room, leave it


def place_obstacle(target: PreTrainedModel, drafter: PreTrainedModel) -> str | None:
    """Why graphs cannot be recorded where the pair lies; None if they can."""
    obstacles = {
        "the target is not on a GPU": target.device.type != "cuda",
        "accelerate moves the target's weights": any(hasattr(module, "_hf_hook") for module in target.modules()),
        "tensor parallelism has split the target's weights": is_split(target),
        "triton is not installed": not HAS_TRITON,
        "the models are spread over devices": len({p.device for m in (target, drafter) for p in m.parameters()}) > 1,
        "the target computes in float64": target.dtype == torch.float64,
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def call_obstacle(target: PreTrainedModel, prompt: Prompt) -> str | None:
    """What about the target or the call the fast path cannot serve; None if nothing."""
    valid = prompt.valid
    if prompt.start > 0:
        return "the call continues a cache"
    if valid is not None and bool((valid[:, 1:] < valid[:, :-1]).any()):
        return "the padding is not on the left"
    if torch.is_autocast_enabled(target.device.type):
        return "autocast is on, whose casts would be part of the graphs"
    if has_hooks(target):
        return "hooks watch the target's modules, and graphs call none"
    return target_obstacle(target)


def target_obstacle(target: PreTrainedModel) -> str | None:
    """What about a target the fast path cannot serve, by its configuration and its modules' names; None if nothing."""
    config = target.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    experts = bool(getattr(config, "num_experts", getattr(config, "num_local_experts", 0)))  # not every class says so
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    obstacles = {
        "the target's attention cannot be exchanged": not getattr(target, "_supports_attention_backend", False),
        "the target caps its attention logits": getattr(config, "attn_logit_softcapping", None) is not None,
        "the target routes to experts": experts or any("expert" in name for name, _ in target.named_modules()),
        "the target's positions change with the length": bool(kinds & {"dynamic", "longrope"}),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def attention_obstacle(target: PreTrainedModel) -> str | None:
    """How a target that the tests do not walk fails under this module's attention, tried once; None if it does not."""
    return None if is_known(target) else trial(target, "fast", PROMPT, unrecorded)


def shortage(
    target: PreTrainedModel, drafter: PreTrainedModel, batch: int, capacity: int, more: int = 0, spare: bool = False
) -> str | None:
    """Why ``batch`` rows of ``capacity`` slots do not fit into the GPU's memory; None if they do.

    Args:
        more: bytes beside them; below 0: that could be freed.
        spare: leave some for others, too.
    """
    needed, free = path_bytes(target, drafter, batch, capacity) + max(0, more), free_bytes(target.device) - min(0, more)
    if spare:
        needed += int(SPARE * total_bytes(target.device))
    if needed <= free:
        return None
    return (
        f"{batch} x {capacity} cache slots, and what belongs to them, need {needed / 2**30:.1f} GiB and "
        f"{free / 2**30:.1f} GiB are free (lower max_new_tokens or the batch)"
    )


def path_bytes(target: PreTrainedModel, drafter: PreTrainedModel, batch: int, capacity: int) -> int:
    """What a :class:`FastPath` takes: keys and values, and the logits of a prompt's graphs."""
    own, vocabulary = drafter.config, target.config.get_text_config(decoder=True).vocab_size
    entry = slot_bytes(target)
    entry += 2 * own.num_hidden_layers * own.num_key_value_heads * own.head_dim * drafter.dtype.itemsize
    needed = batch * capacity * entry
    if batch * PREFILL <= SHORT_PROMPT:
        needed += (3 if batch == 1 else batch) * PREFILL * vocabulary * target.dtype.itemsize
    return needed


def slot_bytes(target: PreTrainedModel) -> int:
    """Bytes that a target's keys and values of one token take."""
    config = target.config.get_text_config(decoder=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * key_heads(target) * head * target.dtype.itemsize


def key_heads(target: PreTrainedModel) -> int:
    """Heads that a target's keys and values have."""
    config = target.config.get_text_config(decoder=True)
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nothing uses, what this process holds in reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def total_bytes(device: torch.device) -> int:
    """Memory of a GPU."""
    return torch.cuda.mem_get_info(device)[1]


def longest_text(target: PreTrainedModel) -> int:
    """Slots of the longest text that a target has positions for, with a window behind it."""
    longest = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 62
    return longest + PREFILL
