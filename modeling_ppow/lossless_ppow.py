"""Where two greedy answers part: a near tie that rounding decided, or a fault.

A window's forward has another shape than a one-token forward, so in a low precision the two round differently, and
where two tokens' logits lie closer than that rounding either can win. Whether a difference is such a near tie is
decided by the target alone, in a precision in which the question does not arise:

* the **gap** is what the chosen token's score differs by from the other's, on the common prefix, in float32 (float64
  for a target in float32 or float64), read as ``generate`` reads them, in float32;
* the **rounding** is what the target's own dtype can move that gap by. When they are written, each of the two scores is
  rounded by at most eps / 2 of itself, so the gap moves by eps * max(|score|) at most. What the layers before add is
  measured: the same forward in the target's own dtype less the precise one has, over the likeliest tokens, a standard
  deviation sigma (what moves all of them alike decides nothing and is left out); a difference of two has one of
  sqrt(2) sigma, and six of those are allowed:

      rounding = eps * max(|score_a|, |score_b|) + 6 * sqrt(2) * sigma

A gap within the rounding is a near tie. Anything else is a fault: a token that rounding cannot have chosen.

The target's weights are converted where they lie while this is found out, so nothing else may run it meanwhile.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from .drafting_ppow import DraftOptions, call_config
from .target_ppow import decoder_layers

FAULT, NEAR_TIE = "fault", "near tie"
LIKELIEST = 64  # tokens over which the rounding is measured
DEVIATIONS = 6
Originals = list[tuple[torch.Tensor, torch.Tensor]]  # tensors, and the data they had


@dataclass(frozen=True)
class Difference:
    """The first token in which an answer differs from the one it is compared with.

    Attributes:
        position: index in the answer.
        token, expected: the two ids; None where an answer has ended.
        gap: what the two scores differ by; None where an answer has ended, or a score is not finite.
        rounding: what rounding explains.
        verdict: "near tie" or "fault".
    """

    position: int
    token: int | None
    expected: int | None
    gap: float | None = None
    rounding: float | None = None
    verdict: str = FAULT

    def __str__(self) -> str:
        if self.gap is None:
            return f"{self.verdict} at token {self.position + 1}: {self.token} instead of {self.expected}"
        return (
            f"{self.verdict} at token {self.position + 1}: the scores of {self.token} and {self.expected} are "
            f"{self.gap:.3g} apart, rounding explains {self.rounding:.3g}"
        )


def first_difference(
    target: PreTrainedModel,
    prompt: torch.Tensor,
    answer: list[int],
    expected: list[int],
    config: GenerationConfig | None = None,
    exact: bool = False,
) -> Difference | None:
    """Compare two greedy answers to one prompt.

    Args:
        target: the target; the only one that is asked.
        prompt: (1, P) ids.
        answer, expected: new tokens of the two.
        config: the call's generation config, whose processors and lengths count; None: the target's own.
        exact: the two must agree, so any difference is a fault.

    Returns:
        None when they are the same; else where they part, and what that is.
    """
    if answer == expected:
        return None
    shared = min(len(answer), len(expected))
    position = next((i for i in range(shared) if answer[i] != expected[i]), shared)
    token, wanted = (tokens[position] if position < len(tokens) else None for tokens in (answer, expected))
    if token is None or wanted is None:
        return Difference(position, token, wanted)
    ids = torch.cat((prompt, torch.tensor([answer[:position]], dtype=torch.long, device=prompt.device)), 1)
    config = ending_at(config or target.generation_config, prompt.shape[1])
    precise, own = precise_scores(target, ids, config), scores_after(target, ids, config).double()
    likely = precise.topk(min(LIKELIEST, precise.shape[-1])).indices
    noise = (own - precise)[likely]
    sigma = float(noise[torch.isfinite(noise)].std(correction=0))
    one, other = float(precise[token]), float(precise[wanted])
    eps = max(torch.finfo(dtype).eps for dtype in (target.dtype, torch.float32))
    rounding = eps * max(abs(one), abs(other)) + DEVIATIONS * math.sqrt(2) * sigma
    gap = abs(one - other)
    if not math.isfinite(gap + rounding):
        return Difference(position, token, wanted)
    return Difference(position, token, wanted, gap, rounding, NEAR_TIE if gap <= rounding and not exact else FAULT)


def without_drafts(
    target: PreTrainedModel, drafter: PreTrainedModel, prompt: torch.Tensor, config: GenerationConfig
) -> tuple[list[int], DraftOptions]:
    """The reference of a call: the same loop with windows of the same shapes and nothing drafted in them.

    Args:
        prompt: (1, P) ids.
        config: the call's generation config.

    Returns:
        Its new tokens, and the options that were in effect, whose ``repeats_exactly`` says whether a call with drafts
        must give these very tokens, or may part from them at a near tie.
    """
    config = call_config(config, accept_drafts=False, return_dict_in_generate=True)
    mask = torch.ones_like(prompt)
    out = target.generate(prompt, attention_mask=mask, generation_config=config, assistant_model=drafter)
    return out.sequences[0, prompt.shape[1] :].tolist(), out.drafting


def explain(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompt: torch.Tensor,
    answer: list[int],
    expected: list[int],
    config: GenerationConfig | None = None,
) -> list[Difference]:
    """Why a greedy answer with a drafter is not stock ``generate``'s; arguments as for :func:`first_difference`.

    Returns:
        Where it parts from stock ``generate``'s answer; and, if it does, where from the same loop without drafts.
    """
    config = call_config(config or target.generation_config, do_sample=False)
    reference, ran = without_drafts(target, drafter, prompt, config)
    found = [first_difference(target, prompt, answer, expected, config)]
    found.append(first_difference(target, prompt, answer, reference, config, exact=ran.repeats_exactly))
    return [difference for difference in found if difference is not None]


class _AtOnce(StoppingCriteria):
    """Ends a generation after its first token, whatever length its processors believe in."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def ending_at(config: GenerationConfig, prompt_length: int) -> GenerationConfig:
    """``config`` for a call that continues an answer: greedy, with lengths that count from the answer's own prompt."""
    options: dict[str, Any] = {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": False,
    }
    if config.max_new_tokens is not None:
        options |= {"max_new_tokens": None, "max_length": prompt_length + config.max_new_tokens}
    if config.min_new_tokens is not None:
        options |= {"min_new_tokens": None, "min_length": prompt_length + config.min_new_tokens}
    return call_config(config, **options)


