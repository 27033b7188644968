"""The fast path of the decoding loop: what a cycle computes, replayed from CUDA graphs.

Launched one by one, the kernels of an 8B target's forward take several times longer to launch than to run. Here the
target's and the drafter's part of a cycle are captured once and replayed with new contents. The loop is the same, and
so is the code that is captured (:mod:`recording_ppow` does that): the states below only fix the shapes (whole windows,
buffers of a set capacity), keep every length on the device, and describe visibility to :mod:`attention_ppow` instead of
writing masks out.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from .attention_ppow import WINDOW_ATTENTION, pack_window, window_attention
from .cache_ppow import SlotCache
from .drafting_ppow import DrafterState, DraftWindow, Sampler
from .fused_ppow import likeliest, reachable
from .recording_ppow import GATE, Replay, Twin, held
from .schedules_ppow import Schedule
from .target_ppow import LayerMasks, TargetState, decoder_layers

AttentionInterface.register(WINDOW_ATTENTION, window_attention)

PLACES = "lengths", "next_position", "last_position", "first"  # what a verification reads of a GraphTarget,
DRAFTER_PLACES = "hidden", "positions", "lengths", "first"  # and a draft of a GraphDrafter
PREFILL = 128  # tokens of a prompt that one replay reads; twice as many where so many are left of one that is alone
SHORT_PROMPT = 4 * PREFILL  # up to here replays read a prompt sooner than it takes to launch its kernels one by one


class GraphTarget(TargetState):
    """A target whose verifications and moves are replayed. ``first`` (B,) is the slot after each row's padding."""

    def __init__(
        self,
        target: PreTrainedModel,
        taps: list[int],
        cache: SlotCache,
        batch: int,
        replay: Replay,
        capacity: int,
        twin: Twin,
    ):
        super().__init__(target, taps, cache, batch, capacity, None)
        self.replay, self.capacity = replay, capacity
        self.first = torch.zeros_like(self.lengths)
        self.twin = twin

    @property
    def places(self) -> list[tuple[object, str]]:
        """Where what changes from cycle to cycle is kept (a list in this object would keep it, and its buffers)."""
        return [(self, name) for name in PLACES]

    def prefill(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        chunk: int | None,
        room: int = 1 << 30,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in :class:`TargetState`; a short prompt without padding is read as windows are, by replays."""
        batch, length = input_ids.shape
        wide = 2 * PREFILL if batch == 1 else PREFILL
        sizes: list[int] = []
        while sum(sizes) < length:
            sizes.append(wide if length - sum(sizes) > PREFILL else PREFILL)
        steps = torch.arange(length, device=position_ids.device)
        short = chunk is None and self.valid is None and max(length, batch * PREFILL) <= SHORT_PROMPT
        short = short and sum(sizes) <= self.capacity and torch.equal(position_ids, position_ids[:, :1] + steps)
        if not short:
            return super().prefill(input_ids, attention_mask, position_ids, chunk, room)
        if not self.cache.layers[0].is_initialized:  # allocates, which is not to happen while a graph is recorded
            super().prefill(input_ids[:, :1], None, position_ids[:, :1], None)
            self.lengths = torch.zeros_like(self.lengths)
        self.next_position = position_ids[:, 0]
        self.last_position = position_ids[:, -1] + max(room - 1, 0)
        taps: list[torch.Tensor] = []
        for tokens in nn.functional.pad(input_ids, (0, sum(sizes) - length)).split(sizes, 1):
            logits, tap = self.verify(DraftWindow.chain(tokens))
            count = min(tokens.shape[1], length - sum(part.shape[1] for part in taps))
            taps.append(tap[:, :count].clone())
            self.lengths, self.next_position = self.lengths + count, self.next_position + count
        return logits[:, count - 1], torch.cat(taps, 1)

    def verify(self, window: DraftWindow) -> tuple[torch.Tensor, torch.Tensor]:
        """As in :class:`TargetState`; what it returns is overwritten by the next verification."""
        tensors = window.tokens, window.depth, window.ancestors, *(getattr(*place) for place in self.places)
        return self.replay(("verify", window.tokens.shape), self._verify_at, *tensors)

    def _verify_at(
        self, tokens: torch.Tensor, depth: torch.Tensor, ancestors: torch.Tensor, *places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with held(self, target=self.twin.model, **dict(zip(PLACES, places))):
            return self._verify(tokens, depth, ancestors)

    def _view(self, count: int) -> int:
        return self.capacity

    def _mask(self, depth: torch.Tensor, ancestors: torch.Tensor, slots: torch.Tensor, view: int) -> LayerMasks:
        return self.window_masks.packed(self.lengths, ancestors, depth, self.first)

    def keep(self, path: torch.Tensor, counts: torch.Tensor, in_order: bool) -> None:
        """As in :class:`TargetState`."""
        if not in_order:
            name, in_place = ("keep", path.shape), torch.arange(path.shape[1], device=path.device).expand_as(path)
            self.replay.record(name, self.cache.keep, self.lengths, in_place)  # moving twice would do harm
            self.replay(name, self.cache.keep, self.lengths, path)
        super().keep(path, counts, in_order=True)


class GraphDrafter(DrafterState):
    """A drafter whose steps are replayed: a whole window at a time, whatever room is left."""

    whole_windows = True

    def __init__(
        self,
        drafter: PreTrainedModel,
        embed: torch.nn.Module,
        cache: SlotCache,
        batch: int,
        replay: Replay,
        capacity: int,
        twin: Twin,
    ):
        super().__init__(drafter, embed, cache, torch.zeros(batch, dtype=torch.long, device=drafter.device), None)
        self.replay, self.capacity = replay, capacity
        self.first = torch.zeros_like(self.lengths)
        self.prefilled = False
        self.twin = twin

    @property
    def places(self) -> list[tuple[object, str]]:
        """As in :class:`GraphTarget`."""
        return [(self, name) for name in DRAFTER_PLACES]

    def extend(self, taps: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, counts: torch.Tensor) -> None:
        """As in :class:`DrafterState`; the first is the prompt, and runs as it is."""
        if not self.prefilled:
            super().extend(taps, tokens, positions, counts)
            self.prefilled = True
            return
        tensors = self.lengths, self.first, taps, tokens, positions, counts
        self.hidden, self.positions, self.lengths = self.replay(("extend", tokens.shape), self._extend_at, *tensors)

    def _extend_at(
        self, lengths: torch.Tensor, first: torch.Tensor, *pairs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self._at(lengths=lengths, first=first, hidden=None, positions=None):
            super().extend(*pairs)
            return self.hidden, self.positions, self.lengths

    def chain(
        self,
        root: torch.Tensor,
        size: int,
        sample: Sampler | None = None,
        threshold: float = 0.0,
        schedule: Schedule | None = None,
    ) -> DraftWindow:
        """As in :class:`DrafterState`, always of ``size`` tokens, each size being captured when it first occurs.

        ``threshold`` has no effect, and a ``schedule`` has chosen the size.
        """
        draft = functools.partial(DrafterState.chain, self, size=size, sample=sample)
        return self._replayed(("chain", size, getattr(sample, "key", None)), draft, root)

    def tree(self, root: torch.Tensor, depth: int, top_k: int, nodes: int) -> DraftWindow:
        """As in :class:`DrafterState`."""
        draft = functools.partial(DrafterState.tree, self, depth=depth, top_k=top_k, nodes=nodes)
        return self._replayed(("tree", depth, top_k, nodes), draft, root)

    def _replayed(self, name: tuple, draft: Callable[[torch.Tensor], DraftWindow], root: torch.Tensor) -> DraftWindow:
        def run(root: torch.Tensor, *tensors: torch.Tensor) -> DraftWindow:
            with self._at(**dict(zip(DRAFTER_PLACES, tensors))):
                return draft(root)

        return self.replay(name, run, root, *(getattr(*place) for place in self.places))

    def _likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not reachable(logits):
            return super()._likeliest(logits)
        return likeliest(logits, self.drafter.d2t if self.drafter.pruned else None)

    def _at(self, **tensors: torch.Tensor | None) -> AbstractContextManager[None]:
        return held(self, drafter=self.twin.model, **tensors)

    def _view(self, ahead: int) -> int:
        return self.capacity if self.prefilled else super()._view(ahead)

    def _mask(self, base: torch.Tensor, seen: torch.Tensor, view: int, dtype: torch.dtype) -> torch.Tensor | None:
        if not self.prefilled:
            return super()._mask(base, seen, view, dtype)
        return pack_window(base, seen, self.first[:, None].expand(-1, seen.shape[1]))


class _Unrecorded(Replay):
    """Runs every function as it is given."""

    def __call__(self, name: tuple, function: Callable, *tensors: torch.Tensor) -> Any:
        return function(*tensors)

    def record(self, name: tuple, function: Callable, *tensors: torch.Tensor) -> None:
        """Nothing to do."""


def unrecorded(
    target: PreTrainedModel, taps: list[int], past: None, batch: int, capacity: int, valid: torch.Tensor | None
) -> GraphTarget:
    """What the fast path computes, without graphs: to try a target that nobody has walked.

    Arguments of :class:`TargetState`.
    """
    capacity += PREFILL  # for the last window of a prompt
    cache = SlotCache(len(decoder_layers(target)), capacity)
    with GATE.exclusive():  # weights are laid side by side
        twin = target_twin(target)
    state = GraphTarget(target, taps, cache, batch, _Unrecorded(), capacity, twin)
    if valid is not None:
        state.valid, state.first = valid, (~valid).sum(1)
    return state


def target_twin(target: PreTrainedModel) -> Twin:
    """The twin of a target, under this module's attention."""
    twin = Twin(target, decoder_layers)
    twin.model.config.get_text_config(decoder=True)._attn_implementation = WINDOW_ATTENTION
    return twin
