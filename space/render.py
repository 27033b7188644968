"""What the page shows, as HTML: pure functions of runs, windows and figures. Every text from outside is escaped."""

import html
import json

from figures import Figures
from race import PLAIN, Run, speedup
from text import visible

# kind of a token -> (name in the legend, what it means)
KINDS = {
    "accepted": ("accepted", "drafted by the drafter, accepted by the target (dotted line)"),
    "bonus": ("bonus", "the target's extra token after a window that was accepted as a whole (double line)"),
    "own": ("target's own", "the target's token in place of a rejected draft, or without a window (wavy line)"),
}
# kind of a node of a window -> (its mark, what the mark means)
MARKS = {
    "accepted": ("✓", "accepted"),
    "rejected": ("✗", "rejected"),
    "dropped": ("–", "after a rejected token, dropped"),
    "own": ("✎", "the target's own"),
    "bonus": ("★", "bonus"),
}


def kinds(run: Run, depth: int) -> list[str]:
    """The kind of every token of a run with a drafter; ``depth`` guesses a window's length while it still runs."""
    found = []
    for number, (_, tokens) in enumerate(run.steps):
        if number == 0:  # from the prompt's own forward
            found += ["own"] * len(tokens)
            continue
        known = number <= len(run.accepted)
        accepted = run.accepted[number - 1] if known else len(tokens) - 1
        drafted = run.drafted[number - 1] if known else depth
        last = "bonus" if 0 < drafted <= accepted else "own"
        found += ["accepted" if i < accepted else last for i in range(len(tokens))]
    return found


def legend() -> str:
    items = "".join(
        f'<li><span class="t {kind}">{html.escape(name)}</span> <span>{html.escape(meaning)}</span></li>'
        for kind, (name, meaning) in KINDS.items()
    )
    return f'<ul class="legend" aria-label="Legend">{items}</ul>'


def panes(runs: list[Run], names: list[str], texts: dict[str, list[str]], depth: int, asked: str = "") -> str:
    """The panes side by side, below what was asked. ``texts``: per run the piece of every token."""
    by_name = {run.name: run for run in runs}
    shown = "".join(pane(by_name.get(n), n, runs, texts.get(n, []), depth) for n in names)
    return f'<p class="hint asked"><bdi>{html.escape(asked) or "&nbsp;"}</bdi></p><div class="panes">{shown}</div>'


def pane(run: Run | None, name: str, runs: list[Run], texts: list[str], depth: int) -> str:
    """One system's pane; one that waits has the size of one that runs, so that nothing jumps."""
    title, run_now = html.escape(name if name == PLAIN else f"with {name}"), run or Run(name)
    marks = ["plain"] * len(texts) if name == PLAIN else kinds(run_now, depth)
    times = [seconds for seconds, tokens in list(run_now.steps) for _ in tokens]
    spans = "".join(
        f'<span class="t {mark}" data-t="{seconds:.4f}">{html.escape(piece)}</span>'
        for piece, mark, seconds in zip(texts, marks, times)
    )
    total = run_now.seconds if run_now.seconds is not None else (times[-1] if times else 0.0)
    state = "running" if run_now.seconds is None else "stopped" if run_now.stopped else "done"
    state = state if run else "waiting"
    shown = [
        ("time", f"{total:.2f} s" if run else "–", "clock"),
        ("tokens/s", f"{run_now.rate:.0f}" if run else "–", "rate"),
        ("tokens", len(times) if run else "–", "count"),
    ]
    if name != PLAIN:
        gained = run_now.gained or [len(tokens) for _, tokens in list(run_now.steps)[1:]]
        shown.append(("acceptance length", f"{sum(gained) / len(gained):.2f}" if gained else "–", ""))
    return (
        f'<section class="pane {state}" aria-label="{title}" data-seconds="{total:.4f}">'
        f'<div class="head"><h2>{title} <small>{state}</small></h2>'
        f'<button type="button" class="small" data-copy {"" if spans else "disabled"}>Copy text</button></div>'
        f'{numbers(shown)}<div class="answer" dir="auto" tabindex="0" role="group" '
        f'aria-label="answer of {html.escape(name)}">{spans}</div></section>'
    )


