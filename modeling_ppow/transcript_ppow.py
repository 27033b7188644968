"""What a generation has produced so far, from verdict to verdict: tokens, stopping, streaming, scores, figures."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

Collected = list[list[torch.Tensor]]  # per row, (V,) scores of each token


@dataclass
class Acceptance:
    """Acceptance figures of one call, per row and verification.

    Attributes:
        drafted: drafted[b][i], longest way through window i of row b (K for a chain).
        accepted: accepted[b][i], drafted tokens of window i that stand in the text (bonus not counted).
        gained: gained[b][i], tokens it added to the text: accepted + 1, less where a stop cut the window.
        verified: verified[b][i], drafted tokens that the verification accepted, whether or not the text ended before
            them; None where that was not kept.
    """

    drafted: list[list[int]]
    accepted: list[list[int]]
    gained: list[list[int]]
    verified: list[list[int]] | None = None

    @property
    def verifications(self) -> int:
        """Windows verified, pooled over rows."""
        return sum(len(row) for row in self.gained)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens gained per verification, bonus included, pooled over rows; NaN before the first.

        Tokens after the end of the text do not count, so the last window of a text pulls the mean down a little.
        This is the figure to compare drafters by: it is what a reader gets.
        """
        return sum(map(sum, self.gained)) / self.verifications if self.verifications else float("nan")

    @property
    def engine_acceptance_length(self) -> float:
        """The same as serving engines count: 1 + drafts accepted per verification, those behind the text's end, too.

        What vLLM's metrics give; compare with an engine's own figures by it alone, of texts that end by themselves (no
        window here is longer than the room that ``max_new_tokens`` leaves). NaN before the first verification.
        """
        verified = self.accepted if self.verified is None else self.verified
        return 1 + sum(map(sum, verified)) / self.verifications if self.verifications else float("nan")

    def per_position(self) -> list[float]:
        """Entry j: of the windows that were tried at position j + 1, the share in which its draft was accepted.

        A window is tried there when it is that deep, its first j drafts were accepted, and the text still held the
        place: what a stop cut off was neither accepted nor rejected.
        """
        windows = [window for rows in zip(self.drafted, self.accepted, self.gained) for window in zip(*rows)]
        rates = []
        for j in range(max((drafted for drafted, _, _ in windows), default=0)):
            tried = [accepted for drafted, accepted, gained in windows if drafted > j and accepted >= j and gained > j]
            if not tried:
                break
            rates.append(sum(accepted > j for accepted in tried) / len(tried))
        return rates


@dataclass
class Verdict:
    """Outcome of one verification of B rows.

    Attributes:
        accepted: (B,) drafted tokens accepted.
        path: (B, M) window nodes accepted, root first; entries beyond ``accepted`` are meaningless.
        tokens: (B, M) new tokens; entry i follows path node i, the first ``accepted + 1`` count.
        scores, logits: per row the processed / raw scores (V,) after each new token, when they are collected.
        appended: tokens that the verifier itself has appended to each row of the text; None: that is still to be done.
    """

    accepted: torch.Tensor
    path: torch.Tensor
    tokens: torch.Tensor
    scores: Collected | None = None
    logits: Collected | None = None
    appended: list[int] | None = None
    _table: torch.Tensor | None = None  # (B, 1 + M) accepted and tokens, on their way to the host
    _arrived: torch.cuda.Event | None = None

    def fetch(self) -> None:
        """Start to copy the outcome to the host, behind what the device has been given so far."""
        self._table = torch.cat((self.accepted[:, None], self.tokens), 1).to("cpu", non_blocking=self.accepted.is_cuda)
        if self.accepted.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def fetched(self) -> tuple[list[int], list[list[int]]]:
        """``accepted`` and ``tokens`` on the host, without waiting for anything that was started after ``fetch``."""
        if self._arrived is not None:
            self._arrived.synchronize()
        assert self._table is not None, "fetch() comes first"
        table = self._table.tolist()
        return [row[0] for row in table], [row[1:] for row in table]


