"""Inside a window: what was drafted at every verification of a run, where it broke, and how critical that position was.

Computed after the race, so that nothing of it weighs on the clock: one forward of the target over the finished text
gives its logits and taps, and the drafter drafts every window once more from them.
"""

import math

import torch

TOP = 5  # candidates shown per side
_LOG_ZERO = -1e4  # stands for log 0


@torch.no_grad()
def look_inside(pair, drafter, prompt: torch.Tensor, run, settings) -> list[dict]:
    """The windows of ``run``, as plain values that a page can keep.

    Args:
        prompt: (1, P) prompt ids.
        run: the finished run of ``drafter``.

    Returns:
        One dict per verification: ``nodes`` (token ids of the window, node 0 the root), ``parents``, ``path`` (accepted
        nodes), ``drafted``, ``accepted``, ``gained`` (tokens), ``own`` (the target's token after the path, if it was
        kept), ``target_top`` and ``draft_top`` at the break (token and probability; the latter empty if nothing broke),
        ``criticality`` per position from the root's successor on, as far as the text is known, and ``exact``: whether
        the window is what was drafted, and not only its accepted part.
    """
    device = prompt.device
    ids = torch.cat((prompt, torch.tensor([run.tokens], device=device)), 1)  # (1, T)
    logits, taps = drafter.read_target(pair.target, input_ids=ids, use_cache=False)  # taps (1, T, n_taps * Ht)
    text = Text(pair, drafter, ids, taps.to(device), logits[0].float(), prompt.shape[1], settings.temperature)
    windows = []
    for drafted, accepted, gained in zip(run.drafted, run.accepted, run.gained):
        windows.append(text.window(drafted, accepted, gained, settings))
        text.advance(gained)
    return windows


class Text:
    """A finished text, read window by window.

    Args:
        ids: (1, T) prompt and answer.
        taps: (1, T, n_taps * Ht) of the target.
        logits: (T, V) of the target; row t is about token t + 1.
        start: position of the first window's root, the first token of the answer.
    """

    def __init__(self, pair, drafter, ids, taps, logits, start: int, temperature: float):
        self.drafter, self.ids, self.taps, self.logits, self.start = drafter, ids, taps, logits, start
        self.sampled = temperature > 0
        self.columns = drafter.draft_columns().to(ids.device)  # (D,) target ids of the draft vocabulary
        embed = drafter.embedding_for(pair.target)
        self.critical = None
        if ids.shape[1] > 1 and not drafter.config.is_block:  # whose windows tell it
            read = drafter(ids[:, 1:], taps[:, :-1], inputs_embeds=embed(ids[:, 1:]).to(drafter.dtype))
            drafted = read.logits if read.logits is not None else drafter.logits(read.hidden_states, embed)
            self.critical = criticality(logits[1:][:, self.columns], drafted[0].float())  # entry t: token t + 2
        cache = pair.part("cache_ppow").SlotCache(len(drafter.layers), ids.shape[1] + 256)
        lengths = torch.zeros(1, dtype=torch.long, device=ids.device)
        self.state = drafter.state_kind(drafter, embed, cache, lengths, None)
        self._read(0, start)

    def _read(self, first: int, count: int) -> None:
        """Give the drafter the pairs (taps of x_t, x_{t+1}) for ``count`` positions t from ``first`` on."""
        here, following = slice(first, first + count), slice(first + 1, first + count + 1)
        positions = torch.arange(first, first + count, device=self.ids.device)[None]
        counts = torch.tensor([count], device=self.ids.device)
        self.state.extend(self.taps[:, here], self.ids[:, following], positions, counts)

    def advance(self, gained: int) -> None:
        self._read(self.start, gained)
        self.start += gained

    def window(self, drafted: int, accepted: int, gained: int, settings) -> dict:
        """The window that starts after the current root."""
        root, following = self.ids[:, self.start], self.ids[0, self.start + 1 :].tolist()
        kept = following[: min(accepted, gained)]
        broke = accepted < min(drafted, gained)  # what a stop cut off did not break
        steps, nodes, parents = [], root.tolist(), [0]
        if drafted:
            chain = self.state.chain(root, drafted, self._follow(kept, steps))
            nodes, parents = chain.tokens[0].tolist(), chain.parents[0].tolist()
            if settings.drafting == "tree":
                tree = self.state.tree(root, drafted, settings.tree_top_k, settings.tree_nodes)
                nodes, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
        end = self.start + len(kept)  # the target's row that decides on the token after the accepted ones
        known = min(len(kept) + 1, len(following))
        if self.critical is not None:
            critical = self.critical[self.start - 1 : self.start - 1 + known]
        elif said := steps[:known]:
            wanted = self.logits[self.start : self.start + len(said)][:, self.columns]
            critical = criticality(wanted, torch.stack(said).clamp(min=1e-30).log())
        else:
            critical = torch.empty(0)
        return {
            "nodes": nodes,
            "parents": parents,
            "path": path_of(kept, nodes, parents),
            "drafted": drafted,
            "accepted": accepted,
            "gained": following[:gained],
            "own": following[accepted] if gained > accepted else None,
            "target_top": top(self.logits[end].softmax(-1)),
            "draft_top": top(steps[len(kept)], self.columns) if broke and len(kept) < len(steps) else [],
            "criticality": critical.tolist(),
            "exact": settings.drafting == "tree" or not self.sampled,
        }

    def _follow(self, kept: list[int], steps: list):
        """A sampler for ``DrafterState.chain`` that takes the accepted tokens, then the most probable ones."""

        def sample(logits):
            probs = logits.float().softmax(-1)  # (1, D)
            place = len(steps)
            steps.append(probs[0])
            if place < len(kept):
                choice = torch.searchsorted(self.columns, torch.tensor([kept[place]], device=self.columns.device))
            else:
                choice = probs.argmax(-1)
            return choice, probs

        return sample


def path_of(kept: list[int], nodes: list[int], parents: list[int]) -> list[int]:
    """The nodes of the accepted tokens, from the root's child on."""
    path, here = [], 0
    for token in kept:
        here = next(n for n in range(1, len(nodes)) if parents[n] == here and nodes[n] == token)
        path.append(here)
    return path


def top(probs: torch.Tensor, columns: torch.Tensor | None = None) -> list[list]:
    """The likeliest tokens as [target id, probability]."""
    values, ids = probs.topk(min(TOP, probs.shape[-1]))
    ids = ids if columns is None else columns[ids]
    return [[token, value] for token, value in zip(ids.tolist(), values.tolist())]


def criticality(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """v_t = C(P_t) * KL(P_t || Q_t), C(P) = 1 - H(P) / log D, both over the draft vocabulary: (.., D) -> (..).

    The formula by which ``ppow reinforce`` chooses windows (ADAW), at the drafter's first draft step.
    """
    p, q = (logits.log_softmax(-1).clamp(min=_LOG_ZERO) for logits in (target_logits, draft_logits))
    entropy = -(p.exp() * p).sum(-1)
    confidence = (1 - entropy / math.log(p.shape[-1])).clamp(0, 1)
    return confidence * (p.exp() * (p - q)).sum(-1)
