"""Window attention on a GPU: a few nodes against a long cache, without a mask tensor and without a host round trip.

A verification asks N nodes (1 to some 100) to attend to everything a row has kept and to their own ancestors. Stock
attention needs the mask written out, repeats grouped keys in memory, and must be told from the host how far to read.
Here the lengths stay on the device: the kernel reads them, so one CUDA graph serves every length. Keys are split over
many programs whose partial softmaxes are merged afterwards (Flash-Decoding, Dao et al. 2023).
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .triton_ppow import HAS_TRITON, INTERPRETED, tl, triton

_CUDNN: dict[str, Any] = {"lock": threading.Lock(), "users": 0, "before": True}


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep torch from cuDNN's attention: every window meets another number of keys, and it plans each for some 40 ms.

    The switch belongs to the process, so calls that run at once share it, and the last one puts it back.
    """
    switch = torch.backends.cuda
    with _CUDNN["lock"]:
        if _CUDNN["users"] == 0:
            _CUDNN["before"] = switch.cudnn_sdp_enabled()
            switch.enable_cudnn_sdp(False)
        _CUDNN["users"] += 1
    try:
        yield
    finally:
        with _CUDNN["lock"]:
            _CUDNN["users"] -= 1
            if _CUDNN["users"] == 0:
                switch.enable_cudnn_sdp(_CUDNN["before"])


WINDOW_ATTENTION = "ppow_window"  # its name among transformers' attention functions