def numbers(shown: list[tuple]) -> str:
    """Label and value pairs; the class lets the replay count some of them up."""
    cells = "".join(f"<div><dt>{label}</dt><dd class='{role}'>{value}</dd></div>" for label, value, role in shown)
    return f"<dl class='numbers'>{cells}</dl>"


def difference(run: Run) -> str:
    """Why a run's greedy tokens are not the plain target's: a near tie, or a fault."""
    why, name = run.differences, html.escape(run.name)
    said = html.escape("; ".join(found["text"] for found in why))
    if any(found["verdict"] == "fault" for found in why):
        return f"✗ <strong>FAULT: {name} gives other tokens than the target</strong>, and not by rounding: {said}."
    agrees = " Token for token it is what the same loop gives without drafts." if len(why) == 1 else ""
    return f"≈ <strong>Identical but for rounding</strong> with {name}: {said}.{agrees}"


def headline(run: Run, plain: Run) -> str:
    """The speedup in large figures, its range over the rounds, and what it means; one sentence when read aloud."""
    ratio, low, high = speedup(run, plain)
    said = ""
    if low < 1 < high:
        said = "No difference beyond the scatter of the rounds."
    elif ratio < 1:
        said = "Slower here."
        if run.gained:
            gain = sum(run.gained) / len(run.gained)
            cost = run.seconds / len(run.gained) / (plain.seconds / len(plain.tokens))
            said = (
                f"Slower here: a verification, its drafting included, took as long as {cost:.1f} tokens of the plain "
                f"target and gained {gain:.1f} on average."
            )
    return (
        f'<p class="headline"><strong class="big">{ratio:.2f}×</strong> <span>as fast with {html.escape(run.name)} '
        f"(rounds: {low:.2f} to {high:.2f}).</span> <span>{said}</span></p>"
    )


def verdict(runs: list[Run], temperature: float, same: bool | None) -> str:
    """The facts of a finished race, and the replay's buttons."""
    if any(run.stopped for run in runs):
        return note("Stopped. What was written until then stays; it does not enter the figures.")
    plain, facts = runs[0], []
    if same is None:
        facts.append(
            f"At temperature {temperature:g} both texts are drawn from one distribution, so they differ by chance; "
            "set it to 0 to compare token by token."
        )
    elif same:
        facts.append(f"✓ <strong>Identical output</strong>: all {len(plain.tokens)} tokens compared, none differs.")
    else:
        facts += [difference(run) for run in runs[1:] if run.differences]
    buttons = "".join(
        f'<button type="button" class="small" data-replay="{slower}">{label}</button>'
        for slower, label in ((1, "▶ Replay at true speed"), (4, "▶ 4 times slower"))
    )
    heads = "".join(headline(run, plain) for run in runs[1:])
    row = f'<p class="row">{buttons}<span class="hint" id="pace"></span></p>'
    said = f"<div>{heads}</div><div><p>{' · '.join(facts)}</p>{row}</div>"
    return f'<div class="verdict result" role="status">{said}</div>'


def measuring(done: int | None, rounds: int) -> str:
    """What is said while the round after ``done`` ones runs; None: during the warm-up."""
    if done is None:
        return note(f"Warm-up, shown below while it is written; then {rounds} rounds are measured ...")
    turned = ", the order turned around" if done else ""
    return note(f"Measuring: round {done + 1} of {rounds}{turned}. Below is the warm-up, which does not count.")


def note(text: str) -> str:
    return f'<div class="verdict" role="status"><p>{html.escape(text)}</p></div>'


def problem(text: str) -> str:
    return f'<div class="verdict problem" role="alert"><p>⚠ {html.escape(text)}</p></div>'


# -- inside a window ---------------------------------------------------------------------------------------------------


def chip(token: int, kind: str, words: dict, extra: str = "") -> str:
    label = f"{MARKS[kind][0]} " if kind in MARKS else ""
    tail = f"<small>{extra}</small>" if extra else ""
    return f'<span class="chip {kind}"><span class="mark">{label}</span><bdi>{visible(words[token])}</bdi>{tail}</span>'


