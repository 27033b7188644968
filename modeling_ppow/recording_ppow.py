"""How the parts of a cycle are captured as CUDA graphs, without anyone else noticing.

A model's modules are not touched: what is captured is a twin of it, whose modules are its own and whose weights are the
model's (those of one input are laid side by side in memory), so that a call of another thread never meets a model in
the state of being recorded.
"""

import contextlib
import copy
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .fused_ppow import fuse
from .streamed_ppow import Streamed, can_stream, stream

MOST_GRAPHS = 64  # of a pair's calls of one batch size; each has memory of its own, and calls may sample in any way
SIBLINGS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # modules that read one input


class Gate:
    """Work on the device goes on beside other work; a recording goes on alone, of all calls of this process.

    While a graph is captured, the generator of random numbers belongs to it, and draws elsewhere would fail.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside: dict[int, int] = {}  # thread -> how deep it stands in shared work
        self.alone: int | None = None  # the thread that records

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Work that may go on beside other work, once nobody records."""
        me = threading.get_ident()
        with self.changed:
            if me not in self.inside:  # who is inside already must not wait for one who waits for all to leave
                self.changed.wait_for(lambda: self.alone in (None, me))
            self.inside[me] = self.inside.get(me, 0) + 1
        try:
            yield
        finally:
            with self.changed:
                self.inside[me] -= 1
                if not self.inside[me]:
                    del self.inside[me]
                self.changed.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Also from within shared work, which then gives others a turn: of several that wait, one goes first."""
        me = threading.get_ident()
        with self.changed:
            if self.alone == me:
                depth, nested = 0, True
            else:
                depth, nested = self.inside.pop(me, 0), False
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.alone is None and not self.inside)
                self.alone = me
        try:
            yield
        finally:
            with self.changed:
                if not nested:
                    self.alone = None
                    if depth:
                        self.inside[me] = depth
                self.changed.notify_all()


GATE = Gate()


class Replay:
    """Functions of tensors, each captured as a CUDA graph at its first call and replayed from then on.

    Off the GPU the functions simply run, so that everything around the graphs can be tested anywhere; so do those that
    are called by a function that is being captured.
    """

    def __init__(self) -> None:
        self.graphs: dict[tuple, tuple[Sequence[torch.Tensor], torch.cuda.CUDAGraph, Any]] = {}
        self.part_of_another = False  # while a function is captured that calls others

    def __call__(self, name: tuple, function: Callable, *tensors: torch.Tensor) -> Any:
        """``function(*tensors)`` under ``name`` (which must tell apart what differs but in the tensors' contents).

        Returns:
            What the function returns; its tensors are overwritten by the next call of that name.
        """
        if self.part_of_another or not tensors[0].is_cuda:
            return function(*tensors)
        self.record(name, function, *tensors)
        held, graph, outputs = self._used(name)
        for buffer, tensor in zip(held, tensors):
            buffer.copy_(tensor)
        graph.replay()
        return outputs

    def record(self, name: tuple, function: Callable, *tensors: torch.Tensor) -> None:
        """Capture ``function`` unless it is. This runs it a few times, so running it twice must do no harm."""
        if self.part_of_another or name in self.graphs or not tensors[0].is_cuda:
            return
        held = [tensor.contiguous().clone() for tensor in tensors]
        self.graphs[name] = held, *self._capture(lambda: function(*held))

    def advance(
        self,
        name: tuple,
        function: Callable[..., tuple[Any, Sequence[torch.Tensor]]],
        state: Sequence[torch.Tensor],
        constants: Sequence[torch.Tensor] = (),
    ) -> Any:
        """``function(*state)`` -> (result, next state); one graph computes both and puts the next state into ``state``.

        Args:
            name: as in :meth:`__call__`. Calls of one name pass the same tensors as ``state``.
            function: may call this :class:`Replay` for its parts. It must not write into the state itself.
            state: what changes from call to call.
            constants: other tensors that the function reads, to be kept as long as the graph.

        Returns:
            The result; its tensors are overwritten by the next call of that name.
        """
        if not state[0].is_cuda:
            result, following = function(*state)
            _store(state, following)
            return result
        if name not in self.graphs:
            self.part_of_another = True
            try:
                graph, (result, _) = self._capture(lambda: function(*state), lambda out: _store(state, out[1]))
            finally:
                self.part_of_another = False
            self.graphs[name] = (*state, *constants), graph, result
        _, graph, result = self._used(name)
        graph.replay()
        return result

    def _used(self, name: tuple) -> tuple[Sequence[torch.Tensor], torch.cuda.CUDAGraph, Any]:
        """The graph of that name, which is now the last to be forgotten where there are too many."""
        found = self.graphs[name] = self.graphs.pop(name)
        if len(self.graphs) > MOST_GRAPHS:
            torch.cuda.synchronize()  # it may be running
            del self.graphs[next(iter(self.graphs))]
        return found

    def _capture(
        self, function: Callable[[], Any], finish: Callable[[Any], None] = lambda outputs: None
    ) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of ``function`` and what it returns; ``finish`` is captured with it, and does not run before."""
        with GATE.exclusive():
            chance = torch.cuda.get_rng_state()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries allocate and choose kernels on first use
                    function()
            torch.cuda.current_stream().wait_stream(side)
            _forget_workspaces()
            # Each graph has a memory pool of its own: what one returns must outlive the replays of the others.
            graph = torch.cuda.CUDAGraph()
            # on a stream of this device (torch keeps one of the first); others may allocate meanwhile
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                outputs = function()
                finish(outputs)
            _forget_workspaces()
            torch.cuda.set_rng_state(chance)  # a seed means the same whether graphs were recorded on the way or not
        return graph, outputs


def _forget_workspaces() -> None:
    """Let cuBLAS allocate its workspaces anew: a graph's is to lie in the graph's own memory, which nobody else frees.

    torch keeps one for each stream, and frees it when a graph of that stream is deleted or compiled ones are recorded.
    """
    torch._C._cuda_clearCublasWorkspaces()


def _store(state: Sequence[torch.Tensor], following: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(state, following, strict=True):
        if value is not tensor:
            tensor.copy_(value)


class Product:
    """Linear modules of one input, computed as one product: a large product reads weights faster than several small.

    The weights are laid side by side in memory, where they remain the modules' own, and take no second copy.
    """

    def __init__(self, linears: list[nn.Linear]):
        ends = list(itertools.accumulate(linear.out_features for linear in linears))
        self.parts = [(linear, slice(end - linear.out_features, end)) for linear, end in zip(linears, ends)]
        self.weight = self._side_by_side([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears]
        self.bias = None if biases[0] is None else self._side_by_side(biases)
        self.multiply: Callable = functools.partial(nn.functional.linear, weight=self.weight, bias=self.bias)
        self.result: Any = None  # (.., out) of the product under way

    def _side_by_side(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        data = [tensor.data for tensor in tensors]
        if all(map(_follows, data, data[1:])):  # another fast path has laid them so
            return data[0].as_strided((sum(map(len, data)), *data[0].shape[1:]), data[0].stride())
        whole = torch.cat(data)
        for tensor, (_, part) in zip(tensors, self.parts):
            tensor.data = whole[part]
        return whole

    @classmethod
    def find(cls, layers: list[nn.Module], siblings: Sequence[tuple[str, ...]] = SIBLINGS) -> list["Product"]:
        """All that the layers' modules allow; quantized and adapted modules stay as they are."""
        candidates = itertools.product((module for layer in layers for module in layer.modules()), siblings)
        groups: Iterator[list] = ([getattr(module, name, None) for name in names] for module, names in candidates)
        return [cls(linears) for linears in groups if _alike(linears)]


def _follows(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether ``other`` begins in memory where ``one`` ends."""
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    return (
        one.is_contiguous()
        and other.is_contiguous()
        and one.data_ptr() + one.numel() * one.element_size() == other.data_ptr()
    )


def _alike(linears: list) -> bool:
    if any(type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter for linear in linears):
        return False  # torchao quantizes, and tensor parallelism splits, the weight of a plain layer
    if any(linear.weight.is_inference() for linear in linears):
        return False
    kinds = {(m.in_features, m.bias is None, m.weight.dtype, m.weight.device) for m in linears}
    return len(kinds) == 1 and len({id(m.weight) for m in linears}) == len(linears)


class PartOfProduct(nn.Linear):
    """What a module of a :class:`Product` is in a twin: the first computes for all."""

    product: Product
    part: slice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This module's part (.., part) of the product with x (.., in)."""
        product, part = self.product, self.part
        if part.start == 0:
            product.result = product.multiply(x)
        result = product.result
        if part.stop == product.weight.shape[0]:
            product.result = None
        return result[..., part]


class Twin:
    """A model as graphs record it: ``model`` is a copy of the modules over the same weights.

    Args:
        model: the model to copy.
        layers_of: its decoder layers, of a model.
        siblings: names of modules that are always called together, on one input.
        streams: read large weights in eight bits, which a drafter may.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers_of: Callable,
        siblings: Sequence[tuple[str, ...]] = SIBLINGS,
        streams: bool = False,
    ):
        self.model = copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors_of(model)})
        layers: list[nn.Module] = list(layers_of(self.model))
        self.products = Product.find(layers, siblings)
        for product in self.products:
            for linear, part in product.parts:
                linear.__class__ = PartOfProduct
                vars(linear).update(product=product, part=part)
            product.parts.clear()  # a circle would keep the weights until Python looks for circles
        self.streamed: list[Streamed] = stream(self.model) if streams else []
        for product in self.products:
            if streams and can_stream(product.weight):
                product.multiply = Streamed(product.weight, product.bias)
                self.streamed.append(product.multiply)
        fuse(self.model)


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """All tensors that a copy shall share: weights, buffers, and what quantized modules keep beside them."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        for value in vars(module).values():
            kept = [] if isinstance(value, (nn.Module, type)) else list(getattr(value, "__dict__", {}).values())
            yield from (each for each in (value, *kept) if isinstance(each, torch.Tensor))


@contextlib.contextmanager
def held(holder: object, **attributes: Any) -> Iterator[None]:
    """Let an object have these attributes for a while."""
    before = dict(vars(holder))
    vars(holder).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(holder).pop(name)
        vars(holder).update({name: before[name] for name in attributes if name in before})