def pack_window(base: torch.Tensor, seen: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Describe what a window's nodes see, small enough to be read by every program of the kernel.

    Args:
        base: (B,) slots kept; every node sees the slots ``first .. base - 1``.
        seen: (B, N, W) bool, which of the W slots from ``base`` on each node sees.
        first: (B, N) first visible slot of each node (after padding, inside a sliding window).

    Returns:
        (B, 1, N, 2 + W) int32: first, base, seen. Four dimensions, so that transformers' models hand it through to
        the attention function as they do with any finished mask.
    """
    columns = (first[:, :, None], base[:, None, None].expand(-1, seen.shape[1], 1), seen)
    return torch.cat([column.to(torch.int32) for column in columns], -1)[:, None]


def window_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function in transformers' form, for a mask of :func:`pack_window`.

    Args:
        query: (B, heads, N, d).
        key, value: (B, kv heads, S, d), the whole buffer; slots beyond the window are not read.
        attention_mask: (B, 1, N, 2 + W) int32.

    Returns:
        (B, N, heads, d) and None.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_window(query, key, value, attention_mask, scaling), None


@torch.compiler.disable
def attend_window(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: torch.Tensor, scaling: float
) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v over the visible slots: shapes as in :func:`window_attention`, -> (B, N, heads, d)."""
    batch, heads, nodes, size = query.shape
    if not HAS_TRITON or not (query.is_cuda or INTERPRETED):
        return _attend_densely(query, key, value, packed, scaling)
    if value.shape != key.shape:
        raise ValueError(f"window attention reads keys and values of one shape, got {key.shape} and {value.shape}.")
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    rows = group * nodes  # the queries that share a key head lie together, so each key is read once
    block_m, block_n, warps, stages, waves = blocking(rows, size, query, key.shape[2])
    blocks = triton.cdiv(rows, block_m)
    splits = min(32, max(1, waves * _processors(query) // (batch * kv_heads * blocks)))
    if value.stride(-1) != 1 or key.stride(-1) != 1 or query.stride(-1) != 1:
        raise ValueError("window attention reads rows of heads: the last dimension must be contiguous.")
    partial = query.new_empty(batch * kv_heads, splits, rows, size, dtype=torch.float32)
    statistics = query.new_empty(2, batch * kv_heads, splits, rows, dtype=torch.float32)
    out = query.new_empty(batch, nodes, heads, size)
    exact, pad = query.dtype == torch.float32, max(16, triton.next_power_of_2(size))
    _attend_part[(splits, blocks, batch * kv_heads)](
        query, key, value, packed, partial, statistics[0], statistics[1],
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], packed.stride(0), packed.stride(2),
        kv_heads, nodes, packed.shape[-1] - 2, rows, scaling * 1.4426950408889634,
        GROUP=group, SIZE=size, PAD=pad, BLOCK_M=block_m, BLOCK_N=block_n,
        SPLITS=splits, EXACT=exact, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _merge_parts[(rows, batch * kv_heads)](
        partial, statistics[0], statistics[1], out, *out.stride()[:3], kv_heads, nodes, rows,
        GROUP=group, SIZE=size, PAD=pad, SPLITS=splits,
        SPLITS_PAD=triton.next_power_of_2(splits), num_warps=2,
    )  # fmt: skip
    return out


def blocking(rows: int, size: int, query: torch.Tensor, slots: int) -> tuple[int, int, int, int, int]:
    """How the kernel is cut: queries and keys of a block, warps, pipeline stages, programs for each processor.

    The last lines are the fastest of twelve or nearly so, tried on an H200 at the shapes of SmolLM2-135M and
    Llama-3.1-8B, bfloat16 and 100 to 16k kept slots. Short texts want many small blocks; in long ones each block of
    queries reads all keys. They need more shared memory than earlier GPUs have.
    """
    device = torch.cuda.get_device_properties(query.device) if query.is_cuda else None
    room = getattr(device, "shared_memory_per_block_optin", 0)  # ROCm does not say
    row_bytes = size * query.element_size()
    if room < 232448 or row_bytes > 256:
        keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
        return min(64, max(16, triton.next_power_of_2(rows))), keys, 4, 2, 2
    if rows <= 16:
        return 16, 64, 4, 2, 1 if slots <= 2048 else 2
    if slots <= 2048:
        return 16 if rows <= 64 else 64, 64, 4, 2, 1
    return (64, 64, 4, 2, 1) if rows <= 64 else (128, 128, 8, 2, 1)


def _attend_densely(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The same with the mask written out: what the kernel is tested against, and what CPUs run."""
    first, base, seen = packed[..., :1], packed[..., 1:2], packed[..., 2:]
    slot = torch.arange(key.shape[2], device=key.device)
    allowed = (slot >= first) & (slot < base)  # (B, 1, N, S)
    own = (base.long() + torch.arange(seen.shape[-1], device=key.device)).clamp(max=key.shape[2] - 1)
    allowed = allowed.scatter(3, own, seen.bool())
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2)


def _processors(tensor: torch.Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 8


if HAS_TRITON:

    @triton.jit
    def _add_block(score, visible, value, peak, norm, total, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
        """A running softmax, and its weighted sum of values, with one block of keys more."""
        score = tl.where(visible, score, -1.0e30)
        highest = tl.maximum(peak, tl.max(score, 1))
        fade = tl.exp2(peak - highest)
        # where nothing was visible yet, highest is the stand-in for minus infinity and must not count
        weight = tl.where(visible, tl.exp2(score - highest[:, None]), 0.0)
        norm = norm * fade + tl.sum(weight, 1)
        total *= fade[:, None]
        total += tl.dot(weight.to(value.dtype), value, input_precision="ieee" if EXACT else "tf32")
        return highest, norm, total

    @triton.jit
    def _attend_part(  # type: ignore[no-untyped-def]
        query, key, value, packed, partial, peaks, sums,
        q_batch, q_head, q_node, k_batch, k_head, k_slot, v_batch, v_head, v_slot, p_batch, p_node,
        kv_heads, nodes, window, rows, scale,
        GROUP: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        SPLITS: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        """One split of the keys for one block of the queries that share a key head."""
        split, block, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        batch, kv_head = pair // kv_heads, pair % kv_heads
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < rows
        head, node = kv_head * GROUP + row // nodes, row % nodes
        column = tl.arange(0, PAD)
        wide = column < SIZE
        about = packed + batch * p_batch + node * p_node
        first = tl.load(about, mask=inside, other=0)
        base = tl.load(packed + batch * p_batch + 1)
        # Blocks are dealt out in turn: which split adds up a block does not depend on the length, so a token attends in
        # the same way, bit for bit, wherever in a window it stands.
        stop, stride = base + window, SPLITS * BLOCK_N
        at = query + batch.to(tl.int64) * q_batch + head[:, None] * q_head + node[:, None] * q_node + column[None]
        q = tl.load(at, mask=inside[:, None] & wide[None], other=0.0)
        keys = key + batch.to(tl.int64) * k_batch + kv_head * k_head
        values = value + batch.to(tl.int64) * v_batch + kv_head * v_head
        peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        total_value = tl.zeros([BLOCK_M, PAD], tl.float32)
        whole = base // BLOCK_N  # blocks before the window
        for left in range(split * BLOCK_N, whole * BLOCK_N, stride):
            slot = left + tl.arange(0, BLOCK_N)
            k = tl.load(keys + slot[None] * k_slot + column[:, None], mask=wide[:, None], other=0.0)
            score = tl.dot(q, k, input_precision="ieee" if EXACT else "tf32") * scale
            visible = slot[None] >= first[:, None]
            v = tl.load(values + slot[:, None] * v_slot + column[None], mask=wide[None], other=0.0)
            peak, norm, total_value = _add_block(score, visible, v, peak, norm, total_value, EXACT)
        own_first = whole + (split + SPLITS - whole % SPLITS) % SPLITS
        for left in range(own_first * BLOCK_N, stop, stride):
            slot = left + tl.arange(0, BLOCK_N)
            real = slot < stop
            k = tl.load(keys + slot[None] * k_slot + column[:, None], mask=real[None] & wide[:, None], other=0.0)
            score = tl.dot(q, k, input_precision="ieee" if EXACT else "tf32") * scale
            in_window = (slot >= base) & real
            ask = inside[:, None] & in_window[None]
            own = tl.load(about[:, None] + 2 + (slot - base)[None], mask=ask, other=0) != 0
            visible = own | ((slot[None] >= first[:, None]) & (slot < base)[None])
            v = tl.load(values + slot[:, None] * v_slot + column[None], mask=real[:, None] & wide[None], other=0.0)
            peak, norm, total_value = _add_block(score, visible & real[None], v, peak, norm, total_value, EXACT)
        line = (pair * SPLITS + split) * rows + row
        met = inside & (norm > 0.0)  # a split that saw no key has nothing to add, and merging does not read it
        tl.store(partial + line[:, None] * SIZE + column[None], total_value, mask=met[:, None] & wide[None])
        tl.store(peaks + line, peak, mask=inside)
        tl.store(sums + line, norm, mask=inside)

    @triton.jit
    def _merge_parts(  # type: ignore[no-untyped-def]
        partial, peaks, sums, out, o_batch, o_node, o_head, kv_heads, nodes, rows,
        GROUP: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
    ):  # fmt: skip
        """One query: the splits' softmaxes, put on one scale and added."""
        row, pair = tl.program_id(0), tl.program_id(1)
        batch, kv_head = pair // kv_heads, pair % kv_heads
        split, column = tl.arange(0, SPLITS_PAD), tl.arange(0, PAD)
        line = (pair * SPLITS + split) * rows + row
        there = split < SPLITS
        peak = tl.load(peaks + line, mask=there, other=-1.0e30)
        weight = tl.exp2(peak - tl.max(peak, 0))
        norm = tl.sum(weight * tl.load(sums + line, mask=there, other=0.0), 0)
        part = partial + line[:, None] * SIZE + column[None]
        value = tl.load(part, mask=(there & (weight > 0.0))[:, None] & (column < SIZE)[None], other=0.0)
        mean = tl.sum(value * weight[:, None], 0) / norm
        at = out + batch * o_batch + (row % nodes) * o_node + (kv_head * GROUP + row // nodes) * o_head + column
        tl.store(at, mean.to(out.dtype.element_ty), mask=column < SIZE)