HINT = (
    f'<p class="hint">{" · ".join(f"{mark} {meaning}" for mark, meaning in MARKS.values())}. Criticality: how sure the '
    "target is of the next token, times how far the drafter's distribution is from the target's. The paper's method "
    "trains most where it is high.</p>"
)


NO_RACE = '<p class="hint">Run a race first; then step through its verifications here.</p>'
MEASURING = '<p class="hint">The windows of this race are shown once it has ended.</p>'
NO_WINDOW = '<p class="hint">The first token ended this answer, so no window was drafted.</p>'


def stepper(windows: dict[str, list[dict]], words: dict) -> str:
    """The verifications of a race's drafters.

    All windows come along as JSON, and ``head.html`` steps through them: a step asks nobody, so no answer can be late.
    ``words``: token id -> piece.
    """
    views = {name: [window(w, words) for w in found] or [NO_WINDOW] for name, found in windows.items()}
    first = next(iter(views.values()))
    choices = "".join(
        f'<label><input type="radio" name="drafter" value="{html.escape(name)}" {"" if number else "checked"}> '
        f"{html.escape(name)}</label>"
        for number, name in enumerate(views)
    )
    choice = f'<fieldset class="which"><legend>Drafter</legend>{choices}</fieldset>'
    count = len(first)
    shape = f'aria-label="Verification" min="1" max="{count}" step="1" value="1"'
    return (
        f'<div class="inside" data-windows="{html.escape(json.dumps(views, ensure_ascii=False))}">'
        f"{choice if len(views) > 1 else ''}"
        f'<div class="stepper" {"" if count > 1 else "hidden"}>'
        '<button type="button" class="small" id="previous" data-step="-1">◀ Previous</button>'
        f'<div id="verification"><span class="place" role="status">Verification 1 of {count}</span>'
        f'<input type="number" {shape}><input type="range" {shape}></div>'
        '<button type="button" class="small" id="next" data-step="1">Next ▶</button></div>'
        f'<div id="window">{first[0]}</div>{HINT}</div>'
    )


def window(w: dict, words: dict) -> str:
    """One verification. ``words``: token id -> piece."""
    broke = w["accepted"] < w["drafted"]
    if not w["drafted"]:
        line = "Only one token was left to write, so nothing was drafted."
    elif broke:
        how = "rejected at" if rejected(w) else "the tree holds nothing there for"
        line = f"{w['accepted']} of {w['drafted']} drafted positions accepted; {how} position {w['accepted'] + 1}."
    else:
        line = f"All {w['drafted']} drafted positions accepted."
    gain = f"Tokens gained: {len(w['gained'])}."
    if w["own"] is None:
        gain += " The answer ended inside the window."
    parts = [f'<p class="fact"><strong>{line}</strong> {gain}</p>', levels(w, words)]
    if not w["exact"]:
        parts.append(
            '<p class="hint">Drafted tokens were drawn by chance. The accepted ones are as drawn; after them '
            "the drafter's likeliest tokens are shown.</p>"
        )
    parts.append(candidates(w, broke, words))
    return f'<div class="window">{"".join(parts)}</div>'


def rejected(w: dict) -> list[int]:
    """The nodes that the target rejected where the accepted path ends; none where a tree ends early."""
    last = w["path"][-1] if w["path"] else 0
    return [node for node in range(1, len(w["nodes"])) if w["parents"][node] == last]


