"""Whether a target computes a window of tokens as it computes the same tokens one by one: asked before any token.

Drafting keeps a target's output only if it does. Many architectures do not: they count positions by cache slot, keep a
local window of their own, add a bias that no mask can express, or a wrapper changes what they read. What the tests
walk token for token is known to be right (``KNOWN``). Any other target is tried out, once: plain ``generate`` writes a
few tokens, and a chain, a tree and another chain of windows must come to the same logits, for a row alone and for rows
padded on the left. A call that reaches further than a border that the configuration names (a sliding window, the
length of pretraining) is preceded by a trial across it.

RoPE whose frequencies follow the longest position of a forward ("longrope", "dynamic") is decided without a trial: a
call that stays on one side of the border is right, one that crosses it is refused.
"""

import copy
import json
import weakref
from collections.abc import Callable, Iterator

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel

from .drafting_ppow import DraftWindow
from .masks_ppow import ancestors_of
from .prompt_ppow import device_of
from .target_ppow import TargetState, check_kind, decoder_layers, is_split

# Classes of transformers that tests/decoding/test_families.py walks, under every attention implementation.
KNOWN = {
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GptOssForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
}
PROMPT, TOKENS = 24, 12  # of a trial
WRONG = 8  # siblings before the right node of a tree: its slot lies far from its position
# Root mean square difference of the logits, in units of their spread, that rounding explains. A fault in a mask or in
# a position is some 0.3 or more in a trained model; of a small random one it may be 0.001, in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
COARSE = 0.15
COPY_BYTES = 2 << 30  # a target of fewer bytes in float32 is tried as a copy in float32
# Relative difference of a layer's outputs that is more than rounding: int8 activations make it 0.005 or more.
MIXED = 0.002
# (target, taps, past, batch, capacity, valid) -> a state
MakeState = Callable[[PreTrainedModel, list[int], None, int, int, torch.Tensor | None], TargetState]
_BORDERS = ("window", "chunk", "position", "max_seq", "seq_len", "local", "block", "span", "floor_scale", "index_topk")

# target -> {what was asked: why it is refused, or None}
_found: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple, str | None]] = weakref.WeakKeyDictionary()


def check_target(target: PreTrainedModel, start: int = 0, prompt: int = 1, end: int = 1, ahead: int = 0) -> None:
    """Raise a ValueError unless drafting leaves the output of a call of this target as it is.

    Args:
        target: a loaded target, in eval mode.
        start: tokens of the text that a passed cache holds.
        prompt: tokens of the text after the first forward.
        end: tokens of the longest text that the target may read in this call.
        ahead: cache slots that windows may take after it.

    Raises:
        ValueError: it says what is wrong, and what to do.
    """
    check_kind(target)
    check_rope(target.config, start, prompt, end)
    if is_known(target):
        return
    decoder_layers(target)
    shortest = min((size for size in _learned_positions(target) if size > TOKENS + 2), default=PROMPT + TOKENS)
    near = min(PROMPT, shortest - TOKENS)
    far = (border - 2 for border in borders(target) if near + TOKENS < border <= end + ahead)
    for length in (near, *far):
        reason = trial(target, "plain", length, TargetState)
        if reason is not None:
            reason += " (call its eval() first: it is in training mode)" * target.training
            raise ValueError(
                f"{type(target).__name__} is not served: {reason}, so drafting would change its output. Generate "
                "without a drafter, or choose another target; docs/targets.md lists which are right."
            )


def is_known(target: PreTrainedModel) -> bool:
    """Whether the tests answer for the target's class, with weights as they are, and nothing is wrapped around it."""
    kind = type(target)
    if kind.__name__.startswith("FSDP"):  # fully_shard derives a class of its own from the target's
        kind = kind.__bases__[-1]
    known = kind.__module__.startswith("transformers.models.") and kind.__name__ in KNOWN
    return known and not is_wrapped(target) and not is_quantized(target)


def is_wrapped(target: PreTrainedModel) -> bool:
    """Whether somebody else prepares the target's inputs (prompt tuning of PEFT sets a method on the instance)."""
    own = vars(target).get("prepare_inputs_for_generation")
    return own is not None and getattr(own, "__func__", own) is not type(target).prepare_inputs_for_generation


