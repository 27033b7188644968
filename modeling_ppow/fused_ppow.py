"""Norms, rotary embeddings and gates as one kernel each, for the twins that graphs record (:mod:`recording_ppow`).

Between a decoder layer's products lie some thirty small kernels when torch runs a model as it is written, and for the
few rows of a window each costs its start, not its arithmetic. Here a norm, the rotation of queries and keys, and the
gate of an MLP are one kernel each. A module is exchanged only where it agrees with the kernel on random numbers, up to
a rounding; what is written otherwise runs as it is.
"""

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .triton_ppow import HAS_TRITON, INTERPRETED, tl, triton

ROTATION = "apply_rotary_pos_emb"  # transformers' name for the rotation of queries and keys
GATED = "gate_proj", "up_proj", "down_proj"  # and for the products of a gated MLP
MANY_NODES = 4096  # keep a GPU busy though one program rotates all heads of one
LARGE = 30.0  # deviation of a gate's input that shows whether an MLP clamps
GAIN_AFTER, ONE_MORE, GAIN_BEFORE = range(3)  # a norm rounds before its gain, has the gain 1 + w, or rounds after it


def fuse(model: PreTrainedModel) -> None:
    """Let a model's norms, rotations and gates compute as one kernel each, where that is the same.

    Args:
        model: a twin, whose modules nobody else uses. On a CPU it is left as it is.
    """
    if not HAS_TRITON or not (INTERPRETED or model.device.type == "cuda"):
        return
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    kinds: dict[tuple, type | None] = {}  # what becomes of modules of one class, tried once
    for module in model.modules():
        activation = getattr(module, "act_fn", getattr(module, "act", None))
        numbers = tuple(item for item in vars(module).items() if isinstance(item[1], (bool, float)))  # limits, scales
        key = type(module), numbers, type(activation), getattr(getattr(module, "weight", None), "dtype", None)
        if key not in kinds:
            try:
                kinds[key] = _fused_kind(module, activation, like)
            except Exception:  # whatever a module raises that wants something else than is tried
                kinds[key] = None
        kind = kinds[key]
        if kind is not None:
            module.__class__ = kind


@torch.no_grad()
def _fused_kind(module: nn.Module, activation: Callable | None, like: torch.Tensor) -> type | None:
    """A class that computes what the module's does, by fewer kernels; None where there is none.

    ``like`` has the device and type of what modules are given.
    """
    own: Any = module
    weight: Any = getattr(module, "weight", None)
    forward: Any = None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    alone = len(inspect.signature(own.forward).parameters) == 1  # nothing but x, such as a gate
    if alone and type(module).__name__.endswith("RMSNorm") and isinstance(weight, torch.Tensor) and eps is not None:
        x = _random(like, 1, 3, len(weight))
        shadow: Any = copy.deepcopy(module)  # with a gain that tells the styles apart
        shadow.weight.data = weight = _random(weight, len(weight)) / 2
        expected = shadow(x)
        style = min(range(3), key=lambda style: float((rms_norm(x, weight, eps, style) - expected).abs().max()))
        if _agree(rms_norm(x, weight, eps, style), expected):
            forward = functools.partialmethod(_norm, eps=eps, style=style)
    elif alone and activation is not None and all(isinstance(getattr(module, n, None), nn.Module) for n in GATED):
        x, gate = _random(like, 1, 3, own.gate_proj.in_features), 3 * _random(like, 1000)
        given = x, x * (LARGE / own.gate_proj(x).float().std()).to(x)
        if _agree(nn.functional.silu(gate), activation(gate)) and all(_agree(_gate(own, x), own(x)) for x in given):
            forward = _gate
    else:
        forward = _with_rotation(type(own), like)
    return None if forward is None else type(type(module).__name__, (type(module),), {"forward": forward})


def _random(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)


