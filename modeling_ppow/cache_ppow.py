"""Key/value storage in which every batch row writes where it likes: what speculative decoding needs of a cache.

A stock dynamic cache appends the same number of entries to every row, and a sliding-window cache forgets entries
that a rejected window may bring back. :class:`SlotCache` keeps every key in a preallocated buffer. Verification writes
a window of nodes into the slots after each row's own length; :meth:`SlotCache.keep` then moves the accepted nodes to
the front of the window and forgets the rest. Sliding windows are expressed in the attention mask instead of the
storage, so all target families look alike and rolling back is a matter of not counting an entry.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .fused_ppow import can_write, write

# What a forward and ``generate`` call their cache, as an argument and in their output: another name from transformers
# 5.24 on, where the old one still works and warns.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class SlotLayer(DynamicLayer):
    """Keys and values of one layer: buffers (batch B, heads, capacity S, size), whose heads and sizes may differ."""

    is_croppable = True

    def __init__(self, capacity: int = 256):
        super().__init__()
        self.capacity = capacity
        self.length = 0  # entries that an append (stock use: prefill, later turns) counts
        self.slots: torch.Tensor | None = None  # (B, N) int64 slots of the next window; None: append after `length`
        self.view = 0  # entries attention reads in window mode

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers, of the shape and type of entries (B, heads, N, d)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # zeros, not empty: masked slots are multiplied by probability 0, and 0 * NaN would poison the row
        for name, states in (("keys", key_states), ("values", value_states)):
            setattr(self, name, states.new_zeros(*states.shape[:2], self.capacity, states.shape[-1]))
        self.is_initialized = True

    def reserve(self, needed: int) -> None:
        """Grow the buffers to at least ``needed`` slots, doubling so that long outputs copy each entry O(1) times."""
        if needed <= self.capacity:
            return
        self.capacity = max(needed, 2 * self.capacity)
        if self.is_initialized:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_zeros(*old.shape[:2], self.capacity, old.shape[-1])
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new entries (B, heads, N, d) and return what attention reads: (B, heads, view, d)."""
        if self.slots is None:
            count = key_states.shape[-2]
            self.reserve(self.length + count)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start, self.length = self.length, self.length + count
            self.keys[:, :, start : self.length] = key_states
            self.values[:, :, start : self.length] = value_states
            return self.keys[:, :, : self.length], self.values[:, :, : self.length]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self.slots if self.slots.device == self.device else self.slots.to(self.device)
        if can_write(key_states, value_states):
            write(self.keys, self.values, key_states, value_states, slots.contiguous())
            return self.keys[:, :, : self.view], self.values[:, :, : self.view]
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if slots.shape[0] == 1:
                buffer.index_copy_(2, slots[0], states)
            else:
                index = slots[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
                buffer.scatter_(2, index, states)
        return self.keys[:, :, : self.view], self.values[:, :, : self.view]

    def take_over(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Begin with the newest of ``length`` entries; those that a sliding window has left behind stay zero."""
        self.reserve(length)
        self.lazy_initialization(keys, values)
        first = length - keys.shape[-2]
        self.keys[:, :, first:length] = keys
        self.values[:, :, first:length] = values
        self.length = length

    def move(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy entries (B, M) from slots ``source`` to slots ``destination``, row by row."""
        source, destination = source.to(self.device), destination.to(self.device)
        for buffer in (self.keys, self.values):
            shape = (-1, buffer.shape[1], -1, buffer.shape[-1])
            moved = buffer.gather(2, source[:, None, :, None].expand(shape))
            buffer.scatter_(2, destination[:, None, :, None].expand(shape), moved)

    def get_seq_length(self) -> int:
        """Entries that count."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many entries ``query_length`` new tokens see when they are appended, and at which the first stands."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget every entry."""
        super().reset()
        self.length, self.slots = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` entries (negative, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass the number of entries to remove as a negative integer.")
        self.length = max(0, self.length + tokens_to_remove)


class SlotCache(Cache):
    """A cache of :class:`SlotLayer` s with a window mode for verification.

    In stock use (no window open) it behaves like a dynamic cache. It lives as long as a call: what the caller passes is
    taken over at the beginning (:func:`as_slot_cache`) and filled at the end (:func:`hand_back`).

    Args:
        num_layers: decoder layers of the model.
        capacity: slots to allocate at first; grows when needed.
    """

    def __init__(self, num_layers: int, capacity: int = 256):
        super().__init__(layers=[SlotLayer(capacity) for _ in range(num_layers)])

    def open_window(self, slots: torch.Tensor, view: int) -> None:
        """Send the next updates to ``slots`` (B, N) int64 and let attention read the first ``view`` slots."""
        for layer in self.layers:
            layer.reserve(view)
            layer.slots, layer.view = slots, view

    def close_window(self) -> None:
        """Go back to appending."""
        for layer in self.layers:
            layer.slots = None

    def keep(self, lengths: torch.Tensor, path: torch.Tensor) -> None:
        """Move the accepted nodes of a verified window after each row's kept entries.

        Args:
            lengths: (B,) entries kept so far; node ``j`` of the window lies in slot ``lengths + j``.
            path: (B, M) window nodes to keep, in order. Surplus columns do no harm: they only write slots that the
                next window overwrites.
        """
        source = lengths[:, None] + path
        destination = lengths[:, None] + torch.arange(path.shape[1], device=path.device)
        for layer in self.layers:
            layer.move(source, destination)

    def copy(self, length: int) -> "SlotCache":
        """A cache of its own with the first ``length`` entries."""
        copy = SlotCache(len(self.layers), length + 1)
        for mine, theirs in zip(self.layers, copy.layers):
            theirs.update(mine.keys[:, :, :length], mine.values[:, :, :length])
        return copy

    def set_length(self, length: int) -> None:
        """Count the first ``length`` slots of every layer, and append after them."""
        for layer in self.layers:
            layer.length = length
            layer.slots = None


def as_slot_cache(cache: Cache | None, num_layers: int, capacity: int) -> SlotCache:
    """A :class:`SlotCache` holding what a user's cache holds.

    Args:
        cache: None, one of ours (used as it is), or one that shows no :func:`cache_obstacle`. Of a layer with a sliding
            window the keys inside the window suffice: nothing that comes sees the others.
        num_layers: decoder layers of the target.
        capacity: slots to allocate.
    """
    if isinstance(cache, SlotCache):
        return cache
    slots = SlotCache(num_layers, capacity)
    if cache is None:
        return slots
    length = cache.get_seq_length()
    for mine, theirs in zip(slots.layers, cache.layers):
        if length and theirs.is_initialized:
            mine.take_over(theirs.keys, theirs.values, length)
    return slots


def cache_obstacle(cache: Cache) -> str | None:
    """Why a user's cache cannot serve a drafter; None if it can."""
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = getattr(cache, "layers", None)
    if layers is None or not hasattr(cache, "get_seq_length"):
        return f"is a {type(cache).__name__}"
    lazy: Any = getattr(cache, "layer_class_to_replicate", None)
    odd = [type(layer).__name__ for layer in layers if type(layer) not in known]
    odd += [lazy.__name__] if not layers and lazy not in known else []
    if odd:  # even of an empty cache: the caller expects it to fill up
        return f"has layers of type {odd[0]}, which cannot be rolled back after a rejected window"
    if getattr(cache, "offloading", False):
        return "is kept on the CPU (offloading=True), and windows are verified against keys on the device"
    length = cache.get_seq_length()
    for index, layer in enumerate(layers):
        held = layer.keys.shape[-2] if length and layer.is_initialized else length
        needed = min(length, getattr(layer, "sliding_window", length + 1) - 1)
        if held < needed or held > length:
            return f"holds {held} of {length} keys in layer {index} ({type(layer).__name__})"
    return None


def hand_back(slots: SlotCache, cache: Cache, length: int) -> None:
    """Let a user's dynamic cache hold the first ``length`` entries, as if the model had filled it."""
    while len(cache.layers) < len(slots.layers):
        cache.layers.append(cache.layer_class_to_replicate())
    for mine, theirs in zip(slots.layers, cache.layers):
        if mine.is_initialized:
            theirs.is_initialized = False  # begin anew: `update` then lays out and counts in its own way
            if hasattr(theirs, "cumulative_length"):
                theirs.cumulative_length = 0
            theirs.update(mine.keys[:, :, :length], mine.values[:, :, :length])


class DrafterMemory:
    """The drafter's side of a conversation, kept on the target's cache (as ``drafter_memory``) from turn to turn.

    Args:
        slots: the drafter's cache, whose pair t belongs to entry t of the target's.
        cache: the target's cache.
        drafter: whose features these are.
    """

    def __init__(self, slots: SlotCache, cache: Cache, drafter: PreTrainedModel):
        self.slots, self.drafter = slots, id(drafter)
        self.keys = cache.layers[0].keys  # a copied cache carries its memory along, another text has other keys
        self.length = cache.get_seq_length()

    @classmethod
    def recall(cls, cache: Cache | None, drafter: PreTrainedModel) -> tuple[SlotCache | None, int]:
        """What is still true of ``drafter``'s side after all that was done to ``cache``.

        Returns:
            Its slots, or None; how many of their pairs hold.
        """
        memory = getattr(cache, "drafter_memory", None)
        if cache is None or memory is None or not cache.layers or not cache.layers[0].is_initialized:
            return None, 0
        if memory.drafter != id(drafter) or len(memory.slots.layers) != len(drafter.layers):
            return None, 0
        keys, length = cache.layers[0].keys, cache.get_seq_length()
        same = keys.untyped_storage().data_ptr() == memory.keys.untyped_storage().data_ptr()
        if not same or length > memory.length or len(keys) != len(memory.keys):
            return None, 0
        memory.slots.set_length(length)
        return memory.slots, length if length == memory.length else max(0, length - 1)  # a pair knows the next token