class Transcript:
    """Tokens of B rows that grow at different speeds, and the rules that end them.

    Args:
        input_ids: (B, P) prompt as ``generate`` hands it on (left padding included).
        stopping_criteria, streamer, generation_config: as in transformers.
        together: whether the rows must gain their tokens side by side because a logits processor looks at all of
            them. Criteria that are not transformers' own and streamers ask for the same.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        generation_config: GenerationConfig,
        together: bool,
    ):
        self.batch, self.prompt_length = input_ids.shape
        self.criteria, self.streamer = stopping_criteria, streamer
        pad = generation_config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad)  # filler after rows that ended early; without it none does
        collect = generation_config.return_dict_in_generate
        self.scores: Collected | None = self._lists() if collect and generation_config.output_scores else None
        self.logits: Collected | None = self._lists() if collect and generation_config.output_logits else None
        self.acceptance = Acceptance(self._lists(), self._lists(), self._lists(), self._lists())
        self.device = input_ids.device
        self.ids = input_ids.to("cpu", torch.long)  # written token by token, so kept by the host
        self.lengths = [self.prompt_length] * self.batch
        self.ended_at: list[int | None] = [None] * self.batch  # length at which a criterion stopped the row
        self.horizon: int | None = None  # what every row must reach when rows do not end alone
        self.max_length = stopping_criteria.max_length
        eos = [c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        self.eos_ids = {int(token) for ids in eos for token in ids}
        # With an EOS token transformers pads a stopped row; without one it lets the row run on until all have stopped.
        self.ends_alone = bool(self.eos_ids) or self.batch == 1
        self.max_times = [c for c in stopping_criteria if isinstance(c, MaxTimeCriteria)]
        quick = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
        self.needs_every_prefix = any(type(c) not in quick for c in stopping_criteria)
        foreign = any(type(c) not in (*quick, StopStringCriteria) for c in stopping_criteria)
        self.together = self.batch > 1 and (together or foreign or streamer is not None)

    def _lists(self) -> list[list]:
        return [[] for _ in range(self.batch)]

    def remaining(self) -> int:
        """Tokens that the row with the most room may still get; a large number without a length limit."""
        if self.max_length is None:
            return 1 << 30
        return max((self.max_length - self.lengths[row] for row in range(self.batch) if self.active(row)), default=0)

    def growing(self) -> list[bool]:
        """:meth:`active` of every row."""
        return [self.active(row) for row in range(self.batch)]

    def groups(self) -> list[list[int]]:
        """The rows that still grow; those that gain their tokens side by side form one group."""
        rows = [row for row in range(self.batch) if self.active(row)]
        return [rows] if self.together and rows else [[row] for row in rows]

    def active(self, row: int) -> bool:
        """Whether the row still grows."""
        if self.ended_at[row] is None:
            return True
        if self.ends_alone:
            return False
        horizon = self.max_length if self.horizon is None else self.horizon
        return horizon is None or self.lengths[row] < horizon

    @property
    def finished(self) -> bool:
        """Whether no row grows any more."""
        return not any(self.growing())

    def prefix(self, rows: list[int]) -> torch.Tensor:
        """(B, n) ids as a logits processor expects them for ``rows``, which stand at one length n.

        They are exact for these rows and for rows that have ended (which are padded); rows that are elsewhere are cut
        or padded.
        """
        return self.ids[:, : self.lengths[rows[0]]].to(self.device)

    def commit(self, verdict: Verdict, drafted: int | None) -> list[int]:
        """Append what a verification yielded to every row that still grows, unless the verifier has done so.

        Args:
            verdict: a fetched :class:`Verdict`.
            drafted: depth of the window, or None for the prompt's own token, which is no verification.

        Returns:
            Tokens appended per row: accepted + 1, less where a stop cut the window or where rows that go side by side
            had to wait for another, 0 for ended rows.
        """
        accepted, tokens = verdict.fetched()
        counts = verdict.appended
        if counts is None:
            before = list(self.lengths)
            for rows in self.groups():
                count = 1 + min(accepted[row] for row in rows)
                scores, logits = (v and [v[row] for row in rows] for v in (verdict.scores, verdict.logits))
                self.extend(rows, [tokens[row][:count] for row in rows], scores, logits)
            counts = [length - start for length, start in zip(self.lengths, before)]
        if drafted is not None:
            assert self.acceptance.verified is not None
            for row in [row for row in range(self.batch) if counts[row]]:
                self.acceptance.drafted[row].append(drafted)
                self.acceptance.accepted[row].append(min(accepted[row], counts[row]))
                self.acceptance.gained[row].append(counts[row])
                self.acceptance.verified[row].append(accepted[row])
        return counts

    def extend(
        self, rows: list[int], tokens: list[list[int]], scores: Collected | None, logits: Collected | None
    ) -> None:
        """Append tokens to ``rows``, one after the other, until something stops them.

        Args:
            rows: a group of :meth:`groups`; they stand at one length.
            tokens: for each of them equally many tokens.
            scores, logits: for each of them what is to be collected, (V,) per token; not looked at when it is not.
        """
        start, count = self.lengths[rows[0]], len(tokens[0])
        self._reserve(start + count)
        for row, new in zip(rows, tokens):
            self.ids[row, start : start + count] = torch.tensor(new)
        for i in range(count):
            now = [(k, row) for k, row in enumerate(rows) if self.active(row)]
            if not now:
                break
            for k, row in now:
                self.lengths[row] = start + i + 1
                if self.scores is not None and scores is not None:
                    self.scores[row].append(scores[k][i])
                if self.logits is not None and logits is not None:
                    self.logits[row].append(logits[k][i])
            if self.streamer is not None:
                self.streamer.put(self.ids[:, start + i].clone())
            for row in self._stopped({row: tokens[k][i] for k, row in now}):
                if self.ended_at[row] is None:
                    self.ended_at[row] = start + i + 1
                    ends = [end for end in self.ended_at if end is not None]
                    self.horizon = max(ends) if len(ends) == self.batch else None
            for row in rows:
                if not self.active(row):  # nothing of what follows its end may be seen
                    self.ids[row, self.lengths[row] : start + count] = self.pad

    def _stopped(self, newest: dict[int, int]) -> list[int]:
        """The rows that a criterion stops; ``newest`` token of each row of a group that still grows."""
        rows = list(newest)
        length = self.lengths[rows[0]]
        if self.needs_every_prefix:
            if self.together:
                done = self.criteria(self.prefix(rows), self.stacked(self.scores, length - self.prompt_length))
                return [row for row in rows if done[row]]
            scores = None if self.scores is None else tuple(s[None] for s in self.scores[rows[0]])
            return rows if bool(self.criteria(self.prefix(rows)[rows], scores).all()) else []
        if self.max_length is not None and length >= self.max_length:
            return rows
        if any(bool(c(self.ids, None).all()) for c in self.max_times):
            return rows
        return [row for row in rows if newest[row] in self.eos_ids]

    def _reserve(self, needed: int) -> None:
        if needed > self.ids.shape[1]:
            grown = self.ids.new_full((self.batch, max(needed, 2 * self.ids.shape[1])), self.pad)
            grown[:, : self.ids.shape[1]] = self.ids
            self.ids = grown

    @property
    def length(self) -> int:
        """Columns of :meth:`sequences`."""
        return max(self.lengths) if self.ends_alone or self.horizon is None else self.horizon

    def sequences(self) -> torch.Tensor:
        """(B, longest) prompt and output, padded on the right after rows that ended early."""
        ids = self.ids[:, : self.length].clone()
        for row, length in enumerate(self.lengths):
            if length < self.length:
                ids[row, length:] = self.pad
        return ids.to(self.device)

    def stacked(self, rows: Collected | None, steps: int) -> tuple[torch.Tensor, ...] | None:
        """The scores of the first ``steps`` new tokens of all rows -> one (B, V) tensor per new token.

        Behind the end of a row the padding token is certain: score 0, every other token -inf.
        """
        if rows is None:
            return None
        padding = torch.full_like(rows[0][0], -torch.inf)
        padding[self.pad] = 0.0
        found = (torch.stack([row[i] if i < len(row) else padding for row in rows]) for i in range(steps))
        return tuple(step.to(self.device) for step in found)
