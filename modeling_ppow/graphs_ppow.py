"""The fast path of the decoding loop: what a cycle computes, replayed from CUDA graphs.

Launched one by one, the kernels of an 8B target's forward take several times longer to launch than to run. Here the
target's and the drafter's part of a cycle are captured once and replayed with new contents. The loop is the same, and
so is the code that is captured: the states below only fix the shapes (whole windows, buffers of a set capacity), keep
every length on the device, and describe visibility to :mod:`attention_ppow` instead of writing masks out.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable

import torch
import torch._dynamo
from torch import nn
from transformers import AttentionInterface
from transformers.utils import logging

from . import attention_ppow
from .attention_ppow import WINDOW_ATTENTION, pack_window, window_attention
from .cache_ppow import SlotCache
from .drafting_ppow import DrafterState, DraftOptions, DraftWindow
from .probe_ppow import PROMPT, is_known, trial
from .target_ppow import TargetState, decoder_layers

logger = logging.get_logger(__name__)
AttentionInterface.register(WINDOW_ATTENTION, window_attention)

SIBLINGS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # modules that read one input
CAPACITY_STEP = 1024  # slots; calls that need about as many share buffers and graphs


class Replay:
    """Functions of tensors, each captured as a CUDA graph at its first call and replayed from then on.

    Off the GPU the functions simply run, so that everything around the graphs can be tested anywhere.
    """

    def __init__(self):
        self.graphs: dict = {}

    def __call__(self, name: tuple, function: Callable, *tensors: torch.Tensor):
        """``function(*tensors)`` under ``name`` (which must tell apart what differs but in the tensors' contents).

        Returns:
            What the function returns; its tensors are overwritten by the next call of that name.
        """
        if not tensors[0].is_cuda:
            return function(*tensors)
        self.record(name, function, *tensors)
        held, graph, outputs = self.graphs[name]
        for buffer, tensor in zip(held, tensors):
            buffer.copy_(tensor)
        graph.replay()
        return outputs

    def record(self, name: tuple, function: Callable, *tensors: torch.Tensor) -> None:
        """Capture ``function`` unless it is. This runs it a few times, so running it twice must do no harm."""
        if name in self.graphs or not tensors[0].is_cuda:
            return
        held, chance = [tensor.contiguous().clone() for tensor in tensors], torch.cuda.get_rng_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries allocate and choose kernels on first use
                function(*held)
        torch.cuda.current_stream().wait_stream(side)
        # Each graph has a memory pool of its own: what one returns must outlive the replays of the others.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function(*held)
        torch.cuda.set_rng_state(chance)  # a seed means the same whether graphs were recorded on the way or not
        self.graphs[name] = held, graph, outputs


class WindowCache(SlotCache):
    """A :class:`SlotCache` whose layers are served in turn, whatever index they name.

    So a compiled layer does not depend on its number, and one compilation serves all of them.
    """

    turn = None  # next layer while a window is open

    def open_window(self, slots: torch.Tensor, view: int) -> None:
        super().open_window(slots, view)
        self.turn = 0

    def close_window(self) -> None:
        super().close_window()
        self.turn = None

    @torch.compiler.disable
    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.turn is not None:
            layer_idx, self.turn = self.turn, self.turn + 1
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Product:
    """Linear modules of one input, computed as one product: a large product reads weights faster than several small.

    The weights are laid side by side in memory, where they remain the modules' own, and take no second copy.
    """

    def __init__(self, linears: list[nn.Linear]):
        ends = list(itertools.accumulate(linear.out_features for linear in linears))
        self.parts = [(linear, slice(end - linear.out_features, end)) for linear, end in zip(linears, ends)]
        self.weight, self.bias, self.result = self._side_by_side("weight"), self._side_by_side("bias"), None

    def _side_by_side(self, name: str) -> torch.Tensor | None:
        tensors = [getattr(linear, name) for linear, _ in self.parts]
        if tensors[0] is None:
            return None
        whole = torch.cat([tensor.data for tensor in tensors])
        for tensor, (_, part) in zip(tensors, self.parts):
            tensor.data = whole[part]
        return whole

    @classmethod
    def find(cls, layers) -> list["Product"]:
        """All that the layers' modules allow; quantized and adapted modules stay as they are."""
        candidates = itertools.product((module for layer in layers for module in layer.modules()), SIBLINGS)
        groups = ([getattr(module, name, None) for name in names] for module, names in candidates)
        return [cls(linears) for linears in groups if _alike(linears)]


def _alike(linears: list) -> bool:
    if any(type(linear) is not nn.Linear for linear in linears):
        return False
    kinds = {(m.in_features, m.bias is None, m.weight.dtype, m.weight.device) for m in linears}
    return len(kinds) == 1 and len({id(m.weight) for m in linears}) == len(linears)


class PartOfProduct(nn.Linear):
    """What a module of a :class:`Product` becomes while a graph is recorded: the first computes for all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product, part = self.product, self.part
        if part.start == 0:
            product.result = nn.functional.linear(x, product.weight, product.bias)
        result = product.result
        if part.stop == product.weight.shape[0]:
            product.result = None
        return result[..., part]


class Recording:
    """How a model's decoder layers run while a graph is recorded; the model itself stays as it is.

    Args:
        layers: the decoder layers.
        compile_layers: whether torch.compile fuses what lies between the products.
    """

    def __init__(self, layers, compile_layers: bool):
        self.products = Product.find(layers)
        self.layers = list(layers) if compile_layers else []
        kinds = {type(layer) for layer in self.layers}
        self.forwards = {kind: torch.compile(kind.forward, dynamic=False) for kind in kinds}

    @contextlib.contextmanager
    def __call__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
            for product in self.products:
                for linear, part in product.parts:
                    # another class, not another `forward`: a compilation is bound to a function, and serves all layers
                    linear.__class__ = PartOfProduct
                    stack.callback(setattr, linear, "__class__", nn.Linear)
                    stack.enter_context(_held(linear, product=product, part=part))
            for layer in self.layers:
                stack.enter_context(_held(layer, forward=functools.partial(self.forwards[type(layer)], layer)))
                for module in layer.modules():
                    if "layer_idx" in vars(module):
                        stack.enter_context(_held(module, layer_idx=0))
            yield


class GraphTarget(TargetState):
    """A target whose verifications and moves are replayed. ``first`` (B,) is the slot behind each row's padding."""

    def __init__(self, target, taps, cache, batch: int, replay: Replay, capacity: int, recording: Recording):
        super().__init__(target, taps, cache, batch, capacity, None)
        self.replay, self.capacity = replay, capacity
        self.uses_flash = False
        self.first = torch.zeros_like(self.lengths)
        self.recording = recording

    def verify(self, window: DraftWindow):
        places = self.lengths, self.next_position, self.last_position, self.first
        tensors = window.tokens, window.depth, window.ancestors, *places
        return self.replay(("verify", window.tokens.shape), self._verify_at, *tensors)

    def _verify_at(self, tokens, depth, ancestors, lengths, next_position, last_position, first):
        with (
            _held(self, lengths=lengths, next_position=next_position, last_position=last_position, first=first),
            _window_attention(self.target),
            self.recording(),
        ):
            return self._verify(tokens, depth, ancestors)

    def _view(self, count: int) -> int:
        return self.capacity

    def _mask(self, depth, ancestors, slots, view):
        return self.window_masks.packed(self.lengths, ancestors, depth, self.first)

    def keep(self, path, counts, in_order: bool) -> None:
        if not in_order:
            name, in_place = ("keep", path.shape), torch.arange(path.shape[1], device=path.device).expand_as(path)
            self.replay.record(name, self.cache.keep, self.lengths, in_place)  # moving twice would do harm
            self.replay(name, self.cache.keep, self.lengths, path)
        super().keep(path, counts, in_order=True)


class GraphDrafter(DrafterState):
    """A drafter whose steps are replayed: a whole window at a time, whatever room is left."""

    whole_windows = True

    def __init__(self, drafter, embed, cache, batch: int, replay: Replay, capacity: int, recording: Recording):
        super().__init__(drafter, embed, cache, torch.zeros(batch, dtype=torch.long, device=drafter.device), None)
        self.replay, self.capacity = replay, capacity
        self.first = torch.zeros_like(self.lengths)
        self.prefilled = False
        self.recording = recording

    def extend(self, taps, tokens, positions, counts) -> None:
        if not self.prefilled:  # the prompt, of any length
            super().extend(taps, tokens, positions, counts)
            self.prefilled = True
            return
        tensors = taps, tokens, positions, counts, self.lengths, self.first
        self.hidden, self.positions, self.lengths = self.replay(("extend", tokens.shape), self._extend_at, *tensors)

    def _extend_at(self, taps, tokens, positions, counts, lengths, first):
        with _held(self, lengths=lengths, first=first, hidden=None, positions=None), self.recording():
            super().extend(taps, tokens, positions, counts)
            return self.hidden, self.positions, self.lengths

    def chain(self, root, size, sample=None, threshold=0.0) -> DraftWindow:
        def run(root, hidden, positions, lengths, first):
            with _held(self, hidden=hidden, positions=positions, lengths=lengths, first=first), self.recording():
                return DrafterState.chain(self, root, size, sample)

        return self.replay(("chain", size, getattr(sample, "key", None)), run, *self._tensors(root))

    def tree(self, root, depth, top_k, nodes) -> DraftWindow:
        def run(root, hidden, positions, lengths, first):
            with _held(self, hidden=hidden, positions=positions, lengths=lengths, first=first), self.recording():
                return DrafterState.tree(self, root, depth, top_k, nodes)

        return self.replay(("tree", depth, top_k, nodes), run, *self._tensors(root))

    def _tensors(self, root):
        return root, self.hidden, self.positions, self.lengths, self.first

    def _view(self, ahead: int) -> int:
        return self.capacity if self.prefilled else super()._view(ahead)

    def _mask(self, base, seen, view, dtype):
        if not self.prefilled:
            return super()._mask(base, seen, view, dtype)
        return pack_window(base, seen, self.first[:, None].expand(-1, seen.shape[1]))


class _Unrecorded(Replay):
    """Runs every function as it is given."""

    def __call__(self, name, function, *tensors):
        return function(*tensors)

    def record(self, name, function, *tensors) -> None:
        pass


def unrecorded(target, taps, past, batch: int, capacity: int, valid: torch.Tensor | None) -> GraphTarget:
    """What the fast path computes, without graphs: to try a target that nobody has walked. Arguments of
    :class:`TargetState`."""
    cache = WindowCache(len(decoder_layers(target)), capacity)
    state = GraphTarget(target, taps, cache, batch, _Unrecorded(), capacity, Recording([], False))
    if valid is not None:
        state.valid, state.first = valid, (~valid).sum(1)
    return state


@contextlib.contextmanager
def _held(holder, **attributes):
    """Let an object have these attributes for a while."""
    before = dict(vars(holder))
    vars(holder).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(holder).pop(name)
        vars(holder).update({name: before[name] for name in attributes if name in before})


@contextlib.contextmanager
def _window_attention(target):
    config = target.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation = WINDOW_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


class FastPath:
    """Buffers, graphs and states of one pair, batch size and capacity; kept from call to call.

    Args:
        target, drafter: the pair.
        batch: rows B.
        capacity: slots of every row.
    """

    def __init__(self, target, drafter, batch: int, capacity: int, compile_layers: bool):
        self.capacity, self.made_for = capacity, (batch, compile_layers)
        replay, layers, taps = Replay(), decoder_layers(target), drafter.config.target_taps
        recording, cache = Recording(layers, compile_layers), WindowCache(len(layers), capacity)
        self.target_state = GraphTarget(target, taps, cache, batch, replay, capacity, recording)
        embed, cache = drafter.embedding_for(target), WindowCache(len(drafter.layers), capacity)
        recording = Recording(drafter.layers, compile_layers)
        self.drafter_state = GraphDrafter(drafter, embed, cache, batch, replay, capacity, recording)
        self.weights = _weights(target, drafter)

    def serves(self, target, drafter, batch: int, capacity: int, compile_layers: bool) -> bool:
        fits = capacity <= self.capacity and self.made_for == (batch, compile_layers)
        return fits and self.weights == _weights(target, drafter)

    def begin(self, valid: torch.Tensor | None) -> None:
        """Start a new text; ``valid`` (B, P) bool, False at the padding on the left."""
        for state in (self.target_state, self.drafter_state):
            state.valid, state.lengths = valid, torch.zeros_like(state.lengths)
            state.first = torch.zeros_like(state.lengths) if valid is None else (~valid).sum(1)
            state.cache.set_length(0)
        self.drafter_state.prefilled = False

    def __reduce__(self):
        return type(None), ()  # a copied or pickled drafter makes its own


def fast_path(target, drafter, options: DraftOptions, prompt, capacity: int) -> FastPath | None:
    """The fast path, ready for a new text; None where the plain path must serve.

    Args:
        prompt: the :class:`Prompt`.
        capacity: slots that the text may need.

    Raises:
        ValueError: with ``cuda_graphs=True``, where an obstacle or too little memory is in the way.
    """
    if options.cuda_graphs is False:
        return None
    batch, path = prompt.ids.shape[0], vars(drafter).get("_fast_path")
    reason = place_obstacle(target, drafter) or call_obstacle(target, prompt) or attention_obstacle(target)
    if reason is None and (path is None or not path.serves(target, drafter, batch, capacity, options.compile_layers)):
        vars(drafter)["_fast_path"] = path = None  # frees the old buffers first
        capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        reason = shortage(target, drafter, batch, capacity)
        if reason is None:
            path = vars(drafter)["_fast_path"] = FastPath(target, drafter, batch, capacity, options.compile_layers)
            logger.warning_once("PPOW decodes from CUDA graphs, recorded at the first call (cuda_graphs=False: never).")
    if reason is None:
        path.begin(prompt.valid)
        return path
    if options.cuda_graphs:
        raise ValueError(f"cuda_graphs=True, but {reason}. Leave cuda_graphs unset for the plain path.")
    if target.device.type == "cuda":
        logger.warning_once(f"PPOW decodes without CUDA graphs, several times slower: {reason}.")
    return None


def place_obstacle(target, drafter) -> str | None:
    """Why graphs cannot be recorded where the pair lies; None if they can."""
    obstacles = {
        "the target is not on a GPU": target.device.type != "cuda",
        "triton is not installed": attention_ppow.triton is None,
        "the models are spread over devices": len({p.device for m in (target, drafter) for p in m.parameters()}) > 1,
        "the target computes in float64": target.dtype == torch.float64,
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def call_obstacle(target, prompt) -> str | None:
    """What about the target or the call the fast path cannot serve; None if nothing."""
    config = target.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    valid = prompt.valid
    obstacles = {
        "the target's attention cannot be exchanged": not getattr(target, "_supports_attention_backend", False),
        "the target caps its attention logits": getattr(config, "attn_logit_softcapping", None) is not None,
        "the target routes to experts": bool(getattr(config, "num_experts", getattr(config, "num_local_experts", 0))),
        "the target's positions change with the length": bool(kinds & {"dynamic", "longrope"}),
        "the call continues a cache": prompt.start > 0,
        "the padding is not on the left": valid is not None and bool((valid[:, 1:] < valid[:, :-1]).any()),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def attention_obstacle(target) -> str | None:
    """How a target that the tests do not walk fails under this module's attention, tried once; None if it does not."""
    return None if is_known(target) else trial(target, "fast", PROMPT, unrecorded)


def shortage(target, drafter, batch: int, capacity: int) -> str | None:
    """Why keys and values of ``batch`` rows of ``capacity`` slots do not fit into the GPU's memory; None if they do."""
    config = target.config.get_text_config(decoder=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    own = drafter.config
    entry = 2 * config.num_hidden_layers * heads * head * target.dtype.itemsize
    entry += 2 * own.num_hidden_layers * own.num_key_value_heads * own.head_dim * drafter.dtype.itemsize
    needed = batch * capacity * entry
    free, _ = torch.cuda.mem_get_info(target.device)
    free += torch.cuda.memory_reserved(target.device) - torch.cuda.memory_allocated(target.device)
    if needed <= free:
        return None
    return (
        f"{batch} x {capacity} cache slots need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free (lower "
        "max_new_tokens or the batch)"
    )


def _weights(*models) -> tuple:
    """Where the models' weights lie: graphs are bound to these addresses."""
    return tuple(parameter.data_ptr() for model in models for parameter in model.parameters())