def is_quantized(target: PreTrainedModel) -> bool:
    """Whether transformers or somebody's own call has quantized any of the weights."""
    return getattr(target, "is_quantized", False) or any(map(_is_quantized, target.parameters()))


def _is_quantized(weight: torch.Tensor) -> bool:
    if hasattr(weight, "device_mesh"):  # a process's part of a plain one
        return False
    return type(weight) is not torch.nn.Parameter or weight.dtype.itemsize == 1


def check_rope(config: PreTrainedConfig, start: int, prompt: int, end: int) -> None:
    """Raise a ValueError where the RoPE's frequencies change within a call; arguments of :func:`check_target`."""
    config = config.get_text_config(decoder=True)
    for rope, border in length_ropes(config):
        stays = end <= border or (rope == "longrope" and prompt > border and not 0 < start <= border)
        if not stays:
            raise ValueError(
                f"The target's RoPE ({rope}) changes its frequencies after {border} tokens, and this call may read "
                f"{end} ({prompt} of them at first): a window across that border would not be what the tokens "
                f"are one by one. Keep prompt and max_new_tokens within {border} together"
                f"{', or start after it' if rope == 'longrope' else ''}, or generate without a drafter. "
                f"(In training: max_length.)"
            )


def length_ropes(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """Each RoPE of a text configuration that depends on the length of the text: its type, and from where on."""
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *ropes.values()]:
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            yield kind, int(original or getattr(config, "original_max_position_embeddings", 0) or 0)
        elif kind is not None and "dynamic" in kind:
            yield kind, int(getattr(config, "max_position_embeddings", 0) or 0)


def borders(target: PreTrainedModel) -> list[int]:
    """Lengths at which the configuration says that something about attention or positions may change, ascending.

    Learned positions end at such a border, so nothing lies after it that could be compared. RoPE has none at the
    length of pretraining, but for those of :func:`check_rope`.
    """
    rotary = getattr(target.config.get_text_config(decoder=True), "rope_parameters", None) is not None
    found: set[int] = set()
    stack = [target.config.get_text_config(decoder=True).to_dict()]
    while stack:
        for key, value in stack.pop().items():
            if isinstance(value, dict):
                stack.append(value)
            elif any(part in str(key) for part in _BORDERS) and not (rotary and key == "max_position_embeddings"):
                values = value if isinstance(value, (list, tuple)) else [value]
                found |= {int(v) for v in values if isinstance(v, (int, float)) and v > 0}
    ends = _learned_positions(target)
    return sorted(border for border in found if not ends & set(range(border, border + 9)))


def _learned_positions(target: PreTrainedModel) -> set[int]:
    """Sizes of the embeddings that are not the vocabulary's."""
    sizes = {module.num_embeddings for module in target.modules() if isinstance(module, torch.nn.Embedding)}
    return sizes - {target.config.get_text_config(decoder=True).vocab_size}


# -- trials ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def trial(target: PreTrainedModel, name: str, length: int, make_state: MakeState) -> str | None:
    """Try windows on a prompt of ``length`` tokens, unless that was done: -> why they are wrong, None if right.

    Args:
        name: of the trial; with the target, its configuration, dtype and attention what the answer is remembered by.
        make_state: as the constructor of :class:`TargetState`.
    """
    config = target.config
    settings = json.dumps(config.to_dict(), default=str, sort_keys=True)
    key = (name, length, settings, str(config._attn_implementation), target.dtype, target.training)
    known = _found.setdefault(target, {})
    if key not in known or is_wrapped(target):
        with torch.autocast(target.device.type, enabled=False):  # its rounding is not the target's
            known[key] = _try(target, length, make_state)
    return known[key]


