"""How the drafter on the page was trained, as its own record says.

With PPOW's rollouts, with their closed form, or not with PPOW.
"""

import html

_PAPER = (
    '<a href="https://arxiv.org/abs/2605.14978">PPOW: Performance-Driven Policy Optimization for Speculative Decoding '
    "with Adaptive Windowing (arXiv 2605.14978)</a>"
)
_WHY = """The target verifies a whole window in one forward and keeps the longest accepted prefix, so one early mismatch
throws away everything after it. Imitating token by token does not know that. PPOW trains for what decoding gains: how
many tokens of a window are accepted, per unit of cost."""
_OTHERS = {
    "cst": "the loss of stage 1, continued",
    "lk": "LK's loss (arXiv 2602.23881), which raises the chance that a draft is accepted",
}
_STAGE1 = ("Stage 1", "imitate the target's", "answers (EAGLE-3)")


def page(record: dict | None) -> str:
    """The method as HTML.

    Args:
        record: of the drafter's last stage, as provenance.json holds it; None where there is none.
    """
    record = record if isinstance(record, dict) else {}
    options = record.get("config") if isinstance(record.get("config"), dict) else {}
    objective, estimator = options.get("objective", "ppow"), options.get("estimator")
    if record.get("command") == "supervised":
        shown = _drawing([_STAGE1], "", "")
        said = "This drafter has been through stage 1 only: it imitates the target's answers, token by token."
    elif record.get("command") != "reinforce" or (objective == "ppow" and estimator not in ("exact", "rollout")):
        shown, said = _rollouts({}), f"How this drafter was trained was not recorded. This is PPOW as published. {_WHY}"
    elif objective != "ppow":
        shown = _drawing(
            [_STAGE1, ("Stage 2", f"trained on with {objective},", "not with PPOW")], "Another objective", ""
        )
        name = html.escape(str(objective))
        what = f": {_OTHERS[name]}" if name in _OTHERS else ""
        said = f"This drafter was trained on with <code>{name}</code>{what}. PPOW is compared with it."
    elif estimator == "exact":
        shown, said = _closed_form(options), f"{_WHY} {_how_exactly(options)}"
    else:
        shown = _rollouts(options)
        said = f"{_WHY} When no token was accepted, a smaller reward still tells near misses from far ones."
    return f'<div class="method">{shown}<p>{said}</p><p>{_PAPER}</p></div>'


def _how_exactly(options: dict) -> str:
    """What is left out and what is added, in words."""
    said = "This drafter was trained on the expectation of that reward in closed form, along the target's own texts"
    said += ", without rollouts"
    if options.get("supervised_coef"):
        loss = html.escape(str(options.get("supervised_loss", "lk")).upper())
        said += f"; besides there is a supervised loss, {loss}, at weight {options['supervised_coef']:g}"
    if 0 < options.get("average_from", 1) < 1:
        said += "; and its weights are the mean over the last steps"
    return f"{said}. The paper estimates this expectation by reinforcement learning on rollouts instead."


def _closed_form(options: dict) -> str:
    size, gamma = options.get("window_size", 10), options.get("cost_ratio", 0.12)
    where = "of the target's texts"
    first = ("Every window", where, f"{size} tokens long")
    if not options.get("all_windows", "supervised_loss" not in options):  # as older runs could choose
        first = ("Windows", "drawn from the", "target's own texts")
    if options.get("reward", "paper") == "paper":
        reward = ("Expected reward", f"sum of P(k) k / ({gamma:g} k + 1)", "in closed form")
    else:
        reward = ("Expected reward", "tokens per unit of cost,", "in closed form")
    middle = ("Acceptance", "chance of each accepted", f"length k, 0 to {size}")
    arrow = "its gradient updates the drafter; no rollouts"
    return _drawing([_STAGE1, first, middle, reward], "Stage 2: PPOW in closed form", arrow)


def _rollouts(options: dict) -> str:
    size, group, gamma = (options.get(n, d) for n, d in (("window_size", 10), ("group_size", 8), ("cost_ratio", 0.12)))
    choose = ("Choose windows", "where the target is sure", "and the drafter differs")
    if options.get("adaptive_switch") == 1:
        choose = ("Choose windows", "at random from the", "target's own texts")
    reward = ("Verify and reward", "k accepted tokens earn", f"k / ({gamma:g} k + 1)")
    if options.get("reward", "paper") != "paper":
        reward = ("Verify and reward", "accepted tokens and bonus", "per unit of cost")
    boxes = [_STAGE1, choose, ("Roll out", f"{group} windows of {size} tokens", "from each prefix"), reward]
    held = ", held near the target" if options.get("kl_coef", 1) else ""
    return _drawing(boxes, "Stage 2: PPOW", f"group-relative advantages update the drafter{held}")


def _drawing(boxes: list[tuple[str, str, str]], title: str, back: str) -> str:
    """Boxes from left to right, an arrow between each two, and one back from the last to the second."""
    places = [(8, 150), (196, 150), (384, 150), (572, 180)]
    shapes = []
    for (x, width), (head, *lines) in zip(places, boxes):
        middle = x + width // 2
        texts = f'<text x="{middle}" y="64" class="big">{html.escape(head)}</text>'
        texts += "".join(
            f'<text x="{middle}" y="{84 + 17 * i}">{html.escape(line)}</text>' for i, line in enumerate(lines)
        )
        shapes.append(f'<g class="box"><rect x="{x}" y="40" width="{width}" height="78" rx="10"/>{texts}</g>')
    for (x, width), (following, _) in list(zip(places, places[1:]))[: len(boxes) - 1]:
        shapes.append(f'<path class="arrow" d="M{x + width} 79H{following - 2}"/>')
    if title:
        shapes.append(f'<text x="466" y="22" class="big">{title}</text>')
    if back:
        shapes.append('<path class="arrow" d="M662 118V190H271V120"/>')
        shapes.append(f'<text x="466" y="182">{back}</text><text x="466" y="212">and again</text>')
    spoken = "; ".join(f"{head}: {' '.join(lines)}" for head, *lines in boxes)
    return (
        f'<svg viewBox="0 0 760 250" role="img" aria-label="The method. {html.escape(f"{spoken}. {back}")}">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z"/></marker></defs>{"".join(shapes)}</svg>'
    )