@torch.no_grad()
def scores_after(target: PreTrainedModel, ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Stock ``generate``'s processed scores (V,) of the token after ids (1, n)."""
    now = StoppingCriteriaList([_AtOnce()])
    out = target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=now)
    return out.scores[0][0]


def precise_scores(target: PreTrainedModel, ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """The same (V,) as float64, computed in float32; of a target in float32 or float64 in float64 where it can be."""
    if target.dtype in (torch.float32, torch.float64):
        with contextlib.suppress(RuntimeError), in_dtype(target, torch.float64):  # not every kernel knows float64
            return scores_after(target, ids, config).double()
    with in_dtype(target, torch.float32):
        return scores_after(target, ids, config).double()


@contextlib.contextmanager
def in_dtype(target: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Let the target compute in a higher precision for a while, without a second copy of it.

    What lies outside the decoder layers is converted at once, each layer while it runs. Afterwards all tensors lie
    where they lay. No other thread may run the target meanwhile.
    """
    layers = decoder_layers(target)
    inside = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    config = target.config.get_text_config(decoder=True)
    before, handles = config._attn_implementation, []
    originals: Originals = []
    held: dict[torch.nn.Module, Originals] = {}
    outside = [tensor for tensor in _tensors(target) if id(tensor) not in inside]
    try:
        if "flash" in (before or ""):  # which knows 16 bits only
            config._attn_implementation = "sdpa"
        originals = _convert(outside, dtype)
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(lambda m, _: held.update({m: _convert(_tensors(m), dtype)})))
            handles.append(layer.register_forward_hook(lambda m, *_: _restore(held.pop(m, [])), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        _restore(originals)
        config._attn_implementation = before


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _convert(tensors: list[torch.Tensor], dtype: torch.dtype) -> Originals:
    """Convert what is floating and has fewer bits than ``dtype``: -> what was there before."""
    originals: Originals = []
    try:
        for tensor in tensors:
            if is_traceable_wrapper_subclass(tensor):  # quantized by torchao: a plain tensor takes its place
                plain = torch.nn.Parameter(tensor.dequantize().to(dtype), False)
                torch.utils.swap_tensors(tensor, plain)
                originals.append((tensor, plain))
            elif tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize:
                originals.append((tensor, tensor.data))
                tensor.data = tensor.data.to(dtype)
    except BaseException:
        _restore(originals)
        raise
    return originals


def _restore(originals: Originals) -> None:
    for tensor, data in originals:
        if is_traceable_wrapper_subclass(data):
            torch.utils.swap_tensors(tensor, data)
        else:
            tensor.data = data
