"""The decoding loop: draft a window, verify it in one target forward, keep what was accepted, repeat.

``decode`` has the signature of transformers' own decoding methods; :mod:`entrances_ppow` leads there.

The output is the target's own: token for token at temperature 0, in distribution when sampling, whatever logits
processors and stopping criteria are passed. In bfloat16 a window's forward may round differently from a one-token
forward, so that two tokens whose logits differ by less than that rounding can change places.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .attention_ppow import without_cudnn_attention
from .cache_ppow import CACHE_NAME
from .checks_ppow import check_call
from .drafting_ppow import DraftOptions
from .fast_path_ppow import fast_path
from .pair_ppow import Pair
from .probe_ppow import check_target
from .products_ppow import few_rows
from .prompt_ppow import Prompt
from .target_ppow import check_pair, is_split
from .transcript_ppow import Acceptance, Transcript
from .verifier_ppow import Verifier, row_wise


@dataclass
class PPOWGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output plus ``acceptance``, the figures of this call, and ``drafting``, the options in effect."""

    acceptance: Acceptance | None = None
    drafting: DraftOptions | None = None


@torch.inference_mode(False)  # what is kept from call to call must be writable in any mode
@torch.no_grad()
def decode(
    target: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    *,
    assistant_model: PreTrainedModel,
    **model_kwargs: Any,
) -> PPOWGenerateOutput | torch.Tensor:
    """Generate with a target and its drafter.

    Args:
        target: the model whose output is produced.
        input_ids: (B, P) prompt, left-padded, of any integer type and on any device; the output is int64 and there.
        logits_processor, stopping_criteria, generation_config, streamer: as in transformers. ``generation_config`` may
            carry ``window_size``, ``window_schedule`` or ``tree_depth``/``tree_top_k``/``tree_nodes`` (all of
            :class:`DraftOptions`); else the drafter's own decides.
        assistant_model: the drafter.
        **model_kwargs: ``attention_mask``, ``position_ids``, ``use_cache`` and cache (``CACHE_NAME``) of ``generate``.
            A cache that the caller passes is filled in place: afterwards it holds all tokens but the last, as without
            a drafter.

    Returns:
        (B, length) sequences, or a :class:`PPOWGenerateOutput` with ``return_dict_in_generate``.

    Raises:
        ValueError: before any token is made, when the pair does not fit together or an option cannot be honoured; after
            the first, for a drafter whose logits are not finite.
    """
    drafter, config = assistant_model, generation_config
    options = DraftOptions.resolve(config, drafter.generation_config)
    check_pair(target, drafter)
    check_call(target, drafter, config, options, logits_processor, synced_gpus, model_kwargs, input_ids.shape[0])
    prompt = Prompt.read(target, input_ids, config, model_kwargs)
    text = Transcript(input_ids, stopping_criteria, streamer, config, together=not row_wise(logits_processor))
    longest, first = int(prompt.position_ids.max()) + 1, prompt.start + (config.prefill_chunk_size or prompt.end)
    check_target(target, prompt.start, min(first, longest), longest + text.remaining() - 1, options.slots)
    columns = drafter.draft_columns().to(prompt.ids.device)
    verifier = Verifier(logits_processor, bool(config.do_sample), columns, text, options.accept_drafts)
    cache, split = prompt.past, is_split(target)  # processes that share a text must not decide by their own clocks
    wanted = config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    # running ahead, a row may go two windows beyond its end before that is known, and draft another from there
    rows = drafter.config.block_size if drafter.config.is_block else 0  # that a block's forward writes, all of them
    most = prompt.end + text.remaining() + 3 * max(options.slots, rows)
    place = prompt.ids.device.index if prompt.ids.is_cuda else -1  # where Triton launches, and graphs are recorded
    with (
        torch.cuda.device(place),
        without_cudnn_attention(),
        fast_path(target, drafter, options, prompt, most) as fast,
        contextlib.ExitStack() as stack,
    ):
        words = None
        if fast is None:
            words = drafter.embedding_for(target)
            stack.enter_context(few_rows(*(() if split else (target, drafter, words))))
        steady = bool(config.do_sample) or split
        options = options.on_path(fast is not None, steady, on_cpu=not prompt.ids.is_cuda)
        pair = Pair(target, drafter, words, options, prompt, text, verifier, fast)
        text.commit(pair.prefill(config.prefill_chunk_size), drafted=None)
        while not text.finished:
            window = pair.draft()
            logits, taps = pair.verify(window)
            verdict = pair.accept(window, logits, taps)
            counts = text.commit(verdict, drafted=window.max_depth)
            pair.learn(window, counts)
            if wanted or not text.finished:
                pair.keep(verdict, taps, counts)
        if wanted:
            cache = DynamicCache(config=target.config) if cache is None else cache
            pair.fill(cache)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return text.sequences()
    steps = text.length - text.prompt_length
    return PPOWGenerateOutput(
        sequences=text.sequences(),
        scores=text.stacked(text.scores, steps),
        logits=text.stacked(text.logits, steps),
        acceptance=text.acceptance,
        drafting=options,
        **{CACHE_NAME: cache},
    )
