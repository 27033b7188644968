"""Products of few rows on a GPU, each weight read once and as it lies; a drafter's in eight bits.

A draft step multiplies a row or a few with every weight of the drafter, so it takes as long as reading them does. In
eight bits, with one scale for each output, half of 16 bits is read. What is drafted may differ by that rounding. What
is kept is the target's all the same: it decides, and sampling accepts by the distribution that was drafted from. The
target's own weights stay as they are.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .triton_ppow import HAS_TRITON, INTERPRETED, tl, triton

MOST_ROWS = 16  # of more, arithmetic begins to count, and the library's products are as fast
FEWEST_WEIGHTS = 1 << 22  # of smaller matrices reading takes no longer than starting a kernel
HALVES = torch.bfloat16, torch.float16


class Streamed:
    """A weight and a copy of it in eight bits, called as ``nn.Linear`` is: x (.., K) -> (.., N).

    Args:
        weight: (N, K), bfloat16 or float16.
        bias: (N,) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight, bias
        self.bytes, self.scale = in_eight_bits(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Few rows by the copy, more by the weight itself."""
        if x.numel() > MOST_ROWS * x.shape[-1] or x.dtype != self.weight.dtype:
            return nn.functional.linear(x, self.weight, self.bias)
        return multiply(x, self.bytes, self.scale, self.bias)


class StreamedLinear(nn.Linear):
    """What a large linear module is in a drafter's twin."""

    streamed: Streamed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear``."""
        return self.streamed(x)


def can_stream(weight: torch.Tensor) -> bool:
    """Whether a weight is large, plain (torchao quantizes those of plain layers) and lies where the kernel runs."""
    plain = type(weight) in (nn.Parameter, torch.Tensor) and type(weight.data) is torch.Tensor
    here = HAS_TRITON and (weight.is_cuda or INTERPRETED)
    return here and plain and weight.is_contiguous() and weight.dtype in HALVES and weight.numel() >= FEWEST_WEIGHTS


def stream(model: nn.Module) -> list[Streamed]:
    """Exchange the large linear modules of a twin, whose modules nobody else uses; -> what was exchanged."""
    found = []
    for module in _large(model):
        held: Any = module
        held.__class__ = StreamedLinear
        held.streamed = Streamed(module.weight, module.bias)
        found.append(held.streamed)
    return found


def streamed_bytes(model: nn.Module) -> int:
    """Memory that the copies of a model's weights take."""
    return sum(module.weight.numel() for module in _large(model))


def _large(model: nn.Module) -> list[nn.Linear]:
    """Linear modules that can be streamed; pruned ones make their weight anew, and some have a forward of their own."""
    linears = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    return [module for module in linears if type(module.weight) is nn.Parameter and can_stream(module.weight)]


def sums_of(streamed: Iterable[Streamed]) -> torch.Tensor:
    """Sums of the bits of every row, which tell whether somebody has since trained or loaded others in its place."""
    sums = [each.weight.detach().view(torch.int16).sum(1) for each in streamed]
    return torch.cat(sums) if sums else torch.empty(0)


def in_eight_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (N, K) as int8 (N, K) and a float32 scale (N,) for each output: round(w / s), s = max |w| / 127."""
    rounded, scales = torch.empty_like(weight, dtype=torch.int8), []
    for part, out in zip(weight.detach().split(512), rounded.split(512)):  # so that no float32 copy of all is made
        exact = part.float()
        scales.append((exact.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny))
        out.copy_((exact / scales[-1][:, None]).round_())
    return rounded, torch.cat(scales)


def multiply(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (.., K) times a weight of :func:`in_eight_bits`: -> (.., N), sums in float32, rounded once.

    Args:
        x: at most :data:`MOST_ROWS` rows of bfloat16 or float16.
        weight: (N, K) int8.
        scale: (N,) float32.
        bias: (N,) or None.
    """
    (outs, size), rows = weight.shape, x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = x.new_empty(*x.shape[:-1], outs)
    at_once, block, stages = _cut(outs, weight)
    _streamed[(triton.cdiv(outs, at_once),)](
        rows, weight, scale, scale if bias is None else bias, out, len(rows), outs, size, rows.stride(0),
        ROWS=MOST_ROWS, OUTS=at_once, BLOCK=block, STAGES=stages, EVEN=size % block == 0, BIASED=bias is not None,
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


def _cut(outs: int, weight: torch.Tensor) -> tuple[int, int, int]:
    """Outputs of a program, weights of each read at once, reads on their way.

    The last line was the fastest of 42 or nearly so on an H200, at the shapes of an EAGLE-3 drafter for Llama-3.1-8B:
    0.5 to 0.8 of the library's time for 16 bits. Its second choice needs 160 KB of shared memory.
    """
    device = torch.cuda.get_device_properties(weight.device) if weight.is_cuda else None
    if getattr(device, "shared_memory_per_block_optin", 0) < 232448:  # ROCm does not say
        return 32, 128, 3
    return (64, 256, 3) if outs >= 16384 else (32, 512, 6)  # few outputs: more programs, which read further ahead


if HAS_TRITON:

    @triton.jit(do_not_specialize=["rows"])
    def _streamed(  # type: ignore[no-untyped-def]
        x, weight, scale, bias, out, rows, outs, size, x_row,
        ROWS: tl.constexpr, OUTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
        BIASED: tl.constexpr,
    ):  # fmt: skip
        """Some outputs of all rows."""
        place, row, column = tl.program_id(0) * OUTS + tl.arange(0, OUTS), tl.arange(0, ROWS), tl.arange(0, BLOCK)
        real, inside = place < outs, row < rows
        given = x + row[:, None] * x_row + column[None]
        weights = weight + place.to(tl.int64)[None] * size + column[:, None]
        total = tl.zeros([ROWS, OUTS], tl.float32)
        for left in tl.range(0, size, BLOCK, num_stages=STAGES):
            if EVEN:
                w = tl.load(weights + left, mask=real[None], other=0)
                a = tl.load(given + left, mask=inside[:, None], other=0.0)
            else:
                there = left + column < size
                w = tl.load(weights + left, mask=real[None] & there[:, None], other=0)
                a = tl.load(given + left, mask=inside[:, None] & there[None], other=0.0)
            total = tl.dot(a, w.to(a.dtype), total)
        total *= tl.load(scale + place, mask=real, other=0.0)[None]
        if BIASED:
            total += tl.load(bias + place, mask=real, other=0.0).to(tl.float32)[None]
        at = out + row[:, None].to(tl.int64) * outs + place[None]
        tl.store(at, total.to(out.dtype.element_ty), mask=inside[:, None] & real[None])