def _agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Up to two roundings of their type, in the mean; of float32 a little more, whose sums come in another order."""
    step = max(2 * torch.finfo(theirs.dtype).eps, 1e-5)
    return ours.dtype == theirs.dtype and bool((ours - theirs).float().norm() <= step * theirs.float().norm())


def _norm(module: Any, x: torch.Tensor, eps: float, style: int) -> torch.Tensor:
    return rms_norm(x, module.weight, eps, style)


def _gate(module: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))
    return out


def _with_rotation(kind: Any, like: torch.Tensor) -> Callable | None:
    """The forward of an attention class with :func:`rotated` in it; None where it rotates otherwise, or not at all."""
    inner = inspect.unwrap(kind.forward)
    rotation: Any = getattr(inner, "__globals__", {}).get(ROTATION)
    if not isinstance(inner, types.FunctionType) or ROTATION not in inner.__code__.co_names:
        return None
    if list(inspect.signature(rotation).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    query, key, cos, sin = (_random(like, *shape) for shape in ((1, 2, 3, 64), (1, 1, 3, 64), (1, 3, 64), (1, 3, 64)))
    pairs = zip(rotated(query, key, cos, sin), rotation(query, key, cos, sin))
    if not all(_agree(ours, theirs) for ours, theirs in pairs):
        return None

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        same = not (args or kwargs) and cos.dim() == 3 and q.shape[-1] == k.shape[-1] == cos.shape[-1]
        if same and q.dtype == k.dtype == cos.dtype == sin.dtype:
            return rotated(q, k, cos, sin)
        return rotation(q, k, cos, sin, *args, **kwargs)

    return _naming(kind.forward, ROTATION, rotate)


def _naming(function: Any, name: str, value: object) -> Callable:
    """A copy of a function, decorated or not, for which a global name means ``value``."""
    cells, names = function.__closure__, function.__globals__
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        names = {**names, name: value}
    else:
        inner = types.CellType(_naming(wrapped, name, value))
        cells = tuple(inner if cell.cell_contents is wrapped else cell for cell in cells)
    renamed = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    renamed.__kwdefaults__ = function.__kwdefaults__
    return renamed


# -- the kernels -------------------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, style: int = GAIN_AFTER) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) with a gain, statistics in float32: (.., size) -> (.., size), contiguous.

    Args:
        x: (.., size).
        weight: (size,).
        eps: added to the mean square.
        style: GAIN_AFTER: w * round(x^), as in Llama; ONE_MORE: round(x^ (1 + w)), as in Gemma; GAIN_BEFORE:
            round(w x^).
    """
    x, places = _rows(x)
    size, out = x.shape[-1], x.new_empty(x.shape)
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // 256))
    _rms_norm[(x.numel() // size,)](x, weight, out, *places, size, eps, STYLE=style, BLOCK=block, num_warps=warps)
    return out


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, rounded in between as two kernels would: two (.., size) -> (.., size), contiguous."""
    (gate, of_gate), (up, of_up) = _rows(gate), _rows(up)
    size, out = gate.shape[-1], gate.new_empty(gate.shape)
    grid = gate.numel() // size, triton.cdiv(size, 1024)
    _gated[grid](gate, up, out, *of_gate, *of_up[:2], size, BLOCK=1024, num_warps=4)
    return out


def rotated(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of both in one kernel: x cos + rotate_half(x) sin, rounded as three kernels would.

    Args:
        query, key: (B, heads, N, d) and (B, kv heads, N, d).
        cos, sin: (B or 1, N, d).

    Returns:
        Both rotated, laid out in memory as (B, N, heads, d).
    """
    batch, heads, nodes, size = query.shape
    kv_heads = key.shape[1]
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        query, key = query.contiguous(), key.contiguous()
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    out = query.new_empty(batch, nodes, heads + kv_heads, size)
    every = heads + kv_heads
    _rotated[(batch * nodes, 1 if batch * nodes >= MANY_NODES else every)](
        query, key, cos, sin, out, *query.stride()[:3], *key.stride()[:3], *cos.stride(), *sin.stride(),
        heads, every, nodes, size // 2, BLOCK=triton.next_power_of_2(size // 2), num_warps=1,
    )  # fmt: skip
    return out[:, :, :heads].transpose(1, 2), out[:, :, heads:].transpose(1, 2)


def likeliest(logits: torch.Tensor, offsets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable token of each row, the first of several, and what the target calls it.

    Args:
        logits: (B, D), :func:`reachable`.
        offsets: (D,) int64, from an id in the draft vocabulary to the target's; None: they are the same.

    Returns:
        (B,) and (B,) int64.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    rows, size = logits.shape
    found = torch.empty(2, rows, dtype=torch.long, device=logits.device)
    block = min(8192, triton.next_power_of_2(size))
    _likeliest[(rows,)](
        logits, found if offsets is None else offsets, found, logits.stride(0), rows, size,
        MAPPED=offsets is not None, BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    return found[0], found[1]


def reachable(tensor: torch.Tensor) -> bool:
    """Whether kernels reach a tensor: Triton launches them on the current device, wherever it lies."""
    return HAS_TRITON and (INTERPRETED or (tensor.is_cuda and tensor.device.index == torch.cuda.current_device()))


def can_write(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether :func:`write` serves these entries."""
    return reachable(key) and key.shape == value.shape and key.stride(-1) == value.stride(-1) == 1


def write(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write entries into the slots of a cache's buffers, keys and values at once.

    Args:
        keys, values: (B, heads, S, d).
        key, value: (B, heads, N, d) new entries.
        slots: (B, N) int64, contiguous.
    """
    batch, heads, nodes, size = key.shape
    _written[(batch * nodes, heads)](
        key, value, keys, values, slots, *key.stride()[:3], *value.stride()[:3], *keys.stride()[:3],
        *values.stride()[:3], nodes, size, BLOCK=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """x (.., size), copied where need be, and where row i of it begins: outer * (i // count) + inner * (i % count)."""
    shape, stride = x.shape, x.stride()
    merge = range(x.dim() - 3)  # all dimensions but the last two must count as one
    if stride[-1] != 1 or any(shape[i] > 1 and stride[i] != shape[i + 1] * stride[i + 1] for i in merge):
        x = x.contiguous()
    outer, inner, _ = x.stride()[-3:] if x.dim() > 2 else (0, *x.stride()[-2:]) if x.dim() > 1 else (0, 0, 1)
    return x, (outer, inner, x.shape[-2] if x.dim() > 1 else 1)


if HAS_TRITON:

    @triton.jit
    def _rms_norm(  # type: ignore[no-untyped-def]
        x, weight, out, outer, inner, count, size, eps, STYLE: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """One row."""
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = column < size
        given = tl.load(x + (row // count) * outer + (row % count) * inner + column, mask=inside, other=0.0)
        gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        value = given.to(tl.float32)
        value = value * tl.rsqrt(tl.sum(value * value, 0) / size + eps)
        if STYLE == 0:
            value = value.to(given.dtype).to(tl.float32) * gain
        elif STYLE == 1:
            value = value * (1.0 + gain)
        else:
            value = value * gain
        tl.store(out + row * size + column, value.to(given.dtype), mask=inside)

    @triton.jit
    def _gated(  # type: ignore[no-untyped-def]
        gate, up, out, g_outer, g_inner, count, u_outer, u_inner, size, BLOCK: tl.constexpr
    ):  # fmt: skip
        """A piece of one row."""
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < size
        g = tl.load(gate + (row // count) * g_outer + (row % count) * g_inner + column, mask=inside, other=0.0)
        u = tl.load(up + (row // count) * u_outer + (row % count) * u_inner + column, mask=inside, other=0.0)
        x = g.to(tl.float32)
        x = (x / (1.0 + tl.exp(-x))).to(g.dtype).to(tl.float32) * u.to(tl.float32)
        tl.store(out + row * size + column, x.to(g.dtype), mask=inside)

    @triton.jit
    def _rotated(  # type: ignore[no-untyped-def]
        query, key, cos, sin, out, q_batch, q_head, q_node, k_batch, k_head, k_node,
        c_batch, c_node, c_column, s_batch, s_node, s_column, heads, every, nodes, half, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One head of one node, or all: x1 cos1 - x2 sin1 and x2 cos2 + x1 sin2, each product and each sum rounded."""
        place, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        batch, node = place // nodes, place % nodes
        inside = column < half
        cosines = cos + batch * c_batch + node * c_node + column * c_column
        sines = sin + batch * s_batch + node * s_node + column * s_column
        kind = out.dtype.element_ty
        cos1 = tl.load(cosines, mask=inside, other=0.0).to(tl.float32)
        cos2 = tl.load(cosines + half * c_column, mask=inside, other=0.0).to(tl.float32)
        sin1 = tl.load(sines, mask=inside, other=0.0).to(tl.float32)
        sin2 = tl.load(sines + half * s_column, mask=inside, other=0.0).to(tl.float32)
        for head in range(tl.program_id(1), every, tl.num_programs(1)):
            if head < heads:
                at = query + batch * q_batch + head * q_head + node * q_node + column
            else:
                at = key + batch * k_batch + (head - heads) * k_head + node * k_node + column
            first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
            x = (first * cos1).to(kind).to(tl.float32) - (second * sin1).to(kind).to(tl.float32)
            y = (second * cos2).to(kind).to(tl.float32) + (first * sin2).to(kind).to(tl.float32)
            to = out + (place * every + head) * (2 * half) + column
            tl.store(to, x.to(kind), mask=inside)
            tl.store(to + half, y.to(kind), mask=inside)

    @triton.jit
    def _likeliest(  # type: ignore[no-untyped-def]
        logits, offsets, found, stride, rows, size, MAPPED: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """One row."""
        row, column = tl.program_id(0), tl.arange(0, BLOCK)
        highest, where = tl.full([BLOCK], float("-inf"), tl.float32), column
        for left in range(0, size, BLOCK):
            at = left + column
            value = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < size, other=float("-inf"))
            above = value.to(tl.float32) > highest
            highest, where = tl.where(above, value.to(tl.float32), highest), tl.where(above, at, where)
        first = tl.min(tl.where(highest == tl.max(highest, 0), where, size - 1), 0).to(tl.int64)
        tl.store(found + row, first)
        tl.store(found + rows + row, first + tl.load(offsets + first) if MAPPED else first)

    @triton.jit
    def _written(  # type: ignore[no-untyped-def]
        key, value, keys, values, slots, k_batch, k_head, k_node, v_batch, v_head, v_node,
        ks_batch, ks_head, ks_slot, vs_batch, vs_head, vs_slot, nodes, size, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One head of one node."""
        place, head, column = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
        batch, node, inside = place // nodes, place % nodes, column < size
        slot, row = tl.load(slots + place), batch.to(tl.int64)
        k = tl.load(key + row * k_batch + head * k_head + node * k_node + column, mask=inside)
        v = tl.load(value + row * v_batch + head * v_head + node * v_node + column, mask=inside)
        tl.store(keys + row * ks_batch + head * ks_head + slot * ks_slot + column, k, mask=inside)
        tl.store(values + row * vs_batch + head * vs_head + slot * vs_slot + column, v, mask=inside)
