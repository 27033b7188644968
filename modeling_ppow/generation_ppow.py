"""The decoding loop: draft a window, verify it in one target forward, keep what was accepted, repeat.

``decode`` has the signature of transformers' own decoding methods; :mod:`entrances_ppow` leads there.

The output is the target's own: token for token at temperature 0, in distribution when sampling, whatever logits
processors and stopping criteria are passed. In bfloat16 a window's forward may round differently from a one-token
forward, so that two tokens whose logits differ by less than that rounding can change places.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .attention_ppow import without_cudnn_attention
from .cache_ppow import CACHE_NAME, DrafterMemory, SlotCache, hand_back
from .checks_ppow import check_call
from .drafting_ppow import DrafterState, DraftOptions, DraftWindow
from .graphs_ppow import fast_path
from .probe_ppow import check_target
from .prompt_ppow import Prompt
from .recording_ppow import GATE
from .target_ppow import TargetState, check_pair
from .transcript_ppow import Acceptance, Transcript
from .verifier_ppow import Verifier, row_wise

CATCH_UP = 64  # tokens of one forward when rows of a batch that ended early are brought to the others' length


@dataclass
class PPOWGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output plus ``acceptance``, the figures of this call, and ``drafting``, the options in effect."""

    acceptance: Acceptance | None = None
    drafting: DraftOptions | None = None


@torch.inference_mode(False)  # what is kept from call to call must be writable in any mode
@torch.no_grad()
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
        input_ids: (B, P) prompt, left-padded, of any integer type and on any device; the output is int64 and there.
        logits_processor, stopping_criteria, generation_config, streamer: as in transformers. ``generation_config`` may
            carry ``window_size`` or ``tree_depth``/``tree_top_k``/``tree_nodes``; else the drafter's own decides.
        assistant_model: the drafter.
        **model_kwargs: ``attention_mask``, ``position_ids``, ``use_cache`` and cache (``CACHE_NAME``) of ``generate``.
            A cache that the caller passes is filled in place: afterwards it holds all tokens but the last, as without
            a drafter.

    Returns:
        (B, length) sequences, or a :class:`PPOWGenerateOutput` with ``return_dict_in_generate``.

    Raises:
        ValueError: before any token is made, when the pair does not fit together or an option cannot be honoured.
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
    # running ahead, a row may go one window beyond its end before that is known, and draft another from there
    most = prompt.end + text.remaining() + 2 * options.slots
    with without_cudnn_attention(), fast_path(target, drafter, options, prompt, most) as fast:
        cache = prompt.past
        wanted = config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        states = run(target, drafter, options, prompt, text, verifier, fast, config.prefill_chunk_size, wanted)
        if wanted:
            cache = DynamicCache(config=target.config) if cache is None else cache
            with GATE.shared():
                fill_cache(cache, *states, prompt, text)
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
        drafting=options.on_path(fast is not None),
        **{CACHE_NAME: cache},
    )


