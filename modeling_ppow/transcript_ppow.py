"""What a generation has produced so far: tokens, stopping, streaming, scores, and the acceptance figures."""

from dataclasses import dataclass

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)


@dataclass
class Acceptance:
    """Acceptance figures of one call, per row and verification.

    Attributes:
        drafted: drafted[b][i], longest way through window i of row b (K for a chain).
        accepted: accepted[b][i], drafted tokens of window i that stand in the text (bonus not counted).
        gained: gained[b][i], tokens it added to the text: accepted + 1, less where a stop cut the window.
    """

    drafted: list[list[int]]
    accepted: list[list[int]]
    gained: list[list[int]]

    @property
    def verifications(self) -> int:
        return sum(len(row) for row in self.gained)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens gained per verification, bonus included, pooled over rows; NaN before the first.

        Tokens behind the end of the text do not count, so the last window of a text pulls the mean down a little.
        """
        return sum(map(sum, self.gained)) / self.verifications if self.verifications else float("nan")

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


class Transcript:
    """Tokens of B rows that grow at different speeds, and the rules that end them.

    Args:
        input_ids: (B, P) prompt as ``generate`` hands it on (left padding included).
        stopping_criteria, streamer, generation_config: as in transformers.
        together: whether the rows must gain their tokens side by side because a logits processor looks at all of
            them. Criteria that are not transformers' own and streamers ask for the same.
    """

    def __init__(self, input_ids, stopping_criteria, streamer, generation_config, together: bool = False):
        self.batch, self.prompt_length = input_ids.shape
        self.criteria, self.streamer = stopping_criteria, streamer
        pad = generation_config._pad_token_tensor
        self.pad = None if pad is None else int(pad)  # filler behind rows that ended early
        collect = generation_config.return_dict_in_generate
        self.scores = [[] for _ in range(self.batch)] if collect and generation_config.output_scores else None
        self.logits = [[] for _ in range(self.batch)] if collect and generation_config.output_logits else None
        self.acceptance = Acceptance(*([[] for _ in range(self.batch)] for _ in range(3)))
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
        return not any(self.active(row) for row in range(self.batch))

    def prefix(self, rows: list[int]) -> torch.Tensor:
        """(B, n) ids as a logits processor expects them for ``rows``, which stand at one length n.

        They are exact for these rows and for rows that have ended (which are padded); rows that are elsewhere are cut
        or padded.
        """
        return self.ids[:, : self.lengths[rows[0]]].to(self.device)

    def commit(self, verdict, drafted: int | None) -> list[int]:
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
                scores, logits = ([v and v[row] for row in rows] for v in (verdict.scores, verdict.logits))
                self.extend(rows, [tokens[row][:count] for row in rows], scores, logits)
            counts = [length - start for length, start in zip(self.lengths, before)]
        if drafted is not None:
            for row in [row for row in range(self.batch) if counts[row]]:
                self.acceptance.drafted[row].append(drafted)
                self.acceptance.accepted[row].append(min(accepted[row], counts[row]))
                self.acceptance.gained[row].append(counts[row])
        return counts

    def extend(self, rows: list[int], tokens: list[list[int]], scores, logits) -> None:
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
                if self.scores is not None:
                    self.scores[row].append(scores[k][i])
                if self.logits is not None:
                    self.logits[row].append(logits[k][i])
            if self.streamer is not None:
                self.streamer.put(self.ids[:, start + i].clone())
            for row in self._stopped({row: tokens[k][i] for k, row in now}):
                if self.ended_at[row] is None:
                    self.ended_at[row] = start + i + 1
                    self.horizon = None if None in self.ended_at else max(self.ended_at)
            for row in rows:
                if not self.active(row):  # nothing of what follows its end may be seen
                    self.ids[row, self.lengths[row] : start + count] = self.pad or 0

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
            grown = self.ids.new_full((self.batch, max(needed, 2 * self.ids.shape[1])), self.pad or 0)
            grown[:, : self.ids.shape[1]] = self.ids
            self.ids = grown

    @property
    def length(self) -> int:
        """Columns of :meth:`sequences`."""
        return max(self.lengths) if self.ends_alone else self.horizon

    def sequences(self) -> torch.Tensor:
        """(B, longest) prompt and output, padded on the right behind rows that ended early."""
        ids = self.ids[:, : self.length].clone()
        for row, length in enumerate(self.lengths):
            if length < self.length:
                ids[row, length:] = self.pad
        return ids.to(self.device)

    def stacked(self, rows: list[list[torch.Tensor]] | None, steps: int) -> tuple[torch.Tensor, ...] | None:
        """The scores of the first ``steps`` new tokens of all rows -> one (B, V) tensor per new token.

        Behind the end of a row the padding token is certain: score 0, every other token -inf.
        """
        if rows is None:
            return None
        padding = torch.full_like(rows[0][0], -torch.inf)
        if self.pad is not None:
            padding[self.pad] = 0.0
        steps = (torch.stack([row[i] if i < len(row) else padding for row in rows]) for i in range(steps))
        return tuple(step.to(self.device) for step in steps)