def levels(w: dict, words: dict) -> str:
    """The window level by level: below each accepted token, what was drafted to follow it."""
    children: dict[int, list[int]] = {}
    for node in range(1, len(w["nodes"])):
        children.setdefault(w["parents"][node], []).append(node)
    rows, here = [], 0
    for level in range(1, w["drafted"] + 1):
        drafted = children.get(here, [])
        if not drafted:
            break
        taken = w["path"][level - 1] if level <= len(w["path"]) else None
        chips = []
        for node in drafted:
            below = 0 if node == taken or len(drafted) == 1 else descendants(node, children)
            kind = "accepted" if node == taken else "rejected" if level <= w["accepted"] + 1 else "dropped"
            chips.append(chip(w["nodes"][node], kind, words, f"+{below} below" if below else ""))
        rows.append(level_row(str(level), "".join(chips), criticality_at(w, level)))
        here = taken if taken is not None else drafted[0]
    if w["own"] is not None:
        broke = w["accepted"] < w["drafted"]
        kind = "own" if broke or not w["drafted"] else "bonus"
        name = "bonus" if kind == "bonus" else "target"
        place = criticality_at(w, w["accepted"] + 1) if not broke else ""
        rows.append(level_row(name, chip(w["own"], kind, words), place))
    root = level_row("root", chip(w["nodes"][0], "root", words), "")
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("position", "criticality", "tokens"))
    return f'<table class="levels"><thead><tr>{head}</tr></thead><tbody>{root}{"".join(rows)}</tbody></table>'


def level_row(name: str, chips: str, criticality: str) -> str:
    return f"<tr><th scope='row'>{name}</th><td>{criticality}</td><td>{chips}</td></tr>"


def criticality_at(w: dict, level: int) -> str:
    """The criticality of a position as a bar and a number; nothing where the text does not reach."""
    if level > len(w["criticality"]):
        return ""
    value = w["criticality"][level - 1]
    return f'<span class="meter"><span style="width:{min(value / 2, 1):.0%}"></span></span> {value:.2f}'


def descendants(node: int, children: dict) -> int:
    return sum(1 + descendants(child, children) for child in children.get(node, []))


def candidates(w: dict, broke: bool, words: dict) -> str:
    """The likeliest next tokens of both sides at the break, or of the target after a whole window."""
    place = "where it was rejected" if broke else "after the window"
    sides = [(f"Target's top candidates {place}", w["target_top"])]
    if w["draft_top"]:
        sides.append((f"Drafter's top candidates {place}", w["draft_top"]))
    tables = "".join(
        f"<table class='candidates'><caption>{title}</caption><tbody>"
        + "".join(
            f"<tr><th scope='row'><bdi>{visible(words[token])}</bdi></th>"
            f"<td><span class='meter'><span style='width:{p:.0%}'></span></span><b>{p:.1%}</b></td></tr>"
            for token, p in entries
        )
        + "</tbody></table>"
        for title, entries in sides
    )
    return f'<div class="tops">{tables}</div>'


# -- figures -----------------------------------------------------------------------------------------------------------


