"""Drafting: how a drafter turns the target's taps into a window of tokens, as a chain or as a tree.

A window is a small tree whose node 0 is the *root*, the last committed token x_n; a chain is a tree of one branch.
Drawn from EAGLE-2 (arXiv 2406.16858): expand the ``tree_top_k`` most probable nodes per level by their joint draft
probability, then keep the ``tree_nodes`` most probable of all that were expanded.
"""

import copy
import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from .cache_ppow import SlotCache
from .masks_ppow import additive_mask, ancestors_of, window_allowed
from .schedules_ppow import SCHEDULES, Schedule

DEFAULT_WINDOW_SIZE = 10  # K of the paper
# Yields the logits of one token or level after the other, and is sent what was chosen there.
Steps = Generator[torch.Tensor, Any, None]
# logits (B, D) -> the draft ids (B,) drawn and the distributions (B, D) they were drawn from
Sampler = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
STEADY_THRESHOLD = 0.4  # of GammaTune+ (ours, by measurement: docs/speed.md)
DEFAULT_TREE = {"tree_depth": 7, "tree_top_k": 10, "tree_nodes": 60}  # EAGLE's protocol


@dataclass(frozen=True)
class DraftOptions:
    """How to draft: a chain of ``window_size`` tokens, or a dynamic tree when ``tree_nodes`` is set.

    Attributes:
        window_size: K, drafted tokens per chain, or the most of them (``window_schedule``).
        tree_depth: levels of the tree, i.e. the longest window.
        tree_top_k: nodes expanded per level, and children per expanded node.
        tree_nodes: drafted nodes verified per cycle (the root comes on top).
        draft_threshold: end a chain early once its joint draft probability is below this (0: never). Saves draft steps
            that would hardly be accepted, at the price of one host synchronisation per step; meant for CPUs, and
            without effect on the fast path. A drafter with a confidence head goes by what that says.
        window_schedule: how long the next chain is, up to ``window_size`` (:mod:`schedules_ppow`): "constant";
            "heuristic" (transformers'); "gammatune" (with ``draft_threshold``: GammaTune+); "cost", by what drafting
            and verifying were measured to cost, on the plain path decided draft by draft; "auto": "constant" on the
            fast path, on the plain one "cost", and where tokens are sampled "gammatune", since a seed then brings the
            same tokens whatever time things take (on a CPU with a ``draft_threshold`` of 0.4). Trees know no schedule.
        cuda_graphs: take the fast path of :mod:`fast_path_ppow`. None: where the hardware and the target allow it;
            True: or else raise; False: never.
        accept_drafts: False decodes without drafts, in the same loop: windows of the same shapes pass through the same
            kernels, but hold no drafts, and every token comes from a root. It is the reference that tells what drafts
            change (nothing) from what a window's rounding changes against stock ``generate``.
    """

    window_size: int = DEFAULT_WINDOW_SIZE
    tree_depth: int | None = None
    tree_top_k: int | None = None
    tree_nodes: int | None = None
    draft_threshold: float = 0.0
    window_schedule: str = "auto"
    cuda_graphs: bool | None = None
    accept_drafts: bool = True

    def __post_init__(self) -> None:
        for name in ("window_size", *DEFAULT_TREE):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: expected an integer of at least 1.")
        if self.cuda_graphs not in (None, True, False):
            raise ValueError(f"cuda_graphs={self.cuda_graphs!r}: expected True, False or None (where possible).")
        if not isinstance(self.accept_drafts, bool):
            raise ValueError(f"accept_drafts={self.accept_drafts!r}: expected True or False.")
        if not isinstance(self.draft_threshold, (int, float)) or not 0 <= self.draft_threshold < 1:
            raise ValueError(f"draft_threshold={self.draft_threshold!r}: expected a probability in [0, 1).")
        if self.window_schedule not in SCHEDULES:
            raise ValueError(f"window_schedule={self.window_schedule!r}: expected one of {', '.join(SCHEDULES)}.")
        tree = [self.tree_depth, self.tree_top_k, self.tree_nodes]
        if any(v is not None for v in tree) and None in tree:
            raise ValueError(f"A tree needs tree_depth, tree_top_k and tree_nodes, got {tree}.")

    @property
    def is_tree(self) -> bool:
        """Whether windows are trees."""
        return self.tree_nodes is not None

    @property
    def tree(self) -> tuple[int, int, int] | None:
        """Depth, top_k and nodes of the trees; None for chains."""
        if self.tree_depth is None or self.tree_top_k is None or self.tree_nodes is None:
            return None
        return self.tree_depth, self.tree_top_k, self.tree_nodes

    def __str__(self) -> str:
        """How it drafts, for people."""
        if self.tree is not None:
            return f"trees of {self.tree_nodes} nodes, {self.tree_depth} deep, {self.tree_top_k} wide"
        text = f"chains of {self.window_size}"
        if self.window_schedule != "constant":
            text = f"chains of up to {self.window_size} (window_schedule {self.window_schedule})"
        return text + f", ended below joint probability {self.draft_threshold:g}" * (self.draft_threshold > 0)

    @property
    def longest(self) -> int:
        """Tokens on the longest way through a window."""
        return self.window_size if self.tree_depth is None else self.tree_depth

    @property
    def slots(self) -> int:
        """Cache slots after the committed ones that a cycle may write."""
        if self.tree is None:
            return self.window_size + 1
        depth, top_k, nodes = self.tree
        return max(nodes + 1, (depth - 1) * top_k)

    @classmethod
    def resolve(cls, *configs: GenerationConfig) -> "DraftOptions":
        """The first of ``configs`` (objects with attributes, e.g. generation configs) that says how to draft wins.

        A config that names any ``tree_*`` asks for a tree (what it leaves out comes from later configs, then from
        EAGLE's protocol); one that names only ``window_size`` asks for a chain. transformers' own name for it,
        ``num_assistant_tokens``, means the same: in the first config it stands after ``window_size``, in later ones
        (a drafter's, which always name a ``window_size``) before it.

        ``window_schedule`` comes from the first config that names one, or transformers' own "heuristic" in
        ``num_assistant_tokens_schedule``. Where none does, a ``draft_threshold``, or a size that the first of several
        configs (the call's) asks for, are taken at their word: "constant". Else it is "auto".
        """
        named = [{f.name: getattr(c, f.name, None) for f in dataclasses.fields(cls)} for c in configs]
        for position, (values, config) in enumerate(zip(named, configs)):
            size = asked_size(config)
            if size is not None and (position or values["window_size"] is None):
                values["window_size"] = size
        for values, config in zip(named, configs):
            if str(getattr(config, "num_assistant_tokens_schedule", None)).startswith("heuristic"):
                values["window_schedule"] = values["window_schedule"] or "heuristic"
        asked = [values["draft_threshold"] for values in named] + [v["window_size"] for v in named[:-1]]
        fixed = any(value is not None for value in asked)
        shared: dict[str, Any] = {"window_schedule": "constant" if fixed else "auto"}
        for name in ("window_schedule", "draft_threshold", "cuda_graphs", "accept_drafts"):
            shared |= next(({name: values[name]} for values in named if values[name] is not None), {})
        for position, values in enumerate(named):
            if any(values[key] is not None for key in DEFAULT_TREE):
                tree: dict[str, Any] = {
                    key: next((v[key] for v in named[position:] if v[key] is not None), default)
                    for key, default in DEFAULT_TREE.items()
                }
                return cls(**tree, **{**shared, "draft_threshold": 0.0, "window_schedule": "auto"})
            if values["window_size"] is not None:
                return cls(window_size=values["window_size"], **shared)
        return cls(**shared)

    @property
    def repeats_exactly(self) -> bool:
        """Whether the loop without drafts must give the same tokens: every window has one shape, every token its slot.

        A schedule changes shapes from window to window, on the plain path attention's shapes follow the text's length,
        and in a tree a token's keys lie in another order than in the text, so that sums round differently: there two
        answers may part at a near tie.
        """
        return bool(self.cuda_graphs) and not self.is_tree and self.window_schedule == "constant"

    def on_path(self, fast: bool, steady: bool = False, on_cpu: bool = False) -> "DraftOptions":
        """What of these options has an effect on the fast path, or on the plain one; ``cuda_graphs`` says which.

        ``steady``: "auto" is not to follow measured time. ``on_cpu``: where a draft step that is not taken saves time.
        """
        schedule = self.window_schedule
        if schedule == "auto":
            schedule = "constant" if fast or self.is_tree else "gammatune" if steady else "cost"
        threshold = 0.0 if fast or schedule == "cost" else self.draft_threshold
        if on_cpu and self.window_schedule == "auto" and schedule == "gammatune":
            threshold = threshold or STEADY_THRESHOLD
        return dataclasses.replace(self, window_schedule=schedule, draft_threshold=threshold, cuda_graphs=fast)


