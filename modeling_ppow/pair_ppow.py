"""A target and its drafter on the way through one text: what :func:`generation_ppow.decode` asks of them, step by step.

On the fast path the next cycle is under way before this one's tokens are read; that is hidden here.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from transformers import Cache, PreTrainedModel

from .cache_ppow import DrafterMemory, SlotCache, hand_back
from .drafting_ppow import DrafterState, DraftOptions, DraftWindow
from .fast_path_ppow import FastPath
from .prompt_ppow import Prompt
from .recording_ppow import GATE
from .schedules_ppow import Schedule, costs_of, make_schedule
from .target_ppow import TargetState
from .transcript_ppow import Transcript, Verdict
from .verifier_ppow import Verifier

CATCH_UP = 64  # tokens of one forward when rows of a batch that ended early are brought to the others' length
PLAIN_CAPACITY = 512  # slots for new tokens that the plain path allocates at first


class Cycle(NamedTuple):
    """A cycle that was begun before the tokens of the one before were read."""

    window: DraftWindow
    outputs: tuple[torch.Tensor, torch.Tensor]
    verdict: Verdict


class Pair:
    """The states of both models, and how far they are.

    Args:
        target, drafter: the pair.
        words: of ``drafter.embedding_for(target)``; None on the fast path, which has its own.
        options: how to draft, as in effect on this path.
        prompt: what the target has to read.
        text: the transcript that tells what room is left and who still grows.
        verifier: the acceptance rule.
        fast: the :class:`FastPath` of this call, or None.

    Attributes:
        root: (B,) the newest token of every row, under which the next window is drafted.
    """

    whole_cycles = True  # whether the fast path may replay a cycle as one graph, instead of its parts

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: PreTrainedModel,
        words: Any,
        options: DraftOptions,
        prompt: Prompt,
        text: Transcript,
        verifier: Verifier,
        fast: FastPath | None,
    ):
        self.target, self.drafter, self.words, self.options, self.prompt = target, drafter, words, options, prompt
        self.text, self.verifier, self.fast = text, verifier, fast
        if fast is None:
            capacity = prompt.end + min(text.remaining(), PLAIN_CAPACITY) + options.slots
            taps = drafter.config.target_taps
            self.target_state = TargetState(target, taps, prompt.past, text.batch, capacity, prompt.valid)
            self.drafter_state = self._plain_drafter()
        else:
            self.target_state, self.drafter_state = fast.target_state, fast.drafter_state
        runs_ahead = self.drafter_state.whole_windows and verifier.prefix_free
        self.runs_ahead = runs_ahead and not text.needs_every_prefix and not text.together
        here = text.device == prompt.ids.device
        self.as_one = self.whole_cycles and self.runs_ahead and here and options.accept_drafts and verifier.on_device
        self.schedule = self._schedule()
        self.begun: Cycle | None = None  # the present cycle until :meth:`accept`, the next one from then on
        self.root = prompt.ids[:, -1]
        self._grew: list[bool] = []  # which rows grew when that was last brought to the device,
        self._grow: torch.Tensor  # (B,) bool, and what was brought there

    def prefill(self, chunk: int | None) -> Verdict:
        """Read the prompt, ``chunk`` tokens a forward (None: all), and choose the first new token."""
        prompt = self.prompt
        with GATE.shared():
            logits, taps = self.target_state.prefill(
                prompt.ids, prompt.attention_mask, prompt.position_ids, chunk, self.text.remaining()
            )
            verdict = self._judge(DraftWindow.chain(self.root[:, None]), logits[:, None])  # of the last token alone
            self.root = verdict.tokens[:, 0]
            tokens = torch.cat((prompt.ids[:, 1:], self.root[:, None]), 1)
            counts = torch.full_like(self.root, tokens.shape[1])
            self.drafter_state.extend(taps, tokens, prompt.position_ids, counts)
            if not torch.isfinite(self.drafter_state.first_logits(self.root)).all():
                raise ValueError(
                    "The drafter's logits are not finite (NaN or infinity), so its weights are damaged or its dtype "
                    "overflows. Load the checkpoint again, or use bfloat16 or float32."
                )
        return verdict

    def draft(self) -> DraftWindow:
        """The next window."""
        with GATE.shared():
            if self.begun is None and self.as_one:
                self.begun = self._cycle()
            return self._draft() if self.begun is None else self.begun.window

    def verify(self, window: DraftWindow) -> tuple[torch.Tensor, torch.Tensor]:
        """The target over a window of N nodes: -> logits (B, N, V), taps (B, N, n_taps * Ht).

        On the fast path they are overwritten once the next cycle begins, which may be in :meth:`accept`.
        """
        with GATE.shared():
            return self.target_state.verify(window) if self.begun is None else self.begun.outputs

    def accept(self, window: DraftWindow, logits: torch.Tensor, taps: torch.Tensor) -> Verdict:
        """What the target takes of a window; where it can be, the next cycle is begun before anybody reads that."""
        with GATE.shared():
            verdict = self._judge(window, logits) if self.begun is None else self.begun.verdict
            self.begun = None
            if self.runs_ahead and self.text.remaining() > window.max_depth + 1:
                # should one of these tokens end the text, this was in vain
                if self.as_one:
                    self.begun = self._cycle()
                else:
                    self._move_on(verdict, taps, self._gain(verdict))
                    following = self._draft()
                    outputs = self.target_state.verify(following)
                    self.begun = Cycle(following, outputs, self._judge(following, outputs[0]))
        return verdict

    def learn(self, window: DraftWindow, counts: list[int]) -> None:
        """Tell the schedule what became of a window that is committed, ``counts`` tokens of each row being gained."""
        figures = self.text.acceptance.accepted
        accepted = [row[-1] if count else 0 for row, count in zip(figures, counts)]
        self.schedule.learn(window.max_depth, accepted, counts)

    def keep(self, verdict: Verdict, taps: torch.Tensor, counts: list[int]) -> None:
        """Let both caches hold the tokens gained, ``counts`` of every row (0: it has ended), and nothing else."""
        if self.begun is None and not self.as_one:
            with GATE.shared():
                self._move_on(verdict, taps, torch.tensor(counts, device=self.root.device))

    def fill(self, cache: Cache) -> None:
        """Let ``cache`` hold every token but the last, as without a drafter; the drafter's side of it comes along.

        Rows of a batch that ended early hold their padding too, as transformers leaves it there.
        """
        text, drafter_state = self.text, self.drafter_state
        behind = self.prompt.end - text.prompt_length - 1  # entries held, less tokens in the text
        length, held = text.length + behind, [min(n, text.length) + behind for n in text.lengths]
        with GATE.shared():
            slots, memory = self.target_state.cache, drafter_state.cache
            if min(held) < length:
                slots, memory = slots.copy(length), memory.copy(length)
                self._catch_up(slots, memory, held, length)
            hand_back(slots, cache, length)
            if drafter_state.whole_windows and memory is drafter_state.cache:
                memory = memory.copy(length)  # graphs own their buffers
            memory.set_length(length)
            cache.drafter_memory = DrafterMemory(memory, cache, self.drafter)

    def _catch_up(self, slots: SlotCache, memory: SlotCache, held: list[int], length: int) -> None:
        """Bring copies of both caches, with ``held`` entries that count in each row, to ``length`` in all rows."""
        text, target_state, drafter_state = self.text, self.target_state, self.drafter_state
        ids, behind = text.sequences().to(self.prompt.ids.device), length - text.length
        lengths = torch.tensor(held, device=ids.device)
        surplus = target_state.lengths - lengths  # of rows that ran ahead
        state = TargetState(self.target, target_state.taps, slots, text.batch, length, self.prompt.valid)
        state.lengths, state.next_position = lengths, target_state.next_position - surplus
        state.last_position = target_state.last_position
        valid = self.prompt.valid if drafter_state.valid is None else drafter_state.valid
        mine = self.drafter.state_kind(self.drafter, drafter_state.embed, memory, lengths, valid)
        while int(state.lengths.min()) < length:
            counts = (length - state.lengths).clamp(max=CATCH_UP)
            steps = torch.arange(int(counts.max()), device=ids.device)
            at = (state.lengths - behind)[:, None] + steps - 1
            window = DraftWindow.chain(ids.gather(1, at.clamp(max=text.length - 1)))
            _, taps = state.verify(window)
            positions = state.next_position[:, None] + steps
            state.keep(window.depth, counts, in_order=True)
            mine.extend(taps, ids.gather(1, (at + 1).clamp(max=text.length - 1)), positions, counts)

    def _schedule(self) -> Schedule:
        options, fast = self.options, self.drafter_state.whole_windows
        name = "constant" if options.is_tree or not options.accept_drafts else options.window_schedule
        place = self.prompt.ids.device, self.target.dtype, self.drafter.dtype, torch.get_num_threads()
        key = (*place, self.text.batch, fast, self.verifier.do_sample)
        return make_schedule(name, options.window_size, fast, lambda: costs_of(self.target, self.drafter, key))

    def _draft(self) -> DraftWindow:
        state, options, rows = self.drafter_state, self.options, self._rows()
        window = draft(state, self.root, options, self.text.remaining() - 1, self.verifier, self.schedule, rows)
        self.schedule.drafted()
        return window

    def _cycle(self) -> Cycle:
        """A whole cycle, after which both models hold what it accepted: replayed as one graph."""
        assert self.fast is not None
        self._growing()
        rows, options, verifier = self._rows(), self.options, self.verifier
        target_state, state = self.fast.target_state, self.fast.drafter_state
        size = self.schedule.begin(rows, options.longest)

        def cycle() -> Cycle:
            window = draft(state, self.root, options, options.longest, verifier, Schedule(size), rows)
            outputs = target_state.verify(window)
            verdict = verifier(window, outputs[0])
            self._move_on(verdict, outputs[1], self._gain(verdict))
            return Cycle(window, outputs, verdict)

        name = "cycle", options.tree or size, verifier.key
        places = [(self, "root"), (self, "_grow"), *target_state.places, *state.places]
        found = self.fast.advance(name, cycle, places, [verifier.columns])
        self.schedule.drafted()
        verdict = dataclasses.replace(found.verdict)
        verdict.fetch()
        return found._replace(verdict=verdict)

    def _rows(self) -> list[int]:
        return [row for row, grows in enumerate(self.text.growing()) if grows]

    def _gain(self, verdict: Verdict) -> torch.Tensor:
        """(B,) tokens that every row gains if none of them ends it."""
        return torch.where(self._growing(), verdict.accepted + 1, 0)

    def _judge(self, window: DraftWindow, logits: torch.Tensor) -> Verdict:
        verdict = self.verifier(window, logits)
        verdict.fetch()
        return verdict

    def _growing(self) -> torch.Tensor:
        """(B,) bool, on the device: rows that still grow."""
        if self._grew != self.text.growing():
            self._grew = self.text.growing()
            self._grow = torch.tensor(self._grew, device=self.root.device)
        return self._grow

    def _move_on(self, verdict: Verdict, taps: torch.Tensor, counts: torch.Tensor) -> None:
        """Keep (B,) ``counts`` tokens of each row and move the root."""
        target_state, drafter_state = self.target_state, self.drafter_state
        width = verdict.path.shape[1] if drafter_state.whole_windows else int(counts.max())
        path = verdict.path[:, :width]
        positions = target_state.next_position[:, None] + torch.arange(width, device=path.device)
        target_state.keep(path, counts, in_order=not self.options.is_tree)
        taps = taps.gather(1, path[:, :, None].expand(-1, -1, taps.shape[-1]).to(taps.device))
        drafter_state.extend(taps, verdict.tokens[:, :width], positions, counts)
        newest = verdict.tokens.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        self.root = torch.where(counts > 0, newest, self.root)

    def _plain_drafter(self) -> DrafterState:
        """The drafter's state before the prompt: with what it knows of the part that a passed cache holds."""
        prompt, drafter, device = self.prompt, self.drafter, self.prompt.ids.device
        cache, known = DrafterMemory.recall(prompt.past, drafter)
        cache = SlotCache(len(drafter.layers), prompt.end + 64) if cache is None else cache
        valid, batch = prompt.valid, self.text.batch
        if known < prompt.start:  # of these tokens we have no taps: drafting does without
            valid = torch.ones(batch, prompt.end, dtype=torch.bool, device=device) if valid is None else valid.clone()
            valid[:, known : prompt.start] = False
        lengths = torch.full((batch,), prompt.start, dtype=torch.long, device=device)
        return drafter.state_kind(drafter, self.words, cache, lengths, valid)


def draft(
    state: DrafterState,
    root: torch.Tensor,
    options: DraftOptions,
    room: int,
    verifier: Verifier,
    schedule: Schedule,
    rows: list[int],
) -> DraftWindow:
    """A window of at most ``room`` tokens in depth (what still fits besides the next token itself); ``rows`` grow."""
    if state.whole_windows:
        room = options.longest
    size = schedule.begin(rows, max(room, 0))
    if room < 1:
        return DraftWindow.chain(root[:, None])
    if not options.accept_drafts:
        depth = min(options.longest, room)
        width = min(options.tree_top_k or 1, state.drafter.config.draft_vocab_size)
        return DraftWindow.blank(root, min(options.tree_nodes or depth, width + (depth - 1) * width * width), depth)
    if options.tree is not None:
        depth, top_k, nodes = options.tree
        return state.tree(root, min(depth, room), top_k, nodes)
    if size < 1:
        return DraftWindow.chain(root[:, None])
    return state.chain(root, size, verifier.draft_sample, options.draft_threshold, schedule)
