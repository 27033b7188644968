"""Buffers and graphs of the fast path, kept from call to call: one set for each batch size, as memory allows."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.utils import logging

from .cache_ppow import SlotCache
from .drafting_ppow import DraftOptions
from .graphs_ppow import GraphTarget, target_twin
from .obstacles_ppow import attention_obstacle, call_obstacle, longest_text, path_bytes, place_obstacle, shortage
from .prompt_ppow import Prompt
from .recording_ppow import GATE, SIBLINGS, Replay, Twin
from .streamed_ppow import streamed_bytes, sums_of
from .target_ppow import decoder_layers
from .words_ppow import TargetWords

logger = logging.get_logger(__name__)

ADAPTED = "_active_adapter", "_disable_adapters", "merged_adapters", "scaling"  # what PEFT's layers go by
CAPACITY_STEP = 1024  # slots; calls that need about as many share buffers and graphs
MOST_PATHS = 8  # batch sizes whose buffers and graphs a drafter keeps


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
        elif self.twins is not None and isinstance(self.twins.embed, TargetWords):
            self.twins.embed.refresh()
        known = self.by_batch.get(batch)
        if known is not None and capacity <= known.capacity:
            self.by_batch[batch] = self.by_batch.pop(batch)
            return known, None
        exact = up_to_step(capacity)
        kept = sum(path_bytes(target, drafter, size, path.capacity) for size, path in self.by_batch.items())
        kept += streamed_bytes(drafter) if self.twins is not None and self.twins.drafter.streamed else 0
        reason = shortage(target, drafter, batch, exact, -kept)
        if reason is not None:
            return None, reason
        double = exact if known is None else max(exact, min(2 * known.capacity, up_to_step(longest_text(target))))
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


def up_to_step(slots: int) -> int:
    """``slots``, rounded up to whole steps."""
    return -(-slots // CAPACITY_STEP) * CAPACITY_STEP


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