def call_config(base: GenerationConfig, **options: Any) -> GenerationConfig:
    """A target's generation config with other options for a call, those of :class:`DraftOptions` among them.

    Fields are set one by one: where transformers derived ``base`` from a model's config.json (no
    generation_config.json), a config made from its values drops every field that transformers does not know.
    """
    config = copy.deepcopy(base)
    config._from_model_config = False
    for name, value in options.items():
        setattr(config, name, value)
    return config


def what_was_drafted(output: Any, asked: dict[str, Any]) -> DraftOptions:
    """How a call drafted, read back from its output (a ``PPOWGenerateOutput``).

    Args:
        asked: the drafting options that the call was given, by name; None is no wish.

    Raises:
        ValueError: when an option had no effect, or the windows are not those of the options.
    """
    ran, windows = output.drafting, [length for row in output.acceptance.drafted for length in row]
    for name, value in asked.items():
        if value in (None, "auto"):
            continue
        if getattr(ran, name) != value or (name == "window_size" and ran.is_tree):
            raise ValueError(
                f"{name}={value!r} was asked for, but {ran!r} is what ran. Either the target's generation config says "
                "otherwise, or the option has no effect where this runs (draft_threshold on the fast path or beside "
                "window_schedule=cost): leave it out, or choose the path with cuda_graphs."
            )
    longest = max(windows, default=0)
    had_room = any(sum(row) > ran.longest for row in output.acceptance.gained)  # the first window was not cut short
    fixed = ran.draft_threshold == 0 and ran.window_schedule == "constant"
    if longest > ran.longest or (had_room and fixed and longest < ran.longest):
        raise ValueError(f"Windows of up to {longest} tokens were drafted where {ran} drafts {ran.longest}.")
    return ran


