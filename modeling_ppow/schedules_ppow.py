"""How long the next window is: rules that choose it from what was accepted so far and from what time it takes.

* ``constant``: every window has ``window_size`` drafts, or ends early by ``draft_threshold``.
* ``heuristic``: transformers' rule: 2 more after a window that was accepted whole, else 1 less.
* ``gammatune``: :class:`GammaTune`; with ``draft_threshold`` it is GammaTune+.
* ``cost``: :class:`CostAware` on the plain path, which decides draft by draft, :class:`CostAhead` on the fast path,
  which chooses before it drafts. Both weigh tokens against measured time as the Cost-Aware Speedup Reward does (tokens
  gained per unit of time), with the running average of tokens per second as the price of time.

Every rule has ``window_size`` as its upper bound.

None of them changes the output. At temperature 0 any window is exact (:func:`acceptance_ppow.follow`). When sampling,
rejection sampling is exact for a chain of any length K as long as "is there a further draft?" is answered before that
draft is drawn, from what is known then: the text, the drafts drawn before it, which all stay in the window, their
distributions, and the drafter's next distribution q. Then, given that the question was answered with yes, the draft's
distribution is q, which is what its coin assumes; given no, the token is the target's own draw. (To look at a draft and
then leave it out would change the output: a token would be drawn anew because of its value.) Outcomes of verifications
enter once they are part of the text. Clocks enter through costs alone, which depend on the past.

A consequence: under ``cost`` the windows, and with them the order in which random numbers are used, follow measured
time, so that a seed need not bring the same sampled tokens again. "auto" is therefore ``gammatune`` where tokens are
sampled.
"""

import itertools
import math
import operator
import statistics
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

SCHEDULES = "auto", "constant", "heuristic", "gammatune", "cost"
USUAL_RATE = 0.7  # of drafts accepted, given those before them, until a text shows its own
GRAPH_STEP = 2  # the fast path records windows of 2, 4, 6, .. drafts and of `window_size`