def _try(target: PreTrainedModel, length: int, make_state: MakeState) -> str | None:
    subject = copy.copy(_in_float32(target))
    subject.generation_config = GenerationConfig()  # of the shallow copy: what the user set stays, and takes no part
    try:
        prompt, mask, forced = _text(subject, length)
    except ValueError as error:
        return str(error)
    kind = mixes_rows(subject)
    if kind is not None:
        return (
            f"what its {kind} layers compute of a token changes with the other tokens of the same pass, as they "
            "quantize activations together. Quantize weights alone (with bitsandbytes to 4 bits, or to 8 with "
            "llm_int8_threshold=0.0)"
        )
    flash = "flash" in (target.config._attn_implementation or "")  # takes chains of one row, nothing else
    tolerance = TOLERANCE.get(subject.dtype, COARSE)
    if subject.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        tolerance = max(tolerance, 0.02)
    for padded in (False,) if flash else (False, True):
        rows = slice(0, 1 + padded)
        given = prompt[rows], mask[rows], forced[rows]
        try:
            expected = _one_by_one(subject, *given)  # (B, TOKENS, V)
        except torch.OutOfMemoryError:  # says nothing about the target
            raise
        except Exception as error:  # whatever a model raises that needs more than ids
            if length > PROMPT:  # mostly an end of its own, which plain generation meets as well
                return None
            return f"plain generate() of a few random tokens ends in {_short(error)}"
        try:
            found = _in_windows(subject, *given, make_state, tree=not flash)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model that takes no window raises what it likes
            return f"it takes no windows ({_short(error)})"
        for shape, at, logits in found:
            off = _difference(logits, expected.gather(1, at[:, :, None].expand_as(logits)))
            if not off <= tolerance:
                return (
                    f"the logits of {shape} {'in a padded batch ' if padded else ''}are not those of the same tokens "
                    f"one by one (relative difference {off:.1g}, rounding explains {tolerance:.1g})"
                )
    return None


def mixes_rows(target: PreTrainedModel) -> str | None:
    """The kind of quantized layers, if any, whose product of one row changes with the row beside it.

    So do those that take one scale for all rows, or treat a column apart (LLM.int8) where any row has an outlier. In 16
    bits the difference could pass for rounding, so one layer of each kind is asked by itself.
    """
    layers = [layer for layer in target.modules() if isinstance(layer, torch.nn.Linear)]
    kinds = {(type(layer), type(layer.weight)): layer for layer in layers if _is_quantized(layer.weight)}
    for (kind, weight), layer in kinds.items():
        width = layer.weight.shape[-1] if is_split(target) else layer.in_features
        rows = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0), device="cpu")
        louder = rows * torch.tensor([[1.0], [100.0]], device="cpu")  # in the second row every column is an outlier
        place = device_of(target) if layer.weight.device.type == "meta" else layer.weight.device
        first, same = (layer(x.to(place, target.dtype))[:, :1].float() for x in (rows, louder))
        if not _difference(same, first) <= MIXED:
            return weight.__name__ if kind is torch.nn.Linear else kind.__name__
    return None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else 'no message'}"


