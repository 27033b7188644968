"""The decoding loop: draft a window, verify it in one target forward, keep what was accepted, repeat.

``decode`` has the signature of transformers' own decoding methods and serves three entrances:
``target.generate(..., assistant_model=drafter)`` (through :func:`register_assisted_decoding`), ``custom_generate=``
(through :func:`generate`, no registration needed) and ``pipeline("text-generation", assistant_model=drafter)``.

The output is the target's own: token for token at temperature 0, in distribution when sampling, whatever logits
processors and stopping criteria are passed. In bfloat16 a window's forward may round differently from a one-token
forward, so that two tokens whose logits differ by less than that rounding can change places.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache_ppow import CACHE_NAME, SlotCache
from .drafting_ppow import DrafterState, DraftOptions, DraftWindow
from .graphs_ppow import fast_path
from .target_ppow import TargetState, check_pair
from .transcript_ppow import Acceptance, Transcript
from .verifier_ppow import Verifier

LOADING_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "code_revision", "proxies")
# Every window meets another number of keys, and cuDNN's attention plans each new shape for some 40 ms.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class PPOWGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output plus ``acceptance``, the acceptance figures of this call, and ``drafting``, the options that
    were in effect."""

    acceptance: Acceptance | None = None
    drafting: DraftOptions | None = None


@torch.no_grad()
@sdpa_kernel(SDPA_BACKENDS)
def decode(
    target,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus: bool = False,
    streamer=None,
    assistant_model=None,
    **model_kwargs,
) -> PPOWGenerateOutput | torch.LongTensor:
    """Generate with a target and its drafter.

    Args:
        target: the model whose output is produced.
        input_ids: (B, P) prompt, left-padded.
        logits_processor, stopping_criteria, generation_config, streamer: as in transformers. ``generation_config`` may
            carry ``window_size`` or ``tree_depth``/``tree_top_k``/``tree_nodes``; else the drafter's own decides.
        assistant_model: the drafter.
        **model_kwargs: ``attention_mask``, ``position_ids``, ``use_cache`` and cache (``CACHE_NAME``) of ``generate``.

    Returns:
        (B, length) sequences, or a :class:`PPOWGenerateOutput` with ``return_dict_in_generate``.

    Raises:
        ValueError: before any token is made, when the pair does not fit together or an option cannot be honoured.
    """
    drafter, config = assistant_model, generation_config
    options = DraftOptions.resolve(config, drafter.generation_config)
    check_pair(target, drafter)
    check_call(target, config, options, logits_processor, synced_gpus, input_ids, model_kwargs)
    text = Transcript(input_ids, stopping_criteria, streamer, config)
    columns = drafter.draft_columns().to(input_ids.device)
    verifier = Verifier(logits_processor, bool(config.do_sample), columns, text, options.accept_drafts)

    prompt = Prompt.prepare(input_ids, config, model_kwargs)
    # running ahead, a row may go one window beyond its end before that is known, and draft another from there
    fast = fast_path(target, drafter, options, prompt, prompt.end + text.remaining() + 2 * options.slots)
    if fast is None:
        capacity = prompt.end + min(text.remaining(), 512) + options.slots
        target_state = TargetState(target, drafter, prompt.past, input_ids.shape[0], capacity, prompt.valid)
    else:
        target_state = fast.target_state
    logits, taps = target_state.prefill(
        prompt.ids, prompt.attention_mask, prompt.position_ids, config.prefill_chunk_size
    )
    verdict = verifier(DraftWindow.chain(prompt.ids[:, -1:]), logits[:, None])  # a window of the last token alone
    verdict.fetch()
    text.commit(verdict, drafted=None)
    root = verdict.tokens[:, 0]
    drafter_state = start_drafter(drafter, target, target_state, prompt, taps, root, fast)

    def cycle():
        window = draft(drafter_state, root, options, text.remaining() - 1, verifier)
        logits, taps = target_state.verify(window)
        verdict = verifier(window, logits)
        verdict.fetch()
        return window.max_depth, verdict, taps

    def keep(verdict, taps, counts):  # (B,) tokens gained; 0 for rows that have ended -> the next root
        width = verdict.path.shape[1] if drafter_state.whole_windows else int(counts.max())
        path = verdict.path[:, :width]
        positions = target_state.next_position[:, None] + torch.arange(width, device=path.device)
        target_state.keep(path, counts, in_order=not options.is_tree)
        taps = taps.gather(1, path[:, :, None].expand(-1, -1, taps.shape[-1]).to(taps.device))
        drafter_state.extend(taps, verdict.tokens[:, :width], positions, counts)
        return torch.where(counts > 0, verdict.tokens.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0], root)

    can_run_ahead = drafter_state.whole_windows and verifier.prefix_free and not text.needs_every_prefix
    growing, upcoming = text.growing(), None
    grow = torch.tensor(growing, device=root.device)
    while not text.finished:
        depth, verdict, taps = upcoming or cycle()
        upcoming = None
        if can_run_ahead and text.remaining() > depth + 1:
            # the next cycle is under way before this one's tokens are read; should one of them end the text, in vain
            root = keep(verdict, taps, torch.where(grow, verdict.accepted + 1, 0))
            upcoming = cycle()
            text.commit(verdict, drafted=depth)
        else:
            counts = text.commit(verdict, drafted=depth)
            if text.finished and not config.return_dict_in_generate:
                break
            root = keep(verdict, taps, torch.tensor(counts, device=root.device))
        if growing != text.growing():
            growing = text.growing()
            grow = torch.tensor(growing, device=root.device)

    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return text.sequences()
    return PPOWGenerateOutput(
        sequences=text.sequences(),
        scores=text.stacked(text.scores),
        logits=text.stacked(text.logits),
        acceptance=text.acceptance,
        drafting=options.on_path(fast is not None),
        **{CACHE_NAME: returned_cache(target_state, drafter_state, prompt.end + text.gained)},
    )


