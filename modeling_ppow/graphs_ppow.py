"""The fast path of the decoding loop: what a cycle computes, replayed from CUDA graphs.

Launched one by one, the kernels of an 8B target's forward take several times longer to launch than to run. Here the
target's and the drafter's part of a cycle are captured once and replayed with new contents. The loop is the same, and
so is the code that is captured (:mod:`recording_ppow` does that): the states below only fix the shapes (whole windows,
buffers of a set capacity), keep every length on the device, and describe visibility to :mod:`attention_ppow` instead of
writing masks out.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import logging

from .attention_ppow import HAS_TRITON, WINDOW_ATTENTION, pack_window, window_attention
from .cache_ppow import SlotCache
from .drafting_ppow import DrafterState, DraftOptions, DraftWindow, Sampler
from .fused_ppow import likeliest, reachable
from .probe_ppow import PROMPT, is_known, trial
from .prompt_ppow import Prompt
from .recording_ppow import GATE, SIBLINGS, Replay, Twin, held
from .schedules_ppow import Schedule
from .streamed_ppow import streamed_bytes, sums_of
from .target_ppow import LayerMasks, TargetState, decoder_layers, has_hooks, is_split

logger = logging.get_logger(__name__)
AttentionInterface.register(WINDOW_ATTENTION, window_attention)

PLACES = "lengths", "next_position", "last_position", "first"  # what a verification reads of a GraphTarget,
DRAFTER_PLACES = "hidden", "positions", "lengths", "first"  # and a draft of a GraphDrafter
PREFILL = 128  # tokens of a prompt that one replay reads; twice as many where so many are left of one that is alone
SHORT_PROMPT = 4 * PREFILL  # up to here replays read a prompt sooner than it takes to launch its kernels one by one
ADAPTED = "_active_adapter", "_disable_adapters", "merged_adapters", "scaling"  # what PEFT's layers go by
CAPACITY_STEP = 1024  # slots; calls that need about as many share buffers and graphs
MOST_PATHS = 8  # batch sizes whose buffers and graphs a drafter keeps
SPARE = 0.1  # of a GPU's memory, which others need: buffers of more than one batch size, or of twice the room, leave it


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


class FastPath:
    """Buffers, graphs and states of one pair, batch size and capacity; kept from call to call.

    Args:
        target, drafter: the pair.
        twins: of the pair.
        batch: rows B.
        capacity: slots of every row.
    """

    def __init__(
        self, target: PreTrainedModel, drafter: PreTrainedModel, twins: "PairOfTwins", batch: int, capacity: int
    ):
        self.capacity, self.replay = capacity, Replay()
        replay, layers, taps = self.replay, decoder_layers(target), drafter.config.target_taps
        cache = SlotCache(len(layers), capacity)
        self.target_state = GraphTarget(target, taps, cache, batch, replay, capacity, twins.target)
        cache = SlotCache(len(drafter.layers), capacity)
        self.drafter_state = drafter.graph_kind(drafter, twins.embed, cache, batch, replay, capacity, twins.drafter)
        self.state: list[torch.Tensor] = []  # what a whole cycle changes, see :meth:`advance`
        self.left: torch.cuda.Event | None = None  # when the last call's work on the buffers is done

    def begin(self, valid: torch.Tensor | None) -> None:
        """Start a new text; ``valid`` (B, P) bool, False at the padding on the left."""
        if self.left is not None:
            torch.cuda.current_stream().wait_event(self.left)  # this thread may use another stream
        for state in (self.target_state, self.drafter_state):
            state.valid, state.lengths = valid, torch.zeros_like(state.lengths)
            state.first = torch.zeros_like(state.lengths) if valid is None else (~valid).sum(1)
            state.cache.close_window()  # which a call that failed may have left open
            state.cache.set_length(0)
        self.drafter_state.prefilled = False

    def advance(
        self,
        name: tuple,
        cycle: Callable[[], Any],
        places: Sequence[tuple[object, str]],
        constants: Sequence[torch.Tensor],
    ) -> Any:
        """Run a whole cycle as one graph.

        Args:
            name: must tell apart what differs but in the contents of tensors.
            cycle: reads the attributes at ``places`` and leaves their next values there; what it returns is returned.
            places: (object, name) of the attributes, tensors that have one shape in all calls. Afterwards they hold
                buffers of this path, which every further cycle changes in place.
            constants: as in :meth:`Replay.advance`.
        """
        if not self.state:
            self.state = [getattr(*place).clone() for place in places]
        for buffer, (holder, attribute) in zip(self.state, places, strict=True):
            if getattr(holder, attribute) is not buffer:
                buffer.copy_(getattr(holder, attribute))
                setattr(holder, attribute, buffer)

        def run(*state: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
            result = cycle()
            following = [getattr(*place) for place in places]
            for tensor, place in zip(state, places):
                setattr(*place, tensor)
            return result, following

        return self.replay.advance(name, run, self.state, constants)

    def end(self) -> None:
        """Note when the work of this call will be done."""
        if self.target_state.lengths.is_cuda:
            self.left = torch.cuda.Event()
            self.left.record()


class PairOfTwins:
    """The twins of a pair, for its fast paths of every batch size.

    Args:
        target, drafter: the pair.
        streams: read the drafter's large weights in eight bits.
    """

    def __init__(self, target: PreTrainedModel, drafter: PreTrainedModel, streams: bool = True):
        siblings = SIBLINGS[1:] if drafter.config.is_block else SIBLINGS  # its context has keys and values alone
        self.target, self.drafter = target_twin(target), Twin(drafter, lambda model: model.layers, siblings, streams)
        self.embed = drafter.embedding_for(target)
        self.weights, self.columns = _weights(target, drafter), drafter.draft_columns()
        self.sums = sums_of(self.drafter.streamed)

    def are_of(self, target: PreTrainedModel, drafter: PreTrainedModel) -> bool:
        """Whether the pair still computes what it did when they were made."""
        same = self.weights == _weights(target, drafter) and torch.equal(self.columns, drafter.draft_columns())
        return same and torch.equal(self.sums, sums_of(self.drafter.streamed))


class FastPaths:
    """The fast paths of a drafter, one for each batch size; the first is the next to be forgotten."""

    def __init__(self) -> None:
        self.twins: PairOfTwins | None = None
        self.by_batch: dict[int, FastPath] = {}

    def find(
        self, target: PreTrainedModel, drafter: PreTrainedModel, batch: int, capacity: int
    ) -> tuple[FastPath | None, str | None]:
        """The path for a call that needs this much, kept or made; or why there is none.

        What is made for a text that outgrew the buffers has twice their room if that is free, so that a growing chat
        seldom records anew. Where memory is short, other batch sizes lose theirs, unless that would not do either.
        """
        if self.twins is not None and not self.twins.are_of(target, drafter):
            self.forget()
        known = self.by_batch.get(batch)
        if known is not None and capacity <= known.capacity:
            self.by_batch[batch] = self.by_batch.pop(batch)
            return known, None
        exact = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        kept = sum(path_bytes(target, drafter, size, path.capacity) for size, path in self.by_batch.items())
        kept += streamed_bytes(drafter) if self.twins is not None and self.twins.drafter.streamed else 0
        reason = shortage(target, drafter, batch, exact, -kept)
        if reason is not None:
            return None, reason
        double = exact if known is None else max(exact, min(2 * known.capacity, _longest(target)))
        known = None  # which is freed before others are asked for room
        self.drop(batch)
        while shortage(target, drafter, batch, exact, 0, bool(self.by_batch)) is not None:
            if self.by_batch:
                self.drop(next(iter(self.by_batch)))
            elif self.twins is not None:
                self.twins = None  # with the weights that they have in eight bits
            else:
                return None, shortage(target, drafter, batch, exact)
        capacity = double if shortage(target, drafter, batch, double, 0, True) is None else exact
        try:
            with GATE.exclusive():  # weights are laid side by side
                if self.twins is None:
                    streams = shortage(target, drafter, batch, capacity, streamed_bytes(drafter)) is None
                    self.twins = PairOfTwins(target, drafter, streams)
                path = FastPath(target, drafter, self.twins, batch, capacity)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            return None, f"the pair's modules cannot be copied ({error})"
        self.by_batch[batch] = path
        if len(self.by_batch) > MOST_PATHS:
            self.drop(next(iter(self.by_batch)))
        logger.warning_once("PPOW decodes from CUDA graphs, recorded at the first call (cuda_graphs=False: never).")
        return path, None

    def drop(self, batch: int) -> None:
        """Free what a batch size has, if anything, once its last call's work is done."""
        path = self.by_batch.pop(batch, None)
        if path is not None and path.left is not None:
            path.left.synchronize()

    def forget(self) -> None:
        """Free everything."""
        for batch in list(self.by_batch):
            self.drop(batch)
        self.twins = None

    def __reduce__(self) -> tuple:
        return FastPaths, ()  # a copied or pickled drafter makes its own


