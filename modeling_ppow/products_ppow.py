"""Products of few rows on a CPU, in the way that reads the weights fastest.

A window of N nodes is verified with products of N rows, and a draft step is one of a single row. A CPU's library gives
such products to one thread, or packs the weights anew for every one of them. With the factors in the other order,
W x^T, it shares the rows of W among the threads and reads them as they lie. Which order is faster depends on the
machine, the shape and the number of rows, so each is measured once a process, on the models' own weights, when it first
occurs (benchmarks/products.py measures whole models).

Both orders sum the same numbers; they round differently, as any two numbers of rows do.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import nn
from torch.nn.functional import linear

MOST_ROWS = 16  # of more, the library's order is as fast
FEWEST_WEIGHTS = 1 << 16  # of smaller matrices a product costs less than to think about it
FEWEST_IN_ALL = 1 << 25  # of smaller models caches hold the weights, and other things cost more than products
WORTH = 0.9  # the other order is taken where it needs less than this share of the time
_REPEATS = 3
_MEASURED_WEIGHTS = 8  # of a shape: in turns, so that no cache holds them

_CHOSEN: dict[tuple, dict[int, bool]] = {}  # (shape, dtype, threads) -> rows -> whether the other order is faster
_HERE = threading.local()  # .depth: calls under way in this thread
_LOCK = threading.Lock()


def swapped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (M, K) times weight (N, K) transposed -> (M, N), contiguous, computed as W x^T."""
    if len(x) == 1:  # a matrix times a vector runs on one thread, times two vectors on all
        return (weight @ torch.cat((x, torch.zeros_like(x))).T)[:, :1].T.contiguous()
    return (weight @ x.T).T.contiguous()


@contextlib.contextmanager
def few_rows(*models: nn.Module) -> Iterator[None]:
    """Within, and in this thread alone, the models' linear layers on a CPU multiply few rows in the faster order.

    Touched are plain ``nn.Linear`` modules with plain float32 or bfloat16 weights; at the end they are as before.
    """
    with _LOCK:
        found = {id(layer): layer for model in models for layer in model.modules() if _fits(layer)}
        layers = list(found.values())
        if sum(layer.weight.numel() for layer in layers) < FEWEST_IN_ALL:
            layers = []
        alike: dict[tuple, list[torch.Tensor]] = {}
        for layer in layers:
            alike.setdefault((layer.weight.shape, layer.weight.dtype), []).append(layer.weight)
        products = [_product_of(layer, alike[layer.weight.shape, layer.weight.dtype]) for layer in layers]
        for product in products:
            product.users += 1
    _HERE.depth = getattr(_HERE, "depth", 0) + 1
    try:
        yield
    finally:
        _HERE.depth -= 1
        with _LOCK:
            for product in products:
                product.users -= 1
                if not product.users:
                    del product.layer.forward


def _product_of(layer: nn.Linear, weights: list[torch.Tensor]) -> "_Product":
    """That of a call under way in another thread, or a new one."""
    known = layer.__dict__.get("forward")
    if known is None:
        known = layer.__dict__["forward"] = _Product(layer, weights)
    return known


def _fits(layer: nn.Module) -> TypeGuard[nn.Linear]:
    if type(layer) is not nn.Linear or not isinstance(layer.__dict__.get("forward"), (type(None), _Product)):
        return False
    weight = layer.weight
    plain = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor and weight.is_contiguous()
    kind = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return plain and kind and weight.numel() >= FEWEST_WEIGHTS


class _Product:
    """The forward of a layer while calls are under way."""

    def __init__(self, layer: nn.Linear, weights: list[torch.Tensor]):
        self.layer, self.weights, self.users = layer, weights, 0
        self.weight, self.bias = layer.weight, layer.bias
        kind = layer.weight.shape, layer.weight.dtype, torch.get_num_threads()
        self.chosen = _CHOSEN.setdefault(kind, {})

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear``: x (.., K) -> (.., N)."""
        rows = x.numel() // (x.shape[-1] or 1)
        if not self.chosen.get(rows, 0 < rows <= MOST_ROWS) or not self._may_choose(x) or not self._faster(rows):
            return linear(x, self.weight, self.bias)
        out = swapped(x.reshape(rows, -1), self.weight).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias

    def _may_choose(self, x: torch.Tensor) -> bool:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or x.dtype != self.weight.dtype:
            return False
        return getattr(_HERE, "depth", 0) > 0

    def _faster(self, rows: int) -> bool:
        if rows not in self.chosen:
            self.chosen[rows] = _measure(self.weights[:_MEASURED_WEIGHTS], rows)
        return self.chosen[rows]


def _measure(weights: list[torch.Tensor], rows: int) -> bool:
    """Whether the other order is clearly faster: the best of a few rounds over some weights, both orders in turns."""
    x = torch.zeros(rows, weights[0].shape[1], dtype=weights[0].dtype)

    def seconds(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        began = time.perf_counter()
        for weight in weights:
            product(x, weight)
        return time.perf_counter() - began

    rounds = [(seconds(linear), seconds(swapped)) for _ in range(_REPEATS)]
    return min(ours for _, ours in rounds) < WORTH * min(theirs for theirs, _ in rounds)