def draft(state: DrafterState, root: torch.Tensor, options: DraftOptions, room: int, verifier: Verifier) -> DraftWindow:
    """A window of at most ``room`` tokens in depth (what still fits besides the next token itself)."""
    if state.whole_windows:
        room = options.longest
    if room < 1:
        return DraftWindow.chain(root[:, None])
    if not options.accept_drafts:
        depth = min(options.longest, room)
        width = min(options.tree_top_k or 1, state.drafter.config.draft_vocab_size)
        return DraftWindow.blank(root, min(options.tree_nodes or depth, width + (depth - 1) * width * width), depth)
    if options.is_tree:
        return state.tree(root, min(options.tree_depth, room), options.tree_top_k, options.tree_nodes)
    return state.chain(root, min(options.window_size, room), verifier.draft_sample, options.draft_threshold)


def check_call(target, config, options, processors, synced_gpus, input_ids, model_kwargs) -> None:
    """Raise a ValueError for what this loop cannot honour, before anything is computed."""
    if synced_gpus:
        raise ValueError("PPOW decoding does not run under FSDP or ZeRO-3 (synced_gpus=True); gather the target first.")
    if not model_kwargs.get("use_cache", True):
        raise ValueError("PPOW decoding needs use_cache=True: a window is verified against cached keys.")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(f"{name}=True is not available while drafting; run the target on `sequences` afterwards.")
    if config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} cannot hold windows; leave it unset with a drafter."
        )
    if any(type(p).__name__ == "UnbatchedClassifierFreeGuidanceLogitsProcessor" for p in processors):
        raise ValueError("guidance_scale runs the target on its own and cannot be combined with a drafter.")
    known = {"attention_mask", "position_ids", CACHE_NAME, "use_cache", "logits_to_keep", "inputs_tensor"}
    known |= {"tokenizer", "assistant_tokenizer", "cache_position", "return_dict"}
    unknown = [key for key, value in model_kwargs.items() if key not in known and value is not None]
    if unknown or input_ids.shape[1] == 0:
        raise ValueError(
            f"A drafter needs a prompt of at least one token id in input_ids, and only ids and their mask; "
            f"got input_ids {tuple(input_ids.shape)} and {unknown or 'nothing else'}."
        )
    mask = model_kwargs.get("attention_mask")
    attention = target.config._attn_implementation or "eager"
    if "flash" in attention and (options.is_tree or input_ids.shape[0] > 1 or mask is not None):
        raise ValueError(
            f"attn_implementation={attention!r} takes no window masks: it serves chains at batch size 1 without "
            'padding. Load the target with attn_implementation="sdpa" for trees, batches and padded prompts.'
        )


