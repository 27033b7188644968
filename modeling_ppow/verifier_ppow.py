"""Applies the rules of :mod:`acceptance_ppow` to a window's logits, with whatever logits processors the user passed.

Processors that ignore the text so far (temperature, top-k, top-p, ...) run on all nodes at once. Any other processor
is called exactly as transformers would call it: once per produced token, in order, with that token's true prefix, and
never after the end of the text. So repetition penalties, grammars and stateful processors see no drafted token that
was not accepted. In a batch, processors that are not transformers' own see all rows side by side, as they would
without a drafter: a window then counts for all rows as far as it does for each.
"""

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from .acceptance_ppow import follow, reject, reject_one, sample
from .drafting_ppow import DraftWindow
from .draws_ppow import Warp, can_draw, draw, reject_drawn
from .transcript_ppow import Collected, Transcript, Verdict

_PREFIX_FREE = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "LogitNormalization",
    "InfNanRemoveLogitsProcessor",
}
# Those that look at each row on its own and remember nothing, so that rows may gain their tokens at different speeds.
_ROW_WISE = {
    "RepetitionPenaltyLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
}
# Those that work on the draft vocabulary too, so that drafts are drawn from nearly what the target draws from.
_DRAFT_WARPERS = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"}


class DraftSampler:
    """Draws drafts from the drafter's logits, warped as the target's are; a :data:`Sampler`."""

    def __init__(self, warpers: list[LogitsProcessor]):
        self.warpers, self.warp = warpers, Warp.of(warpers)
        self.key = _settings(warpers)

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, D) -> draft ids (B,), the distributions (B, D) they were drawn from."""
        if self.warp is not None and can_draw(logits):
            ids, probs = draw(logits, self.warp)  # nearly the warpers': what is drawn from is what is compared with p
            assert probs is not None
            return ids, probs
        logits = logits.float()
        for warper in self.warpers:
            logits = warper(None, logits)
        probs = logits.softmax(-1)
        return sample(probs), probs


class Verifier:
    """Decides what is accepted of a window.

    Args:
        processors: the prepared ``LogitsProcessorList`` of ``generate``.
        do_sample: draw tokens instead of taking the argmax.
        columns: (D,) target ids of the draft vocabulary.
        text: the transcript, for prefixes and for what is to be collected.
        accept_drafts: False keeps nothing of a window but its root (see :class:`DraftOptions`).
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        do_sample: bool,
        columns: torch.Tensor,
        text: Transcript,
        accept_drafts: bool,
    ):
        self.processors, self.do_sample, self.columns, self.text = processors, do_sample, columns, text
        self.prefix_free = all(_is_stock(p, _PREFIX_FREE) for p in processors)
        warpers = [p for p in processors if _is_stock(p, _DRAFT_WARPERS)]
        self.draft_sample = DraftSampler(warpers) if do_sample else None
        self.accept_drafts = accept_drafts
        # whether all that it does can be recorded, and what tells such recordings apart
        self.on_device = len(warpers) == len(processors) and text.scores is None and text.logits is None
        self.key = type(self), do_sample, _settings(warpers)
        warp = Warp.of(warpers) if self.on_device else None
        self.warp = warp if warp is not None and warp.is_exact else None
        # looked up once, and not for nothing: the host waits for it
        self.same_words = do_sample and torch.equal(columns, torch.arange(len(columns), device=columns.device))

    def __call__(self, window: DraftWindow, logits: torch.Tensor) -> Verdict:
        """Verify ``window`` against the target's logits (B, N, V)."""
        logits = logits.to(device=window.tokens.device)
        if not self.accept_drafts and window.max_depth:
            verdict = self(DraftWindow.chain(window.tokens[:, :1]), logits[:, :1])
            verdict.path, verdict.tokens = (  # as wide as with drafts, so that what follows has the same shapes too
                torch.nn.functional.pad(table, (0, window.max_depth)) for table in (verdict.path, verdict.tokens)
            )
            return verdict
        return self._all_at_once(window, logits) if self.prefix_free else self._along_the_path(window, logits.float())

    def _all_at_once(self, window: DraftWindow, logits: torch.Tensor) -> Verdict:
        drawn = self.do_sample and can_draw(logits)
        warp = self.warp if drawn else None  # what the kernels do of the processors' work
        scores = raw = logits if warp is not None else logits.float()
        if self.processors and warp is None:
            scores = self.processors(None, raw.flatten(0, 1).to(self.text.device, copy=True))
            scores = scores.to(raw.device).view_as(raw)
        if drawn and window.draft_probs is not None:
            columns = None if self.same_words and len(self.columns) == scores.shape[-1] else self.columns
            accepted, path, following = reject_drawn(window, scores, warp or Warp(), columns)
        elif window.draft_probs is not None:
            accepted, path, following = reject(window, scores.softmax(-1), self.columns)
        elif drawn:
            choices, _ = draw(scores.flatten(0, 1), warp or Warp(), with_probs=False)
            accepted, path, following = follow(window, choices.view_as(window.tokens))
        else:
            choices = sample(scores.softmax(-1)) if self.do_sample else scores.argmax(-1)
            accepted, path, following = follow(window, choices)
        tokens = window.tokens.gather(1, path.roll(-1, 1))
        tokens = tokens.scatter(1, accepted[:, None], following[:, None])

        def of_path(values: torch.Tensor, wanted: object) -> Collected | None:
            return None if wanted is None else [list(row[nodes]) for row, nodes in zip(values, path)]

        return Verdict(accepted, path, tokens, of_path(scores, self.text.scores), of_path(raw, self.text.logits))

    def _along_the_path(self, window: DraftWindow, raw: torch.Tensor) -> Verdict:
        """Token by token; each is appended to the text at once, so that no processor is asked after an end."""
        text, before = self.text, list(self.text.lengths)
        paths = [[0] for _ in range(raw.shape[0])]
        for rows in text.groups():
            self._walk(window, raw, rows, paths)
        appended = [length - start for length, start in zip(text.lengths, before)]
        tokens = [text.ids[row, start : text.lengths[row]].tolist() for row, start in enumerate(before)]

        def table(lists: list[list[int]]) -> torch.Tensor:  # of one width, so that the fast path needs one graph
            wide = [values + [0] * (window.max_depth + 1 - len(values)) for values in lists]
            return torch.tensor(wide).to(raw.device)

        accepted = torch.tensor([len(path) - 1 for path in paths]).to(raw.device)
        return Verdict(accepted, table(paths), table(tokens), appended=appended)

    def _walk(self, window: DraftWindow, raw: torch.Tensor, rows: list[int], paths: list[list[int]]) -> None:
        """Follow ``rows`` from the root as long as each of them finds its token in the window; extends their paths."""
        drafted, parents = window.tokens.tolist(), window.parents.tolist()
        children = {
            row: {(parents[row][node], drafted[row][node]): node for node in range(1, len(drafted[row]))}
            for row in rows
        }
        going = rows
        while going:
            nodes = [paths[row][-1] for row in going]
            own = raw[going, nodes]
            scores = self._process(going, raw, own)
            tokens = self._choose(window, scores, going, nodes)
            self.text.extend(going, [[token] for token in tokens], [[row] for row in scores], [[row] for row in own])
            found = {row: children[row].get((paths[row][-1], token)) for row, token in zip(going, tokens)}
            for row, node in found.items():
                if node is not None:
                    paths[row].append(node)
            going = [row for row in going if self.text.active(row)]
            if any(found[row] is None for row in going):
                break

    def _choose(self, window: DraftWindow, scores: torch.Tensor, rows: list[int], nodes: list[int]) -> list[int]:
        """The next token of each of ``rows`` from its scores (R, V)."""
        if not self.do_sample:
            return scores.argmax(-1).tolist()
        probs = scores.softmax(-1)
        if window.draft_probs is None:
            return sample(probs).tolist()
        return [reject_one(window, own, self.columns, row, node) for own, row, node in zip(probs, rows, nodes)]

    def _process(self, rows: list[int], raw: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Processed scores (R, V) of the tokens after ``rows`` of the text, from their logits ``own`` (R, V).

        Processors may look up the batch index, so all B rows are passed and the others' results are not used.
        """
        scores = raw[:, 0].clone()
        scores[rows] = own
        return self.processors(self.text.prefix(rows), scores.to(self.text.device))[rows].to(raw.device)


def row_wise(processors: LogitsProcessorList) -> bool:
    """Whether every one of ``processors`` treats a row the same whatever the other rows are."""
    return all(_is_stock(processor, _PREFIX_FREE | _ROW_WISE) for processor in processors)


def _settings(warpers: list[LogitsProcessor]) -> str:
    return repr([(type(warper).__name__, sorted(vars(warper).items())) for warper in warpers])


def _is_stock(processor: LogitsProcessor, names: set[str]) -> bool:
    kind = type(processor)
    return kind.__name__ in names and kind.__module__.startswith("transformers.")