class Claim:
    """Who may use a drafter's :class:`FastPath`: one call at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None  # thread

    def take(self, wait: bool) -> bool:
        """Whether the calling thread has it now; a thread does not wait for itself."""
        mine = self.owner == threading.get_ident()
        taken = self.lock.acquire(blocking=wait and not mine)
        if taken:
            self.owner = threading.get_ident()
        return taken

    def free(self) -> None:
        """Let another call have it."""
        self.owner = None
        self.lock.release()

    def __reduce__(self) -> tuple:
        return Claim, ()


@contextlib.contextmanager
def fast_path(
    target: PreTrainedModel, drafter: PreTrainedModel, options: DraftOptions, prompt: Prompt, capacity: int
) -> Iterator[FastPath | None]:
    """The fast path, ready for a new text and this call's own while the context lasts; None: take the plain path.

    One call at a time can have it. Of several at once the others take the plain path; with ``cuda_graphs=True`` they
    wait.

    Args:
        capacity: slots that the text may need.

    Raises:
        ValueError: with ``cuda_graphs=True``, where an obstacle or too little memory is in the way.
    """
    if options.cuda_graphs is False:
        yield None
        return
    reason = place_obstacle(target, drafter) or call_obstacle(target, prompt) or attention_obstacle(target)
    path = None
    claim = vars(drafter).setdefault("_fast_claim", Claim())
    taken = reason is None and claim.take(wait=bool(options.cuda_graphs))
    try:
        if taken:
            paths = vars(drafter).setdefault("_fast_paths", FastPaths())
            path, reason = paths.find(target, drafter, prompt.ids.shape[0], capacity)
        elif reason is None:
            reason = "another call is using this drafter's graphs"
        if path is not None:
            path.begin(prompt.valid)
        elif options.cuda_graphs:
            raise ValueError(f"cuda_graphs=True, but {reason}. Leave cuda_graphs unset for the plain path.")
        elif target.device.type == "cuda":
            logger.warning_once(f"PPOW decodes without CUDA graphs, several times slower: {reason}.")
        yield path
    finally:
        if path is not None:
            path.end()
        if taken:
            claim.free()


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


def _longest(target: PreTrainedModel) -> int:
    """Slots of the longest text that a target has positions for, with a window behind it."""
    longest = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 62
    return -(-(longest + PREFILL) // CAPACITY_STEP) * CAPACITY_STEP


def _weights(*models: PreTrainedModel) -> tuple[int | str, ...]:
    """Where the models' weights lie, and which adapters are in use: to both graphs are bound."""
    places = (address for model in models for parameter in model.parameters() for address in _addresses(parameter))
    modules = [vars(module) for model in models for module in model.modules()]
    return *places, *(str(module[name]) for module in modules for name in ADAPTED if name in module)


def _addresses(tensor: torch.Tensor) -> Iterator[int]:
    """Where a tensor lies; of a quantized one, where the tensors do that it is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _addresses(getattr(tensor, name))
    else:
        yield tensor.data_ptr()
