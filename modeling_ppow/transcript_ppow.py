"""What a generation has produced so far: tokens, stopping, streaming, scores, and the acceptance figures."""

from dataclasses import dataclass, field

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria


@dataclass
class Acceptance:
    """Acceptance figures of one call, per row and verification.

    Attributes:
        drafted: drafted[b][i], longest way through window i of row b (K for a chain).
        accepted: accepted[b][i], drafted tokens the verification accepted (bonus not counted).
        gained: gained[b][i], tokens it added to the text: accepted + 1, less where a stop cut the window.
    """

    drafted: list[list[int]] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)
    gained: list[list[int]] = field(default_factory=list)

    @property
    def verifications(self) -> int:
        return sum(len(row) for row in self.gained)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens gained per verification, bonus included, pooled over rows; NaN before the first."""
        return sum(map(sum, self.gained)) / self.verifications if self.verifications else float("nan")

    def per_position(self) -> list[float]:
        """Entry j: among windows at least j + 1 deep whose first j tokens were accepted, how often token j + 1 was."""
        pairs = [pair for rows in zip(self.drafted, self.accepted) for pair in zip(*rows)]
        rates = []
        for j in range(max((drafted for drafted, _ in pairs), default=0)):
            tried = [accepted for drafted, accepted in pairs if drafted > j and accepted >= j]
            if not tried:
                break
            rates.append(sum(accepted > j for accepted in tried) / len(tried))
        return rates


class Transcript:
    """Tokens of B rows that grow at different speeds, and the rules that end them.

    Args:
        input_ids: (B, P) prompt as ``generate`` hands it on (left padding included).
        stopping_criteria, streamer, generation_config: as in transformers.
    """

    def __init__(self, input_ids, stopping_criteria, streamer, generation_config):
        self.batch, self.prompt_length = input_ids.shape
        self.criteria, self.streamer = stopping_criteria, streamer
        pad = generation_config._pad_token_tensor
        self.pad = None if pad is None else int(pad)  # filler behind rows that ended early
        collect = generation_config.return_dict_in_generate
        self.scores = [[] for _ in range(self.batch)] if collect and generation_config.output_scores else None
        self.logits = [[] for _ in range(self.batch)] if collect and generation_config.output_logits else None
        self.acceptance = Acceptance(*([[] for _ in range(self.batch)] for _ in range(3)))
        self.device, self.ids = input_ids.device, input_ids.cpu()  # written token by token, so kept by the host
        self.lengths = [self.prompt_length] * self.batch
        self.ended_at: list[int | None] = [None] * self.batch  # length at which a criterion stopped the row
        self.max_length = stopping_criteria.max_length
        eos = [c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        self.eos_ids = {int(token) for ids in eos for token in ids}
        # With an EOS token transformers pads a stopped row; without one it lets the row run on until all have stopped.
        self.ends_alone = bool(self.eos_ids) or self.batch == 1
        self.max_times = [c for c in stopping_criteria if isinstance(c, MaxTimeCriteria)]
        known = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
        self.needs_every_prefix = any(type(c) not in known for c in stopping_criteria)

    def remaining(self) -> int:
        """Tokens that the row with the most room may still get; a large number without a length limit."""
        if self.max_length is None:
            return 1 << 30
        return max((self.max_length - self.lengths[row] for row in range(self.batch) if self.active(row)), default=0)

    def growing(self) -> list[bool]:
        """:meth:`active` of every row."""
        return [self.active(row) for row in range(self.batch)]

    @property
    def gained(self) -> int:
        """Tokens of the first row behind its prompt, less the newest, which no cache holds yet."""
        return self.lengths[0] - self.prompt_length - 1

    @property
    def horizon(self) -> int | None:
        """The length every row must reach when rows do not end alone; None while one has not met its criterion."""
        return None if None in self.ended_at else max(self.ended_at)

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

    def prefix(self, row: int, extra: list[int]) -> torch.Tensor:
        """(B, n) ids as a logits processor expects them for ``row`` plus ``extra`` tokens: the row itself is exact,
        the others are cut or padded to its length."""
        length = self.lengths[row]
        ids = self.ids[:, :length]
        if extra:
            tail = torch.tensor(extra, dtype=ids.dtype, device=ids.device).expand(self.batch, -1)
            ids = torch.cat((ids, tail), 1)
        return ids.to(self.device)

    def commit(self, verdict, drafted: int | None) -> list[int]:
        """Append what a verification yielded to every row that still grows.

        Args:
            verdict: a fetched :class:`Verdict`.
            drafted: depth of the window, or None for the prompt's own token, which is no verification.

        Returns:
            Tokens appended per row: accepted + 1, less where a stop cut the window, 0 for ended rows.
        """
        accepted, tokens = verdict.fetched()
        counts = [0] * self.batch
        for row in [row for row in range(self.batch) if self.active(row)]:
            counts[row] = self._append(row, tokens[row][: accepted[row] + 1], verdict)
            if drafted is not None:
                self.acceptance.drafted[row].append(drafted)
                self.acceptance.accepted[row].append(accepted[row])
                self.acceptance.gained[row].append(counts[row])
        return counts

    def _append(self, row: int, tokens: list[int], verdict) -> int:
        """Append tokens to a row until something stops it; -> how many were appended."""
        start = self.lengths[row]
        if self.max_length is not None:
            tokens = tokens[: self.max_length - start]
        count = len(tokens)
        self._reserve(start + count)
        self.ids[row, start : start + count] = torch.tensor(tokens, dtype=torch.long)
        for i, token in enumerate(tokens):
            if self.scores is not None:
                self.scores[row].append(verdict.scores[row][i])
            if self.logits is not None:
                self.logits[row].append(verdict.logits[row][i])
            if self.ended_at[row] is None and self._stops(row, start + i + 1, token):
                self.ended_at[row] = start + i + 1
                if self.ends_alone:
                    count = i + 1
                    break
        self.lengths[row] = start + count
        if self.streamer is not None:
            self.streamer.put(self.ids[row, start : start + count])
        return count

    def _stops(self, row: int, length: int, token: int) -> bool:
        if self.needs_every_prefix:
            scores = None if self.scores is None else tuple(s[None] for s in self.scores[row])
            return bool(self.criteria(self.ids[row : row + 1, :length].to(self.device), scores).all())
        at_end = self.max_length is not None and length >= self.max_length
        return at_end or token in self.eos_ids or any(c(self.ids[row : row + 1], None).all() for c in self.max_times)

    def _reserve(self, needed: int) -> None:
        if needed > self.ids.shape[1]:
            grown = self.ids.new_full((self.batch, max(needed, 2 * self.ids.shape[1])), self.pad or 0)
            grown[:, : self.ids.shape[1]] = self.ids
            self.ids = grown

    def sequences(self) -> torch.Tensor:
        """(B, longest) prompt and output, padded on the right behind rows that ended early."""
        longest = max(self.lengths) if self.ends_alone else self.horizon
        ids = self.ids[:, :longest].clone()
        for row, length in enumerate(self.lengths):
            if length < longest:
                ids[row, length:] = self.pad
        return ids.to(self.device)

    def stacked(self, rows: list[list[torch.Tensor]] | None) -> tuple[torch.Tensor, ...] | None:
        """Per-token scores of all rows -> one (B, V) tensor per new token.

        Behind the end of a row the padding token is certain: score 0, every other token -inf.
        """
        if rows is None:
            return None
        padding = torch.full_like(rows[0][0], -torch.inf)
        if self.pad is not None:
            padding[self.pad] = 0.0
        steps = self.sequences().shape[1] - self.prompt_length
        return tuple(torch.stack([row[i] if i < len(row) else padding for row in rows]) for i in range(steps))
