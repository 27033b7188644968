"""Answers of a target in batches that never wait: a row whose answer ends is given the next prompt.

Continuous batching as in Orca (Yu et al., OSDI 2022), over the decoding loop's own fast path: keys and values lie in
slots, row by row, with lengths of their own on the device, so that one recorded graph makes the next token of every row
(:class:`ppow.graphs_ppow.GraphTarget`). transformers' own, ``generate_batch``, brings little for small targets: its
scheduler, in Python, visits every request at every token (benchmarks/answers.py compares).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ppow.cache_ppow import CACHE_NAME, SlotCache
from ppow.drafting_ppow import DraftWindow
from ppow.graphs_ppow import GraphTarget, target_twin
from ppow.obstacles_ppow import attention_obstacle, free_bytes, key_heads, slot_bytes, target_obstacle
from ppow.probe_ppow import check_target
from ppow.recording_ppow import GATE, Replay
from ppow.target_ppow import check_kind, decoder_layers

from .loading import positions

CHECK = 16  # tokens made of every row before any is read back
PREFILL = 8_192  # tokens of prompts that one forward reads
CACHE_SHARE = 0.6  # of the free memory of a GPU that keys and values may take
MOST_PAIRS = 65_535  # of a row and a key head: the attention kernel's grid holds no more
# What a generation config may say and stock greedy or plain sampled text does not depend on.
_PLAIN = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "max_length"}
_PLAIN |= {"max_new_tokens", "transformers_version", "_from_model_config", "use_cache", "cache_implementation"}


class Request(NamedTuple):
    """A prompt.

    Attributes:
        key: the caller's name for it.
        ids: its tokens, at least one.
        room: tokens that its answer may have.
        seed: what is drawn follows from it, whatever the other rows are.
        greedy: draw nothing, take the most probable tokens.
    """

    key: int
    ids: list[int]
    room: int
    seed: int
    greedy: bool = False


def obstacle(target: PreTrainedModel) -> str | None:
    """Why a target's answers cannot be made in slots; None if they can."""
    said = {name for name, value in target.generation_config.to_diff_dict().items() if not _says_nothing(value)}
    if said := said - _PLAIN:
        return f"its generation config asks for {', '.join(sorted(said))}"
    if len({parameter.device for parameter in target.parameters()}) > 1:
        return "it is spread over devices"
    try:
        check_kind(target)
        reason = target_obstacle(target)
        if reason is None:
            check_target(target, end=positions(target.config) or 1)
    except ValueError as error:
        return str(error)
    return reason or attention_obstacle(target)