def _in_float32(target: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32 where rounding could hide a fault and the copy is small and can be made; else the target."""
    parameters = list(target.parameters())
    plain = all(type(p) is torch.nn.Parameter and p.is_floating_point() for p in parameters)  # not quantized, sharded
    plain = plain and len({p.device for p in parameters}) == 1 and not getattr(target, "is_quantized", False)
    small = sum(p.numel() for p in parameters) * 4 <= COPY_BYTES
    if target.dtype not in (torch.bfloat16, torch.float16) or not plain or not small:
        return target
    return copy.deepcopy(target).float()


def _text(target: PreTrainedModel, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two prompts (2, length), the second padded on the left, their mask, and the tokens (2, TOKENS) to follow."""
    text = target.config.get_text_config(decoder=True)
    special, stack = {0}, [target.config.to_dict()]
    while stack:  # images' places and the like mean something; plain words are wanted
        for key, value in stack.pop().items():
            if isinstance(value, dict):
                stack.append(value)
            elif "token" in str(key):
                values = value if isinstance(value, (list, tuple)) else [value]
                special |= {v for v in values if isinstance(v, int)}
    words = [i for i in range(min(text.vocab_size, 4096)) if i not in special]
    if len(words) < 4:
        raise ValueError(f"a vocabulary of {text.vocab_size} leaves no words to try")
    chance = torch.Generator().manual_seed(0)
    draw = torch.randint(len(words), (2, length + TOKENS), generator=chance, device="cpu")  # whatever the default is
    ids = torch.tensor(words, device=target.device)[draw.to(target.device)]
    mask = torch.ones_like(ids[:, :length])
    mask[1, : length // 2] = 0
    return ids[:, :length].masked_fill(mask == 0, words[0]), mask, ids[:, length:]


class _Forced(LogitsProcessor):
    """Makes ``generate`` write the given tokens (B, n)."""

    def __init__(self, tokens: torch.Tensor, start: int):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.tokens[:, input_ids.shape[1] - self.start, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, token.to(scores.device), 0.0)


def _one_by_one(target: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Logits (B, TOKENS, V) of plain ``generate``: entry i is about the token that forced[i] is."""
    config = GenerationConfig(
        max_new_tokens=forced.shape[1],
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    forcing = LogitsProcessorList([_Forced(forced, ids.shape[1])])
    out = target.generate(ids, attention_mask=mask, generation_config=config, logits_processor=forcing)
    return torch.stack(out.logits, 1)


def _in_windows(
    target: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    forced: torch.Tensor,
    make_state: MakeState,
    tree: bool,
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """The same tokens in windows, as decoding runs them: -> what it was, which tokens (B, n), their logits (B, n, V).

    A second row keeps less of each window than the first, so that rows of unequal length are tried too.
    """
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    taps, width = sorted({0, layers // 2}), target.config.get_text_config(decoder=True).hidden_size
    padded = bool((mask == 0).any())
    capacity = ids.shape[1] + TOKENS + WRONG + 8
    state = make_state(target, taps, None, len(ids), capacity, mask.bool() if padded else None)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, tapped = state.prefill(ids, mask, positions, None)
    if tapped.shape != (*ids.shape, len(taps) * width):
        raise ValueError(f"hidden states of shape {tuple(tapped.shape)}, {(*ids.shape, len(taps) * width)} expected")
    done = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    found = [("a prompt", done[:, None], logits[:, None])]
    shapes = ["a chain", "a tree", "a chain after a tree"] if tree else ["a chain", "a chain after a chain"]
    for shape in shapes:
        window, path = _window(forced, done, shape == "a tree")
        logits = state.verify(window)[0]
        nodes = path.expand(len(ids), -1)
        at = done[:, None] + 1 + torch.arange(len(path), device=ids.device)
        found.append((shape, at, logits.gather(1, nodes[:, :, None].expand(-1, -1, logits.shape[-1]))))
        kept = torch.full_like(done, len(path))
        kept[1:] -= 1
        state.keep(nodes, kept, in_order=shape != "a tree")
        done = done + kept
    return found


def _window(forced: torch.Tensor, done: torch.Tensor, tree: bool) -> tuple[DraftWindow, torch.Tensor]:
    """A window over forced[done], forced[done + 1], ..: -> it, and which of its nodes are those tokens, root first."""
    batch, device = len(forced), forced.device

    def token(offset: int) -> torch.Tensor:
        return forced.gather(1, done[:, None] + offset)

    if not tree:
        return DraftWindow.chain(torch.cat([token(i) for i in range(4)], 1)), torch.arange(4, device=device)
    # the root, wrong children, the right one; below that one wrong and one right, below a wrong one another
    wrong = [forced.roll(i + 1, 1)[:, :1] for i in range(WRONG)]
    tokens = torch.cat([token(0), *wrong, token(1), wrong[0], token(2), wrong[1]], 1)
    right = WRONG + 1
    parents = torch.tensor([0] * (right + 1) + [right, right, 1], device=device).expand(batch, -1)
    depth = torch.tensor([0] + [1] * right + [2] * 3, device=device).expand(batch, -1)
    window = DraftWindow(tokens, parents, depth, ancestors_of(parents, 2), 2)
    return window, torch.tensor([0, right, right + 2], device=device)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of found - expected (B, n, V) over the spread of ``expected``, where that is finite."""
    finite = expected.isfinite()
    found, expected = found.to(expected.device, expected.dtype), expected.masked_fill(~finite, 0.0)
    off = (found - expected).masked_fill(~finite, 0.0)
    spread = expected - expected.mean(-1, keepdim=True)
    return float(off.square().mean().sqrt() / spread.square().mean().sqrt().clamp(min=1e-30))