def figures_table(groups: dict[str, dict[str, Figures]], temperatures: dict[str, float]) -> str:
    """One row per kind of run and drafter."""
    columns = (
        "settings",
        "drafter",
        "races",
        "acceptance length",
        "plain tokens/s",
        "tokens/s",
        "speedup",
        "identical",
    )
    rows = ""
    for label, systems in groups.items():
        for name, f in systems.items():
            same = f"{f.identical} of {f.races}" if temperatures[label] == 0 else "sampled"
            same += f", {f.near_ties} near ties" if f.near_ties else ""
            same += f", <strong>{f.faults} FAULTS</strong>" if f.faults else ""
            cells = (
                *(html.escape(text) for text in (label, name)), f.races, f"{f.acceptance_length:.2f}",
                f"{f.plain_tokens_per_second:.0f}", f"{f.tokens_per_second:.0f}", f"{f.speedup:.2f}×", same,
            )  # fmt: skip
            rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th scope='col'>{column}</th>" for column in columns)
    return (
        f"<div class='scroll' tabindex='0' role='group' aria-label='Figures of your races'>"
        f"<table class='figures'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def bars(title: str, xlabel: str, series: dict[str, list[float]], percent: bool) -> str:
    """A bar chart, one bar per series at every position 1, 2, ..."""
    count = max((len(values) for values in series.values()), default=0)
    highest = 1.0 if percent else max((v for values in series.values() for v in values), default=1) or 1
    slot = 320 / max(count, 1)
    width, shapes = min(slot * 0.8 / len(series), 30), []
    for s, values in enumerate(series.values()):
        for i, value in enumerate(values):
            x = 40 + slot * (i + 0.5) + width * (s - len(series) / 2)
            height = 130 * value / highest
            shapes.append(
                f"<rect class='s{s}' x='{x:.1f}' y='{150 - height:.1f}' width='{width:.1f}' height='{height:.1f}'/>"
            )
            label = f"{value:.0%}" if percent else f"{value:g}"
            if len(series) == 1 and slot >= 20:
                shapes.append(f"<text class='value' x='{x + width / 2:.1f}' y='{146 - height:.1f}'>{label}</text>")
    ticks = "".join(f"<text x='{40 + slot * (i + 0.5):.1f}' y='166'>{i + 1}</text>" for i in range(count))
    return chart(
        title, xlabel, series, "".join(shapes) + ticks, f"{highest:.0%}" if percent else f"{highest:g}", percent
    )


def numbers_table(title: str, xlabel: str, series: dict[str, list[float]], percent: bool) -> str:
    """What :func:`bars` would draw, as numbers."""
    count = max((len(values) for values in series.values()), default=0)
    head = "".join(f"<th scope='col'>{i + 1}</th>" for i in range(count))
    rows = ""
    for name, values in series.items():
        cells = "".join(f"<td>{f'{value:.0%}' if percent else f'{value:g}'}</td>" for value in values)
        rows += f"<tr><th scope='row'>{html.escape(name)}</th>{cells}</tr>"
    return (
        f"<div class='scroll' tabindex='0' role='group' aria-label='{title}'><table class='figures'>"
        f"<caption>{title}</caption><thead><tr><th scope='col'>{xlabel}</th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def points(title: str, xlabel: str, series: dict[str, list[tuple[int, float]]]) -> str:
    """A line through points (x, y) per series, with a line at y = 1."""
    xs = [x for values in series.values() for x, _ in values] or [1]
    highest = max([1.0, *(y for values in series.values() for _, y in values)]) * 1.1
    low, span = min(xs), max(max(xs) - min(xs), 1)
    place = [
        [(60 + 280 * (x - low) / span, 150 - 130 * y / highest, x, y) for x, y in sorted(values)]
        for values in series.values()
    ]
    one = 150 - 130 / highest
    shapes = [
        f"<line class='one' x1='40' x2='360' y1='{one:.1f}' y2='{one:.1f}'/><text x='366' y='{one:.1f}'>1×</text>"
    ]
    for s, found in enumerate(place):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in found)
        shapes.append(f"<polyline class='l{s}' points='{path}'/>")
        for x, y, _, value in found:
            shapes.append(f"<circle class='s{s}' cx='{x:.1f}' cy='{y:.1f}' r='4'/>")
            shapes.append(f"<text class='value' x='{x:.1f}' y='{y - 8:.1f}'>{value:.2f}×</text>")
    ticks = {round(x, 1): label for found in place for x, _, label, _ in found}
    shapes += [f"<text x='{x}' y='166'>{label}</text>" for x, label in ticks.items()]
    return chart(title, xlabel, series, "".join(shapes), f"{highest:.1f}×", False)


def chart(title: str, xlabel: str, series: dict, shapes: str, highest: str, percent: bool) -> str:
    """A framed chart with a title, its data as text for screen readers, and a legend when it has several series."""
    key = "".join(f"<span class='key k{s}'>{html.escape(name)}</span> " for s, name in enumerate(series))

    def say(value) -> str:
        if isinstance(value, tuple):
            return f"{value[0]}: {value[1]:.2f}"
        return f"{value:.0%}" if percent else f"{value:g}"

    spoken = "; ".join(f"{html.escape(name)}: {', '.join(map(say, values))}" for name, values in series.items())
    return (
        f"<figure class='chart'><figcaption>{title} {key if len(series) > 1 else ''}</figcaption>"
        f"<svg viewBox='0 0 384 190' role='img' aria-label='{title}, by {xlabel}. {spoken}'>"
        f"<line class='axis' x1='40' x2='360' y1='150' y2='150'/><text class='end' x='34' y='24'>{highest}</text>"
        f"<text class='end' x='34' y='153'>0</text>{shapes}<text x='200' y='185'>{xlabel}</text></svg></figure>"
    )