def rows_that_fit(target: PreTrainedModel, most: int, capacity: int) -> int:
    """How many rows of ``capacity`` tokens, of ``most``, memory and the attention kernel allow; at least 1."""
    rows = min(most, MOST_PAIRS // key_heads(target))
    if target.device.type != "cuda":
        return rows
    each = slot_bytes(target)
    room = CACHE_SHARE * free_bytes(target.device) - 2 * each * max(PREFILL, capacity)
    return max(1, min(rows, int(room) // (each * (capacity + CHECK))))


def _says_nothing(value: object) -> bool:
    """Whether a field of a generation config is off: penalties and counts of beams are at 1."""
    return value is None or value is False or (value is not True and value == 1)


class Slots:
    """Rows that answer prompts, each for itself.

    Args:
        target: without an :func:`obstacle`, in eval mode, for this object alone.
        rows: answers under way at most, B.
        capacity: tokens of the longest prompt and its answer together.
        temperature: 0: every request is greedy; else tokens are drawn from the target's distribution at it.
        ends: tokens that end an answer.
    """

    def __init__(self, target: PreTrainedModel, rows: int, capacity: int, temperature: float, ends: set[int]):
        self.target, self.capacity, self.temperature, self.ends = target, capacity, temperature, ends
        buffered = capacity + CHECK  # a row may run on until it is looked at
        cache = SlotCache(len(decoder_layers(target)), buffered)
        with GATE.exclusive():  # weights are laid side by side
            twin = target_twin(target)
        self.state = GraphTarget(target, [0], cache, rows, Replay(), buffered, twin)
        nothing = torch.zeros_like(self.state.lengths)
        self.state.next_position, self.state.last_position = nothing, nothing
        self.roots, self.active = nothing, nothing  # (B,) the newest token; 1 where there is a request
        self.greedy = torch.zeros(rows, dtype=torch.bool, device=target.device)  # (B,)
        self.chances = torch.zeros(rows, capacity + CHECK, device=target.device)  # (B, room) uniform, what is drawn by
        self.requests: list[Request | None] = [None] * rows
        self.written: list[list[int]] = [[] for _ in range(rows)]
        self._step()  # allocates

    @property
    def free(self) -> int:
        """Rows without a request."""
        return self.requests.count(None)

    def fill(self, requests: Sequence[Request]) -> None:
        """Give at most :attr:`free` prompts a row each.

        Raises:
            ValueError: too many, or one that does not fit with its answer.
        """
        rows = [row for row, request in enumerate(self.requests) if request is None]
        long = max((len(request.ids) + request.room for request in requests), default=0)
        if len(requests) > len(rows) or long > self.capacity:
            raise ValueError(
                f"{len(requests)} prompts for {len(rows)} free rows, the longest of {long} tokens with its answer; the "
                f"rows hold {self.capacity}."
            )
        order = sorted(requests, key=lambda request: len(request.ids))  # alike lengths waste little padding
        while order:
            count = max(1, min(len(order), PREFILL // len(order[-1].ids)))
            part, order = order[-count:], order[:-count]
            self._prefill(rows[:count], part)
            rows = rows[count:]

    @torch.no_grad()
    def _prefill(self, rows: list[int], requests: list[Request]) -> None:
        """Read all of some prompts but their last tokens, which come next."""
        device, state = self.target.device, self.state
        before = [len(request.ids) - 1 for request in requests]
        longest = max(before)
        index = torch.tensor(rows, device=device)
        if longest:
            ids = torch.zeros(len(rows), longest, dtype=torch.long)  # what stands after a prompt is not seen by it
            for line, request in zip(ids, requests):
                line[: len(request.ids) - 1] = torch.tensor(request.ids[:-1])
            cache = SlotCache(len(state.cache.layers), longest)
            keep = {"logits_to_keep": 1} if self.target._supports_logits_to_keep() else {}
            places = torch.arange(longest, device=device).expand(len(rows), -1)
            self.target(input_ids=ids.to(device), position_ids=places, use_cache=True, **{CACHE_NAME: cache}, **keep)
            for ours, theirs in zip(state.cache.layers, cache.layers):
                ours.keys[index, :, :longest] = theirs.keys[:, :, :longest]
                ours.values[index, :, :longest] = theirs.values[:, :, :longest]

        def put(where: torch.Tensor, values: list[int]) -> torch.Tensor:
            return where.index_copy(0, index, torch.tensor(values, device=device))

        state.lengths = put(state.lengths, before)
        state.next_position = put(state.next_position, before)
        last = [place + request.room - 1 for place, request in zip(before, requests)]
        state.last_position = put(state.last_position, last)
        self.roots = put(self.roots, [request.ids[-1] for request in requests])
        self.active = put(self.active, [1] * len(rows))
        self.greedy = put(self.greedy, [request.greedy for request in requests])
        for row, request in zip(rows, requests):
            self.requests[row], self.written[row] = request, []
            if self.temperature:
                chances = torch.rand(request.room, generator=torch.Generator().manual_seed(request.seed))
                self.chances[row, -request.room :] = chances.to(device)

    def collect(self) -> list[tuple[int, list[int]]]:
        """Go on until an answer ends: -> (key, its tokens, the end among them) of those that have."""
        done: list[tuple[int, list[int]]] = []
        while not done and self.free < len(self.requests):
            made = torch.stack([self._step() for _ in range(CHECK)], 1).tolist()
            ended = []
            for row, request in enumerate(self.requests):
                if request is None:
                    continue
                for token in made[row]:
                    self.written[row].append(token)
                    if token in self.ends or len(self.written[row]) == request.room:
                        done.append((request.key, self.written[row]))
                        self.requests[row] = None
                        ended.append(row)
                        break
            if ended:
                index = torch.tensor(ended, device=self.active.device)
                self.active = self.active.index_fill(0, index, 0)
        return done

    @torch.no_grad()
    def _step(self) -> torch.Tensor:
        """The next token (B,) of every row; those without a request stay where they are."""
        window = DraftWindow.chain(self.roots[:, None])
        logits = self.state.verify(window)[0][:, 0]
        self.roots = logits.argmax(-1)
        if self.temperature:
            left = (self.state.last_position - self.state.next_position).clamp(min=0)  # tokens after this one
            chance = self.chances.gather(1, (self.chances.shape[1] - 1 - left)[:, None])
            summed = (logits.float() / self.temperature).softmax(-1).cumsum(-1)
            drawn = torch.searchsorted(summed, chance * summed[:, -1:], right=True)[:, 0]
            self.roots = torch.where(self.greedy, self.roots, drawn.clamp(max=logits.shape[1] - 1))
        self.state.keep(window.tokens, self.active, in_order=True)
        return self.roots