@dataclass
class Prompt:
    """What the target still has to read.

    Attributes:
        ids: (B, n) new tokens; the ``start`` tokens before them are in ``past``.
        attention_mask: (B, start + n) or None when nothing is padded.
        position_ids: (B, n).
        valid: the mask as bool, or None.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    past: object | None
    start: int
    valid: torch.Tensor | None

    @property
    def end(self) -> int:
        return self.start + self.ids.shape[1]

    @classmethod
    def prepare(cls, input_ids, config, model_kwargs) -> "Prompt":
        """Split off what a passed cache already holds; ids may be the whole conversation or only its new part."""
        past, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        start = 0 if past is None else int(past.get_seq_length())
        covered = mask.shape[1] if mask is not None else getattr(config, "_mask_length", input_ids.shape[1])
        ids = input_ids[:, start:] if covered == input_ids.shape[1] else input_ids
        if ids.shape[1] == 0:
            raise ValueError(
                f"{CACHE_NAME} already holds {start} tokens, the prompt has {input_ids.shape[1]}: nothing is left "
                "to continue from. Pass a longer prompt, or crop the cache by one token."
            )
        positions = model_kwargs.get("position_ids")
        if positions is None or positions.shape[-1] < ids.shape[1]:
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        positions = positions[:, -ids.shape[1] :].expand(ids.shape[0], -1)
        return cls(ids, mask, positions, past, start, None if mask is None else mask.bool())


def start_drafter(drafter, target, state: TargetState, prompt: Prompt, taps, root, fast) -> DrafterState:
    """The drafter's state after the prompt: pairs (taps of x_t, x_{t+1}) for every prompt token the target read."""
    batch, device = root.shape[0], root.device
    cache, valid = state.cache.drafter_cache, prompt.valid
    start = prompt.start
    fits = cache is not None and len(cache.layers) == len(drafter.layers) and cache.get_seq_length() >= start
    if not fits:
        cache = SlotCache(len(drafter.layers), prompt.end + 64)
        if start:  # a cache we know no taps for: drafting starts without that part of the text
            seen = torch.ones(batch, prompt.end, dtype=torch.bool, device=device) if valid is None else valid.clone()
            seen[:, :start] = False
            valid = seen
    lengths = torch.full((batch,), start, dtype=torch.long, device=device)
    if fast is None:
        drafter_state = DrafterState(drafter, drafter.embedding_for(target), cache, lengths, valid)
    else:
        drafter_state = fast.drafter_state
    tokens = torch.cat((prompt.ids[:, 1:], root[:, None]), 1)
    counts = torch.full((batch,), tokens.shape[1], dtype=torch.long, device=device)
    drafter_state.extend(taps, tokens, prompt.position_ids, counts)
    first = drafter.logits(drafter_state.hidden)
    if not torch.isfinite(first).all():
        raise ValueError(
            "The drafter's logits are not finite (NaN or infinity), so its weights are damaged or its dtype overflows. "
            "Load the checkpoint again, or use bfloat16 or float32."
        )
    return drafter_state


def returned_cache(target_state: TargetState, drafter_state: DrafterState, length: int) -> SlotCache | None:
    """The cache for a next turn, holding all tokens but the last; None for batches, whose rows end at odd lengths."""
    if target_state.lengths.shape[0] > 1:
        return None
    caches = []
    for state in (target_state, drafter_state):
        cache = state.cache.copy(length) if drafter_state.whole_windows else state.cache  # graphs own their buffers
        cache.set_length(length)
        caches.append(cache)
    caches[0].drafter_cache = caches[1]
    return caches[0]


# -- entrances ---------------------------------------------------------------------------------------------------------


def register_assisted_decoding() -> None:
    """Let ``generate(assistant_model=...)`` hand over to assistants that bring their own decoding method.

    ``generate`` finds its decoding method on the class, so one is wrapped on ``GenerationMixin``, once per process
    however many copies of this module are loaded (installed package, remote code). Assistants without the method
    ``assisted_decoding`` are untouched.
    """
    original = GenerationMixin._assisted_decoding
    if getattr(original, "dispatches_to_assistant", False):
        return

    @functools.wraps(original)
    def _assisted_decoding(self, input_ids, *args, assistant_model=None, **kwargs):
        own = getattr(type(assistant_model), "assisted_decoding", None)
        if own is not None:
            return own(assistant_model, self, input_ids, *args, **kwargs)
        return original(self, input_ids, *args, assistant_model=assistant_model, **kwargs)

    _assisted_decoding.dispatches_to_assistant = True
    GenerationMixin._assisted_decoding = _assisted_decoding


def generate(model, assistant_model=None, streamer=None, **kwargs):
    """Entrance for ``model.generate(..., custom_generate=<drafter repository>, assistant_model=drafter)``.

    Takes every argument of ``generate`` and, besides, every field of :class:`DraftOptions`.

    Raises:
        ValueError: without an assistant, or with one that is not a PPOW drafter.
    """
    if assistant_model is None or not hasattr(assistant_model, "draft_columns"):
        raise ValueError(
            f"custom_generate needs assistant_model=<PPOW drafter>, got {type(assistant_model).__name__}. Load it with "
            "AutoModel.from_pretrained(<drafter repository>, trust_remote_code=True)."
        )
    for name in LOADING_OPTIONS:  # transformers hands on what it loaded this module with
        kwargs.pop(name, None)
    names = [field.name for field in dataclasses.fields(DraftOptions)]
    chosen = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}

    def loop(target, input_ids, generation_config=None, **loop_kwargs):
        for name, value in chosen.items():
            setattr(generation_config, name, value)
        return decode(
            target,
            input_ids,
            generation_config=generation_config,
            assistant_model=assistant_model,
            streamer=streamer,
            **loop_kwargs,
        )

    # a callable entrance loses the tokenizer, so stop strings become a criterion here
    tokenizer, config = kwargs.pop("tokenizer", None), kwargs.get("generation_config")
    stop_strings = kwargs.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer: pass tokenizer=... to generate.")
        criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
        kwargs["stopping_criteria"] = criteria
    return type(model).generate(model, streamer=streamer, custom_generate=loop, **kwargs)