def run(
    target, drafter, options, prompt: Prompt, text: Transcript, verifier, fast, chunk: int | None, to_the_end: bool
) -> tuple[TargetState, DrafterState]:
    """Draft, verify, accept and keep until the text has ended.

    Args:
        fast: the :class:`FastPath` of this call, or None.
        chunk: prompt tokens of one forward, None for all.
        to_the_end: keep the last window too, as a next turn needs it.
    """
    with GATE.shared():
        if fast is None:
            capacity = prompt.end + min(text.remaining(), 512) + options.slots
            taps = drafter.config.target_taps
            target_state = TargetState(target, taps, prompt.past, text.batch, capacity, prompt.valid)
        else:
            target_state = fast.target_state
        logits, taps = target_state.prefill(
            prompt.ids, prompt.attention_mask, prompt.position_ids, chunk, text.remaining()
        )
        verdict = verifier(DraftWindow.chain(prompt.ids[:, -1:]), logits[:, None])  # a window of the last token alone
        verdict.fetch()
        text.commit(verdict, drafted=None)
        root = verdict.tokens[:, 0]
        drafter_state = start_drafter(drafter, target, prompt, taps, root, fast)

    def cycle():
        with GATE.shared():
            window = draft(drafter_state, root, options, text.remaining() - 1, verifier)
            logits, taps = target_state.verify(window)
            verdict = verifier(window, logits)
            verdict.fetch()
            return window.max_depth, verdict, taps

    def keep(verdict, taps, counts):  # (B,) tokens gained; 0 for rows that have ended -> the next root
        width = verdict.path.shape[1] if drafter_state.whole_windows else int(counts.max())
        path = verdict.path[:, :width]
        positions = target_state.next_position[:, None] + torch.arange(width, device=path.device)
        with GATE.shared():
            target_state.keep(path, counts, in_order=not options.is_tree)
            taps = taps.gather(1, path[:, :, None].expand(-1, -1, taps.shape[-1]).to(taps.device))
            drafter_state.extend(taps, verdict.tokens[:, :width], positions, counts)
        return torch.where(counts > 0, verdict.tokens.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0], root)

    can_run_ahead = drafter_state.whole_windows and verifier.prefix_free
    can_run_ahead = can_run_ahead and not text.needs_every_prefix and not text.together
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
            if text.finished and not to_the_end:
                break
            root = keep(verdict, taps, torch.tensor(counts, device=root.device))
        if growing != text.growing():
            growing = text.growing()
            grow = torch.tensor(growing, device=root.device)
    return target_state, drafter_state


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


def start_drafter(drafter, target, prompt: Prompt, taps, root, fast) -> DrafterState:
    """The drafter's state after the prompt: pairs (taps of x_t, x_{t+1}) for every prompt token the target read."""
    batch, device, start, valid = root.shape[0], root.device, prompt.start, prompt.valid
    if fast is None:
        cache, known = DrafterMemory.recall(prompt.past, drafter)
        cache = SlotCache(len(drafter.layers), prompt.end + 64) if cache is None else cache
        if known < start:  # of these tokens we have no taps: drafting does without
            valid = torch.ones(batch, prompt.end, dtype=torch.bool, device=device) if valid is None else valid
            valid[:, known:start] = False
        lengths = torch.full((batch,), start, dtype=torch.long, device=device)
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


def fill_cache(cache, target_state: TargetState, drafter_state: DrafterState, prompt: Prompt, text: Transcript) -> None:
    """Let ``cache`` hold every token but the last, as without a drafter; the drafter's side of it comes along.

    Rows of a batch that ended early hold their padding too, as transformers leaves it there.
    """
    drafter, target = drafter_state.drafter, target_state.target
    slots, memory = target_state.cache, drafter_state.cache
    behind = prompt.end - text.prompt_length - 1  # entries held, less tokens in the text
    length, held = text.length + behind, [min(n, text.length) + behind for n in text.lengths]
    if min(held) < length:
        ids = text.sequences().to(prompt.ids.device)
        lengths = torch.tensor(held, device=ids.device)
        surplus = target_state.lengths - lengths  # of rows that ran ahead
        slots, memory = slots.copy(length), memory.copy(length)
        state = TargetState(target, target_state.taps, slots, text.batch, length, prompt.valid)
        state.lengths, state.next_position = lengths, target_state.next_position - surplus
        state.last_position = target_state.last_position
        valid = prompt.valid if drafter_state.valid is None else drafter_state.valid
        mine = DrafterState(drafter, drafter_state.embed, memory, lengths, valid)
        while int(state.lengths.min()) < length:
            counts = (length - state.lengths).clamp(max=CATCH_UP)
            steps = torch.arange(int(counts.max()), device=ids.device)
            at = (state.lengths - behind)[:, None] + steps - 1
            window = DraftWindow.chain(ids.gather(1, at.clamp(max=text.length - 1)))
            _, taps = state.verify(window)
            positions = state.next_position[:, None] + steps
            state.keep(window.depth, counts, in_order=True)
            mine.extend(taps, ids.gather(1, (at + 1).clamp(max=text.length - 1)), positions, counts)
    hand_back(slots, cache, length)
    if drafter_state.whole_windows and memory is drafter_state.cache:
        memory = memory.copy(length)  # graphs own their buffers
    memory.set_length(length)
    cache.drafter_memory = DrafterMemory(memory, cache, drafter)