def asked_size(config: GenerationConfig) -> int | None:
    """``num_assistant_tokens`` of a generation config, unless transformers filled it in with its default."""
    size = getattr(config, "num_assistant_tokens", None)
    filled = getattr(config, "num_assistant_tokens_schedule", None) is not None
    return None if filled and size == config._get_default_generation_params()["num_assistant_tokens"] else size


@dataclass
class DraftWindow:
    """A drafted window of N nodes, node 0 being the root; parents come before children.

    Attributes:
        tokens: (B, N) int64 target ids; ``tokens[:, 0]`` is the root token.
        parents: (B, N) int64; the root is its own parent.
        depth: (B, N) int64; 0 for the root.
        ancestors: (B, N, N) bool, itself included.
        max_depth: longest way from the root.
        draft_ids: (B, N - 1) the nodes of a *sampled* chain as draft-vocabulary ids, and
        draft_probs: (B, N - 1, D) the distributions they were drawn from; None when tokens were chosen without chance.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depth: torch.Tensor
    ancestors: torch.Tensor
    max_depth: int
    draft_ids: torch.Tensor | None = None
    draft_probs: torch.Tensor | None = None

    @classmethod
    def chain(
        cls, tokens: torch.Tensor, draft_ids: torch.Tensor | None = None, draft_probs: torch.Tensor | None = None
    ) -> "DraftWindow":
        """A window of one branch from tokens (B, 1 + K), the root first."""
        batch, count = tokens.shape
        index = torch.arange(count, device=tokens.device)
        return cls(
            tokens,
            (index - 1).clamp_(min=0).expand(batch, -1),
            index.expand(batch, -1),
            (index[:, None] >= index).expand(batch, -1, -1),
            count - 1,
            draft_ids,
            draft_probs,
        )

    @classmethod
    def blank(cls, root: torch.Tensor, nodes: int, depth: int) -> "DraftWindow":
        """A window of the shape of a tree of ``nodes`` drafts and this depth, without drafts: copies of ``root`` (B,).

        They all hang on it, and what the root sees does not depend on them.
        """
        number = torch.arange(nodes + 1, device=root.device)
        return cls(
            root[:, None].expand(-1, nodes + 1),
            torch.zeros_like(number).expand(len(root), -1),
            (number > 0).long().expand(len(root), -1),
            ((number[:, None] == number) | (number == 0)).expand(len(root), -1, -1),
            depth,
        )


class DrafterState:
    """The drafter's side of a running generation: its cache and the features it drafts from next.

    Pair t = (taps of x_t, embedding of x_{t+1}) lives in slot t, so drafter and target count the same slots.

    Args:
        drafter: the drafter.
        embed: module that embeds token ids.
        cache: a cache with one layer per drafter layer.
        lengths: (B,) int64 slots already taken (0 for a fresh text).
        valid: (B, S) bool over prompt slots, False where no pair exists (padding); None when all exist.
    """

    whole_windows = False  # whether windows keep their full size where less room is left
    hidden: torch.Tensor  # (B, 1, H) output at the newest pair, once there is one (block drafters go without)
    positions: torch.Tensor  # (B,) RoPE position of the newest pair
    standing: torch.Tensor  # (B, H) features from which a chain's present draft is made

    def __init__(
        self,
        drafter: PreTrainedModel,
        embed: torch.nn.Module,
        cache: SlotCache,
        lengths: torch.Tensor,
        valid: torch.Tensor | None,
    ):
        self.drafter, self.embed, self.cache = drafter, embed, cache
        self.lengths, self.valid = lengths, valid
        self._longest: int | None = None  # of lengths, looked up when needed

    def extend(self, taps: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, counts: torch.Tensor) -> None:
        """Add pairs with true taps.

        Args:
            taps: (B, M, n_taps * Ht) taps of x_t.
            tokens: (B, M) x_{t+1}.
            positions: (B, M) RoPE position of x_t.
            counts: (B,) how many of the M columns exist per row; the rest is padding on the right.
        """
        hidden = self.drafter.fuse(taps.to(device=self.drafter.device, dtype=self.drafter.dtype))
        hidden = self._run(self.embed(tokens).to(hidden), hidden, positions)
        last = (counts - 1).clamp(min=0)[:, None]  # a row that has ended adds nothing; its features are not used
        self.hidden = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[-1]))
        self.positions = positions.gather(1, last)[:, 0]
        self.lengths, self._longest = self.lengths + counts, None

    def _run(self, embeds: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """New pairs, each row's columns in order after its own length -> features (B, M, H)."""
        batch, count = positions.shape
        index = torch.arange(count, device=positions.device)
        causal = (index[:, None] >= index).expand(batch, -1, -1)
        slots = self.lengths[:, None] + index
        return self._step(embeds, hidden, self.drafter.rotary(hidden, positions), slots, self.lengths, causal, count)

    def _step(
        self,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        base: torch.Tensor,
        seen: torch.Tensor,
        ahead: int,
    ) -> torch.Tensor:
        """One pass of N new pairs.

        Args:
            embeds, hidden: (B, N, H).
            rotary: cos and sin (B, N, d).
            slots: (B, N) where the pairs are written.
            base: (B,) every slot below it is visible to all N, and
            seen: (B, N, W) bool which of the W slots from ``base`` on each of them sees.
            ahead: slots after the committed ones that are in use afterwards.
        """
        view = self._view(ahead)
        self.cache.open_window(slots, view)
        return self.drafter.step(
            embeds, hidden, rotary, self.drafter.attend(self.cache, self._mask(base, seen, view, hidden.dtype))
        )

    def _view(self, ahead: int) -> int:
        """Slots that attention reads when ``ahead`` of them lie after the committed ones."""
        if self._longest is None:
            self._longest = int(self.lengths.max())
        return self._longest + ahead

    def _mask(self, base: torch.Tensor, seen: torch.Tensor, view: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Visibility as :meth:`_step` describes it -> additive (B, 1, N, view) mask.

        None where a single pair sees everything, or a text begins: nothing lies before its N pairs, and N may be many.
        """
        if self.valid is None and (view == seen.shape[1] or tuple(seen.shape) == (1, 1, 1)):
            return None
        prefix = base[:, None].expand(-1, seen.shape[1])
        slots = base[:, None] + torch.arange(seen.shape[2], device=base.device)
        if self.valid is not None:  # among a prompt's own pairs nobody sees those of padding, but they themselves
            held = self.valid.shape[1]
            exists = self.valid.gather(1, slots.clamp(max=held - 1)) | (slots >= held)
            seen = seen & (exists[:, None] | torch.eye(*seen.shape[1:], dtype=torch.bool, device=seen.device))
        return additive_mask(window_allowed(prefix, seen, None, slots, view, self.valid), dtype)

    def chain(
        self,
        root: torch.Tensor,
        size: int,
        sample: Sampler | None = None,
        threshold: float = 0.0,
        schedule: Schedule | None = None,
    ) -> DraftWindow:
        """Draft at most ``size`` tokens after ``root`` (B,), one after the other.

        Args:
            threshold: stop after the token that brings every row's joint draft probability below this. The decision
                rests on tokens that stay in the window, so rejection sampling remains exact.
            sample: None to take the most probable token; else a function from logits (B, D) to
                (ids (B,), probabilities (B, D)) that draws one.
            schedule: one that ``watches`` is asked before each draft whether it joins, by the highest probability of
                its distribution (or what a confidence head says there), and behind it whether another is computed.
                Neither answer depends on the token drawn next, so rejection sampling remains exact
                (:mod:`schedules_ppow`). The window may be the root alone.
        """
        drafter = self.drafter
        watched = schedule if schedule is not None and schedule.watches else None
        tokens, ids, probs = [root], [], []
        joint: torch.Tensor | float = 1.0
        steps = self._chain_steps(root, size)
        logits = next(steps)  # (B, D)
        for i in range(size):
            if sample is None:
                draft, token = self._likeliest(logits)
            else:
                draft, distribution = sample(logits)
                token = drafter.to_target_ids(draft)
            if watched is not None:
                if drafter.config.confidence_head:
                    confidence = self._confidence(logits, sample is not None)
                else:
                    confidence = highest_probability(logits) if sample is None else distribution.amax(-1)
                if not watched.takes(confidence.tolist()):
                    break
            if sample is not None:
                ids.append(draft)
                probs.append(distribution)
            tokens.append(token)
            if threshold > 0:
                if drafter.config.confidence_head:
                    joint = joint * self._confidence(logits, sample is not None)
                else:
                    distribution = logits.float().softmax(-1) if sample is None else distribution
                    joint = joint * distribution.gather(1, draft[:, None])[:, 0]
                if bool((joint < threshold).all()):
                    break
            if watched is not None and i + 1 < size and not watched.goes_on():
                break
            if i + 1 < size:
                logits = steps.send(tokens[-1])
        if not ids:
            return DraftWindow.chain(torch.stack(tokens, 1))
        return DraftWindow.chain(torch.stack(tokens, 1), torch.stack(ids, 1), torch.stack(probs, 1))

    def _likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The most probable drafts of logits (B, D), by their own ids and the target's, (B,) each."""
        draft = logits.argmax(-1)
        return draft, self.drafter.to_target_ids(draft)

    def _confidence(self, logits: torch.Tensor, sampled: bool) -> torch.Tensor:
        """How likely the confidence head thinks the present draft, from logits (B, D), is accepted: -> (B,)."""
        return self.drafter.acceptance_logits(self.standing, logits)[:, int(sampled)].sigmoid()

    def first_logits(self, root: torch.Tensor) -> torch.Tensor:
        """Logits (B, D) of the first token after ``root`` (B,)."""
        return next(self._chain_steps(root, 1))

    def _chain_steps(self, root: torch.Tensor, size: int) -> Steps:
        """Logits (B, D) of one token after the other; each but the last is sent the token (B,) that was chosen."""
        hidden, batch = self.hidden, root.shape[0]
        steps = torch.arange(1, size + 1, device=root.device)
        cos, sin = self.drafter.rotary(hidden, self.positions[:, None] + steps)  # (B, size, d)
        itself = torch.ones(batch, 1, 1, dtype=torch.bool, device=root.device)
        for i in range(size):
            self.standing = hidden[:, -1]
            token = yield self.drafter.logits(self.standing, self.embed)
            base = self.lengths + i  # below it lie the committed pairs and those of the earlier steps
            rotary = cos[:, i : i + 1], sin[:, i : i + 1]
            embeds = self.embed(token)[:, None].to(hidden)
            hidden = self._step(embeds, hidden[:, -1:], rotary, base[:, None], base, itself, i + 1)

    def tree(self, root: torch.Tensor, depth: int, top_k: int, nodes: int) -> DraftWindow:
        """Draft a dynamic tree of at most ``nodes`` nodes under ``root`` (B,); see EAGLE-2, section 4."""
        drafter, device, batch = self.drafter, root.device, root.shape[0]
        width = min(top_k, drafter.config.draft_vocab_size)
        steps = self._tree_steps(root, depth, width)
        score, draft = top(next(steps)[:, 0].float().log_softmax(-1), width)  # (B, width)
        token = drafter.to_target_ids(draft)
        parent = torch.arange(width, device=device).expand(batch, -1)
        # candidates in order of creation, number 0 being the root
        ids, scores, tokens = parent + 1, [score], [token]
        parents, total = [torch.zeros_like(ids)], width
        for _ in range(1, depth):
            child_score, child = top(steps.send((token, parent)).float().log_softmax(-1), width)  # (B, width, width)
            child_score = (score[:, :, None] + child_score).flatten(1)
            child = drafter.to_target_ids(child).flatten(1)
            scores.append(child_score)
            tokens.append(child)
            parents.append(ids.repeat_interleave(width, dim=1))
            score, best = child_score.topk(width)  # the next frontier
            token, ids, total = child.gather(1, best), total + 1 + best, total + width * width
            parent = best // width
        # the first level has `width` candidates, every later one width * width
        level = (torch.arange(total, device=device) - width).div(width * width, rounding_mode="floor") + 2
        return _best_nodes(root, torch.cat(tokens, 1), torch.cat(scores, 1), torch.cat(parents, 1), level, depth, nodes)

    def _tree_steps(self, root: torch.Tensor, depth: int, width: int) -> Steps:
        """Logits of the children of the nodes of one level after the other, the root's (B, 1, D) first.

        Each but the last is sent the next level's tokens (B, width) and which node of this level each of them hangs on
        (B, width); the first level's nodes all hang on the root, and are their own parents here.
        """
        batch, device = root.shape[0], root.device
        span = (depth - 1) * width
        token, parent = yield self.drafter.logits(self.hidden, self.embed)
        hidden = self.hidden[:, -1:].expand(-1, width, -1)  # every first-level node continues the same features
        seen = torch.zeros(batch, width, max(span, 1), dtype=torch.bool, device=device)  # expanded ancestors
        for level in range(1, depth):
            seen = seen.gather(1, parent[:, :, None].expand_as(seen))
            hidden = hidden.gather(1, parent[:, :, None].expand(-1, -1, hidden.shape[-1]))
            first = (level - 1) * width
            own = torch.arange(first, first + width, device=device)
            seen.scatter_(2, own.expand(batch, -1)[:, :, None], True)
            slots = self.lengths[:, None] + own
            position = (self.positions + level)[:, None].expand(-1, width)
            rotary = self.drafter.rotary(hidden, position)
            hidden = self._step(self.embed(token).to(hidden), hidden, rotary, slots, self.lengths, seen, span)
            token, parent = yield self.drafter.logits(hidden, self.embed)


def top(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` highest of values (.., D) and their indices, (.., count) each, in descending order.

    On a GPU torch gives each row to one block; in parts a row of a vocabulary keeps many busy.
    """
    size = values.shape[-1]
    parts = next((n for n in (64, 32, 16, 8) if size % n == 0 and size >= 4 * n * count), 1)
    if parts == 1:
        return values.topk(count)
    found, index = values.unflatten(-1, (parts, -1)).topk(count)  # (.., parts, count)
    index = index + torch.arange(0, size, size // parts, device=values.device)[:, None]
    best, place = found.flatten(-2).topk(count)
    return best, index.flatten(-2).gather(-1, place)


def highest_probability(logits: torch.Tensor) -> torch.Tensor:
    """Of each distribution given by logits (.., D) -> (..) float32."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def _best_nodes(
    root: torch.Tensor,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    parents: torch.Tensor,
    levels: torch.Tensor,
    depth: int,
    nodes: int,
) -> DraftWindow:
    """Keep the ``nodes`` candidates (B, C), C levels, of highest joint probability and renumber them, parents first."""
    batch, count = tokens.shape
    # A child never scores above its parent; on a tie the stable sort keeps the earlier one, which is the parent.
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, : min(nodes, count)]
    chosen = order.sort(dim=1).values  # (B, n)
    number = torch.zeros(batch, count + 1, dtype=torch.long, device=tokens.device)
    number.scatter_(1, chosen + 1, torch.arange(1, chosen.shape[1] + 1, device=tokens.device).expand(batch, -1))
    zero = torch.zeros(batch, 1, dtype=torch.long, device=tokens.device)
    parent = torch.cat((zero, number.gather(1, parents.gather(1, chosen))), 1)
    level = levels.expand(batch, -1).gather(1, chosen)
    return DraftWindow(
        torch.cat((root[:, None], tokens.gather(1, chosen)), 1),
        parent,
        torch.cat((zero, level), 1),
        ancestors_of(parent, depth),
        depth,
    )