class Schedule:
    """Windows of the largest size; the others derive from it.

    Args:
        size: the upper bound, in drafts.
        step: lengths chosen before drafting are rounded up to a multiple of this, or to ``size``.

    Attributes:
        watches: whether :meth:`takes` and :meth:`goes_on` want to be asked while a chain is drafted.
    """

    watches = False

    def __init__(self, size: int, step: int = 1):
        self.size, self.step = size, step

    def begin(self, rows: list[int], room: int) -> int:
        """Before a window is drafted: -> the most drafts it may have.

        Args:
            rows: of the batch, those that still grow.
            room: drafts that fit into the text.
        """
        return min(self.rounded(self.length()), room)

    def length(self) -> int:
        """The most drafts that the next window should have."""
        return self.size

    def rounded(self, length: int) -> int:
        """The shortest recorded length of at least ``length`` drafts."""
        return min(-(-length // self.step) * self.step, self.size)

    def takes(self, confidence: list[float]) -> bool:
        """Whether a draft joins the window, before it is drawn; confidence of the drafter for each row of the batch."""
        return True

    def goes_on(self) -> bool:
        """Whether one more draft step is computed."""
        return True

    def drafted(self) -> None:
        """The window is drafted, and is verified next."""

    def learn(self, drafted: int, accepted: list[int], gained: list[int]) -> None:
        """What became of the oldest window that was not learned from; it may not be the newest one.

        Args:
            drafted: its drafts.
            accepted: how many of them stand, per row of the batch.
            gained: tokens it added to each row: accepted + 1, less where a stop cut it, 0 for rows that had ended.
        """


class Heuristic(Schedule):
    """transformers' "heuristic", anew in each call: start from ``size``, +2 after an accepted window, else -1."""

    def __init__(self, size: int, step: int = 1):
        super().__init__(size, step)
        self.now = size

    def length(self) -> int:
        """See :class:`Schedule`."""
        return self.now

    def learn(self, drafted: int, accepted: list[int], gained: list[int]) -> None:
        """See :class:`Schedule`."""
        least = min((k for k, count in zip(accepted, gained) if count), default=drafted)
        self.now = min(self.now + 2, self.size) if least == drafted else max(self.now - 1, 1)


class GammaTune(Schedule):
    """GammaTune (arXiv 2504.00030): jump up after a window that was accepted whole, else follow a smoothed mean.

    With A accepted of gamma drafts: if A = gamma, gamma <- gamma + 2, at most ``size``; else g <- 0.7 g + 0.3 A and
    gamma <- ceil(g), at least 1. It starts at 3. Of a batch, A is the mean over the rows that grow. A window that ended
    before gamma (by ``draft_threshold`` in GammaTune+, or where the text ends) and was accepted whole says nothing of
    longer ones, and leaves gamma as it is (ours).
    """

    START, SMOOTHING, JUMP = 3, 0.3, 2

    def __init__(self, size: int, step: int = 1):
        super().__init__(size, step)
        self.mean = float(min(self.START, size))
        self.asked: deque[int] = deque()  # gamma of the windows that are under way

    def begin(self, rows: list[int], room: int) -> int:
        """See :class:`Schedule`."""
        self.asked.append(super().begin(rows, room))
        return self.asked[-1]

    def length(self) -> int:
        """See :class:`Schedule`."""
        return max(1, math.ceil(self.mean))

    def learn(self, drafted: int, accepted: list[int], gained: list[int]) -> None:
        """See :class:`Schedule`."""
        asked = self.asked.popleft()
        mean = statistics.fmean([k for k, count in zip(accepted, gained) if count] or [drafted])
        if mean < drafted:
            self.mean = (1 - self.SMOOTHING) * self.mean + self.SMOOTHING * mean
        elif drafted == asked:
            self.mean = float(min(asked + self.JUMP, self.size))


# -- what is known of time and of acceptance ---------------------------------------------------------------------------


class Costs:
    """Seconds that the parts of a cycle take on this device for this pair, measured while texts are decoded.

    A part's cost is the median of its newest ``KEPT`` measurements. It moves only when that median has left it by more
    than ``STEADY``, so that noise alone changes no window. The first measurement of a verification of n nodes is left
    out: libraries choose their ways of multiplying then. Until ``ENOUGH`` others are there, the size counts as unknown.
    Where the cost of a size moves, the machine has become slower or faster, and those of the others move with it. A
    size counts as no cheaper than smaller ones: where it was measured so, all of them get their mean, weighted by
    measurements (isotonic regression by pooling adjacent violators, Ayer et al., 1955). Sizes are measured at different
    moments, and what others do on a machine meanwhile would otherwise end windows early for good.
    """

    KEPT, STEADY, ENOUGH = 21, 0.1, 3

    def __init__(self) -> None:
        self.seconds: dict[Hashable, float] = {}  # in use
        self._measured: dict[Hashable, deque[float]] = {}
        self._lock = threading.Lock()
        self._met: set[int] = set()
        self.windows, self.newest = 0, dict[int, int]()  # verifications measured; of each size, which was its newest
        self._table: list[tuple[int, float]] = []  # known verifications: nodes, ascending, and seconds

    def add(self, part: Hashable, seconds: float) -> None:
        """Take in a measurement of "rest", "first", "step" (of drafting), or of a verification by its nodes."""
        with self._lock:  # several threads may decode with one pair
            self._add(part, seconds)

    def _add(self, part: Hashable, seconds: float) -> None:
        if isinstance(part, int):
            self.windows += 1
            self.newest[part] = self.windows
            if part not in self._met:
                self._met.add(part)
                return
        measured = self._measured.setdefault(part, deque(maxlen=self.KEPT))
        measured.append(seconds)
        median, now = statistics.median(measured), self.seconds.get(part)
        if now is None or len(measured) <= self.ENOUGH or abs(median - now) > self.STEADY * now:
            self.seconds[part] = median
            if isinstance(part, int) and now is not None and len(measured) > self.ENOUGH:
                self._drift(part, median / now)
            known = sorted((n, cost) for n, cost in self.seconds.items() if isinstance(n, int) and self.enough(n))
            weights = [len(self._measured[n]) for n, _ in known]
            self._table = list(zip([n for n, _ in known], rising([cost for _, cost in known], weights)))

    def _drift(self, part: int, factor: float) -> None:
        """All sizes but ``part`` take ``factor`` as long as they did."""
        for other, measured in self._measured.items():
            if isinstance(other, int) and other != part:
                self._measured[other] = deque((factor * seconds for seconds in measured), maxlen=self.KEPT)
                if other in self.seconds:
                    self.seconds[other] *= factor

    def enough(self, nodes: int) -> bool:
        """Whether verifications of so many nodes were measured a few times."""
        return len(self._measured.get(nodes, ())) >= self.ENOUGH

    def known(self) -> list[int]:
        """The sizes, in nodes, of which that holds."""
        return [nodes for nodes, _ in self._table]

    def verification(self, nodes: int) -> float:
        """Seconds of a verification: between the measured sizes on a straight line, beyond them on the mean slope."""
        table = self._table
        if not table:
            return 0.0
        if nodes <= table[0][0]:
            return table[0][1]
        for (left, low), (right, high) in zip(table, table[1:]):
            if nodes <= right:
                return low + (high - low) * (nodes - left) / (right - left)
        (left, low), (right, high) = table[0], table[-1]
        return high if left == right else high + (high - low) * (nodes - right) / (right - left)

    def drafting(self, steps: int) -> float:
        """Seconds of drafting ``steps`` tokens one after the other; the first needs no pass through the layers."""
        return self.seconds.get("first", 0.0) + max(steps - 1, 0) * self.seconds.get("step", 0.0) if steps else 0.0

    def cycle(self, steps: int, drafts: int) -> float:
        """Seconds of a cycle with so many draft steps, of which ``drafts`` are verified."""
        return self.seconds.get("rest", 0.0) + self.drafting(steps) + self.verification(drafts + 1)


def rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest values (weighted squares) none of which is below the one before it."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, entries
    for value, weight in zip(values, weights):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (low, first, count), (high, second, more) = pools[-2:]
            pools[-2:] = [((low * first + high * second) / (first + second), first + second, count + more)]
    return [mean for mean, _, count in pools for _ in range(count)]


class Confidence:
    """How often a draft is accepted, given those before it, by the drafter's confidence in it.

    Ten equal intervals of confidence, each of which starts from the confidence itself, with the weight of ``PRIOR``
    drafts, and forgets what was seen by 1% a window.
    """

    INTERVALS, PRIOR, KEPT = 10, 4.0, 0.99

    def __init__(self) -> None:
        self.tried, self.accepted = [0.0] * self.INTERVALS, [0.0] * self.INTERVALS

    def rate(self, confidence: float) -> float:
        """Estimated probability that a draft of this confidence is accepted."""
        i = self._interval(confidence)
        return (self.PRIOR * confidence + self.accepted[i]) / (self.PRIOR + self.tried[i])

    def learn(self, confidence: float, accepted: bool) -> None:
        """A draft was verified, those before it being accepted."""
        i = self._interval(confidence)
        self.tried[i] += 1
        self.accepted[i] += accepted

    def forget(self) -> None:
        """A window has passed."""
        for counts in (self.tried, self.accepted):
            counts[:] = [self.KEPT * count for count in counts]

    def _interval(self, confidence: float) -> int:
        return min(int(confidence * self.INTERVALS), self.INTERVALS - 1)


class Positions:
    """How often a draft is accepted, given those before it, by its position in the window.

    Each position starts from the estimate of the one before it (the first from ``USUAL_RATE``), with the weight of
    ``PRIOR`` drafts, and forgets what was seen by 3% a window.
    """

    PRIOR, KEPT = 4.0, 0.97

    def __init__(self, size: int):
        self.tried, self.accepted = [0.0] * size, [0.0] * size

    def rates(self) -> list[float]:
        """One probability per position."""
        found, rate = [], USUAL_RATE
        for tried, accepted in zip(self.tried, self.accepted):
            rate = (self.PRIOR * rate + accepted) / (self.PRIOR + tried)
            found.append(rate)
        return found

    def learn(self, drafted: int, accepted: list[int], gained: list[int]) -> None:
        """As :meth:`Schedule.learn`; what a stop cut off was neither accepted nor rejected."""
        for counts in (self.tried, self.accepted):
            counts[:] = [self.KEPT * count for count in counts]
        for k, count in zip(accepted, gained):
            for j in range(min(drafted, k + 1, count)):
                self.tried[j] += 1
                self.accepted[j] += k > j


class Rate:
    """Tokens per second of a text, by the costs of its windows; the newest some 20 count."""

    KEPT = 0.95

    def __init__(self) -> None:
        self.tokens = self.seconds = 0.0

    def learn(self, tokens: float, seconds: float) -> None:
        """A window brought so many tokens per row in so much time."""
        self.tokens, self.seconds = self.KEPT * self.tokens + tokens, self.KEPT * self.seconds + seconds

    def now(self) -> float:
        """Tokens per second; 0 before anything is known."""
        return self.tokens / self.seconds if self.seconds else 0.0


def pays(chances: Sequence[float], seconds: Sequence[float], rate: float) -> bool:
    """Whether some number of further drafts gains more tokens than the time would bring at the running average.

    To go on while it does maximises tokens per second in the long run, if ``rate`` is what the rule itself attains.

    Args:
        chances: entry m: probability that the m-th of the further drafts is accepted (with all before it).
        seconds: entry m: what the window takes longer with m + 1 further drafts.
        rate: tokens per second.
    """
    return any(gain > rate * time for gain, time in zip(itertools.accumulate(chances), seconds))


def expected_tokens(rates: Sequence[float]) -> list[float]:
    """Entry k: tokens that a window of k drafts gains; ``rates``: entry j: draft j + 1 accepted, given those before."""
    return list(itertools.accumulate(itertools.accumulate(rates, operator.mul), initial=1.0))


def best_length(rates: Sequence[float], seconds: dict[int, float]) -> int:
    """The length with the most tokens per second.

    Args:
        rates: as of :func:`expected_tokens`.
        seconds: of a cycle, by its drafts: the lengths to choose from.
    """
    tokens = expected_tokens(rates)
    return max(seconds, key=lambda k: tokens[k] / seconds[k])


# -- by cost -----------------------------------------------------------------------------------------------------------


class CostAware(Schedule):
    """Draft on while it pays, on the plain path: decided twice for each draft.

    1. Is another draft step worth computing? Nothing is known of its draft yet but the rate at its position.
    2. Its distribution is known, and the step is paid for: is the draft worth a row of the verification?

    The chance that a draft is accepted is that of those before it times its rate by :class:`Confidence`. The first
    windows of a pair have a few given lengths, so that verifications of several sizes are measured.

    Args:
        size: the upper bound.
        costs: of this pair; measured on with every window.
        clock: seconds; another one for tests.
    """

    watches = True
    WEIGHT = 4  # windows that the first estimate of the running average counts for
    AGAIN = 128  # windows after which a length is measured again that was not used meanwhile

    def __init__(self, size: int, costs: Costs, clock: Callable[[], float] = time.perf_counter):
        super().__init__(size)
        self.costs, self.clock = costs, clock
        self.confidence, self.positions, self.average = Confidence(), Positions(size), Rate()
        self.left: float | None = None  # when the last window had been learned from
        self.longest = size
        self.rows: list[int] = []
        self.seen: list[list[float]] = []  # confidence of each draft of the window, for each of ``rows``

    def begin(self, rows: list[int], room: int) -> int:
        """See :class:`Schedule`."""
        now = self.clock()
        if self.left is not None:
            self.costs.add("rest", now - self.left)
        trial = self.trial(room)
        self.tries, self.longest = trial is not None, min(self.size, room) if trial is None else trial
        self.rows, self.chances, self.seen = rows, [1.0] * len(rows), []
        self.steps, self.taken, self.stamp = 0, 0, now
        self.rates = self.positions.rates()
        if not self.average.seconds and not self.tries:
            seconds = {k: self.costs.cycle(k, k) for k in range(self.size + 1)}
            usual = best_length(self.rates, seconds)
            self.average.learn(self.WEIGHT * expected_tokens(self.rates)[usual], self.WEIGHT * seconds[usual])
        return self.longest

    def trial(self, room: int) -> int | None:
        """A length that is to be measured, for the first time or again; None when enough is known of as many."""
        lengths = dict.fromkeys((self.size, 0, self.size // 2, 1))
        known = self.costs.known()
        if len(known) < len(lengths) or max(known) <= self.size:
            return next((k for k in lengths if k <= room and not self.costs.enough(k + 1)), None)
        old = self.costs.windows - self.AGAIN
        return next((k for k in lengths if k <= room and self.costs.newest.get(k + 1, 0) < old), None)

    def takes(self, confidence: list[float]) -> bool:
        """See :class:`Schedule`."""
        now = self.clock()
        self.costs.add("step" if self.steps else "first", now - self.stamp)
        self.stamp = now
        self.steps += 1
        own = [confidence[row] for row in self.rows]
        chances = [chance * self.confidence.rate(c) for chance, c in zip(self.chances, own)]
        joins = self.tries or self._pays(statistics.fmean(chances), paid=True)
        if joins:
            self.chances, self.taken = chances, self.taken + 1
            self.seen.append(own)
        return joins

    def goes_on(self) -> bool:
        """See :class:`Schedule`."""
        if self.tries:
            return True
        return self._pays(statistics.fmean(self.chances) * self.rates[self.taken], paid=False)

    def _pays(self, chance: float, paid: bool) -> bool:
        """Whether the next draft, accepted with this chance, pays, alone or with some behind it."""
        here, costs = self.taken, self.costs
        further = range(here + 1, self.longest + 1)
        chances = itertools.accumulate(self.rates[here + 1 : self.longest], operator.mul, initial=chance)
        step, before = costs.seconds.get("step", 0.0), costs.verification(here + 1)
        seconds = [costs.verification(k + 1) - before + (k - here - paid) * step for k in further]
        return pays(list(chances), seconds, self.average.now())

    def drafted(self) -> None:
        """See :class:`Schedule`."""
        self.stamp = self.clock()

    def learn(self, drafted: int, accepted: list[int], gained: list[int]) -> None:
        """See :class:`Schedule`."""
        self.left = self.clock()
        self.costs.add(drafted + 1, self.left - self.stamp)
        self.positions.learn(drafted, accepted, gained)
        self.confidence.forget()
        counts = [gained[row] for row in self.rows if gained[row]]
        for place, row in enumerate(self.rows):
            for j in range(min(drafted, accepted[row] + 1, gained[row])):
                self.confidence.learn(self.seen[j][place], accepted[row] > j)
        if counts and not self.tries:
            self.average.learn(statistics.fmean(counts), self.costs.cycle(self.steps, drafted))


class CostAhead(Schedule):
    """The length with the most tokens per second, on the fast path: chosen before drafting, from the cycles before.

    There a whole cycle is replayed from graphs, and nothing of it is read before the next one is under way; so a window
    follows what was seen up to the cycle before the last. What is measured is the time from one verdict to the next,
    which is what a cycle takes. The first windows have the largest and the smallest recorded length.

    Args:
        size, step: as in :class:`Schedule`; the lengths are the multiples of ``step`` below ``size``, and ``size``.
        costs: whole cycles by the nodes they verify; measured on with every window.
        clock: seconds; another one for tests.
    """

    def __init__(self, size: int, step: int, costs: Costs, clock: Callable[[], float] = time.perf_counter):
        super().__init__(size, step)
        self.costs, self.clock = costs, clock
        self.lengths = sorted({*range(step, size, step), size})
        self.positions = Positions(size)
        self.left: float | None = None

    def length(self) -> int:
        """See :class:`Schedule`."""
        for trial in (self.size, self.lengths[0]):
            if not self.costs.enough(trial + 1):
                return trial
        return best_length(self.positions.rates(), {k: self.costs.verification(k + 1) for k in self.lengths})

    def learn(self, drafted: int, accepted: list[int], gained: list[int]) -> None:
        """See :class:`Schedule`."""
        now = self.clock()
        if self.left is not None:
            self.costs.add(drafted + 1, now - self.left)
        self.left = now
        self.positions.learn(drafted, accepted, gained)


_COSTS: "weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, dict[Hashable, Costs]]]"
_COSTS = weakref.WeakKeyDictionary()  # target -> drafter -> where and how -> what it costs


def costs_of(target: Any, drafter: Any, key: Hashable) -> Costs:
    """What is known of a loaded pair's costs under ``key`` (device, dtype, batch size, threads, path)."""
    pairs = _COSTS.setdefault(target, weakref.WeakKeyDictionary())
    return pairs.setdefault(drafter, {}).setdefault(key, Costs())


def make_schedule(name: str, size: int, fast: bool, costs: Callable[[], Costs]) -> Schedule:
    """The schedule of one call.

    Args:
        name: of :data:`SCHEDULES`, but for "auto".
        size: upper bound, in drafts.
        fast: whether windows come from graphs, whose lengths are chosen before drafting.
        costs: gives what is known of the pair's costs, where they count.
    """
    step = GRAPH_STEP if fast else 1
    if name == "cost":
        return CostAhead(size, step, costs()) if fast else CostAware(size, costs())
    return {"constant": Schedule, "heuristic": Heuristic, "gammatune": GammaTune}[name](size, step)
