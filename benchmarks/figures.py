"""The figures of the pages, looked up from the summaries in results/.

    python -m benchmarks.figures            # what differs, and which figures are looked up nowhere
    python -m benchmarks.figures --write    # put today's figures in their places (make figures)

figures.txt names, page by page, where figures stand: every line is a piece of the page with its figures as {expression}
or {expression:format}, written with the functions below. It is found whatever numbers stand there now and however the
page is wrapped. A line without braces names what is no figure but a setting, a version or a target value. Everything
else in the page that looks like a figure is a fault, as is a line that is not found just once.
"""

import argparse
import json
import re
import statistics
import string
import sys
from functools import lru_cache
from pathlib import Path

from . import comparison

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = Path(__file__).with_suffix(".txt")
NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"
UNITS = r"x|tokens/s|rollouts/s|texts/s|ms|us|s|minutes?|seconds?|hours?|GB|MB|GiB|TB/s|M|points?|nats"
FIGURE = re.compile(  # a number with a unit, with a decimal point, or alone in a cell
    rf"(?<![\w.])(?:({NUMBER})(?:%|\s?(?:{UNITS})\b)|([+-]?\d[\d,]*\.\d+)(?![\d.]))|(?<=\| )({NUMBER})(?= \|)"
)
# tables that another command wrote; code, comments and addresses; papers; names that hold a number
PASSAGES = r"<!-- written by python -m benchmarks\.\w+ -->.*?end -->|"
PASSAGES += r"```.*?```|`[^`]*`|<!--.*?-->|\]\([^)]*\)|arXiv\s[\d.]+|[A-Za-z]\w*-\d[\w.-]*|\A---\n.*?\n---\n"
NO_FIGURES = re.compile(PASSAGES, re.S)

# -- what figures.txt is written with ----------------------------------------------------------------------------------

PARTS = {"0": "T=0", "0s": "T=0, not looping", "1": "T=1", "1s": "T=1, not looping", "tree": "tree 60, T=0"}
SHOWN, CHAINS = ("0", "0s", "1", "tree"), ("0", "0s", "1")
OURS, OURS_LAST = "exact text-rule + 3 lk averaged", "exact text-rule + 3 lk"  # ppow reinforce, mean and last weights
OURS_MIXED = f"{OURS} mixed"  # half of the answers sampled
OURS_HIGH = "exact text-rule + 3 lk 3e-3 averaged"
UNSEEN = "exact text-rule + 3 lk 1e-3"
KERNEL = "kernel where it is faster"
ROLLOUTS, ANSWERS = "rollouts-llama-3.1-8b-h100", "rollouts-llama-3.1-8b-h100-answers"
# reports that compare the default recipe, at its default rate, with CST for equal time: (report, arm, control)
DEFAULT = [(f"large-{name}", OURS, "cst") for name in ("averaged", "averaged-180s")] + [
    ("bundled-averaged", OURS, "cst")
]
DEFAULT += [(f"large-unseen-texts{name}", OURS_LAST, "cst") for name in ("", "-180s", "-thin", "-blind")]
DEFAULT += [(f"large-{name}", OURS_LAST, "cst") for name in ("known-texts", "batch128", "160s")]
DEFAULT += [(f"bundled-{name}", OURS_LAST, "cst") for name in ("ablations", "batch128", "ideas", "150s")]

PUBLISHED = [(f"large-{name}", "ppow", "cst") for name in ("averaged", "unseen-texts", "unseen-texts-180s", "batch128")]
PUBLISHED += [(f"bundled-{name}", "ppow", "cst") for name in ("ablations", "batch128", "ideas", "equal-steps")]


@lru_cache
def summary(name: str) -> dict:
    """A summary of results/, or the file of that path."""
    path = ROOT / name if "/" in name else RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def fresh(arm: str) -> str:
    """A row of stage 1's options: steps, and acceptance length, or what it is above that of the first row."""
    report = summary("smollm2-stage1-options")
    parts = [report["parts"][name] for name in ("T=0", "T=1")]
    cells = [
        f"{p['lengths'][arm]:.3f}" if arm == "fresh" else comparison.shown(p["differences"]["fresh"][arm])
        for p in parts
    ]
    return " | ".join([str(report["arms"][arm]["steps"][0]), *cells])


def part(name: str, which: str) -> dict:
    return summary(f"objectives-{name}")["parts"][PARTS.get(which, which)]


def length(name: str, which: str, arm: str = "cst") -> float:
    """Acceptance length of an arm; cst: of the best arm of continued supervised training."""
    found = part(name, which)
    return found["lengths"][comparison.best_cst(found) if arm == "cst" else arm]


def values(name: str, which: str, arm: str, control: str = "cst") -> tuple[float, float, float]:
    found = part(name, which)
    return comparison.gain(found, arm, comparison.best_cst(found) if control == "cst" else control)


def gain(name: str, which: str, arm: str, control: str = "cst") -> str:
    """+0.061 [+0.045, +0.079]: difference of an arm's acceptance length to the control's, 95% interval."""
    return comparison.shown(values(name, which, arm, control))


def percent(name: str, which: str, arm: str, control: str = "cst") -> float:
    return 100 * values(name, which, arm, control)[0] / length(name, which, control)


def over(name: str, arm: str) -> str:
    """Cells: an arm over the best CST at both temperatures, and in percent."""
    return " | ".join(f"{gain(name, which, arm)}, {percent(name, which, arm):+.1f}%" for which in ("0", "1"))


def mixed(which: str) -> float:
    """What half of the answers, sampled, change in a fresh drafter's acceptance length, as a share of it."""
    found = summary("smollm2-stage1-options")["parts"][which]
    return found["differences"]["fresh"]["fresh mixed"][0] / found["lengths"]["fresh"]


def span(which: str, *compared: tuple) -> str:
    """1.2 to 2.5: least and most percent over all (report, arm, control)."""
    found = [percent(name, which, arm, control) for name, arm, control in compared]
    return f"{min(found):.1f} to {max(found):.1f}"


def default_span(which: str) -> str:
    """0.0 to 2.5: the default over all its comparisons, the one from a plateau included."""
    return span(which, *DEFAULT, ("bundled-plateau", OURS, "cst"))


def steps(name: str, arm: str) -> str:
    return comparison.steps(summary(f"objectives-{name}")["arms"][arm])


def row(name: str, arm: str, control: str = "cst", parts: tuple = SHOWN) -> str:
    """The cells of an arm: steps, and its difference to the control in every part."""
    return " | ".join([steps(name, arm), *(gain(name, which, arm, control) for which in parts)])


def stage1(name: str, which: str) -> float:
    """Acceptance length of a drafter that `benchmarks.objectives --arms stage1` measured alone."""
    return summary(name)["parts"][PARTS[which]]["lengths"]["stage1"]


def better(name: str, than: str, which: str) -> float:
    """Percent by which one such drafter accepts more than another."""
    return 100 * (stage1(name, which) / stage1(than, which) - 1)


def gains(name: str, ours: str, lk: str) -> str:
    """Cells: ours over CST at both temperatures, with percent, and LK."""
    cells = []
    for which in ("0", "1"):
        cells += [gain(name, which, ours), f"{percent(name, which, ours):.1f}"]
    return " | ".join([*cells, *(f"{values(name, which, lk)[0]:+.3f}" for which in ("0", "1"))])


def seeds(name: str, arm: str) -> str:
    """3: 0.015, that is how many and how far they lie apart."""
    count = summary(f"objectives-{name}")["arms"][arm]["seeds"]
    return f"{count}: {apart(name, '0', arm):.3f}"


def apart(name: str, which: str, arm: str) -> float:
    """How far the seeds of an arm lie apart."""
    found = summary(f"objectives-{name}")["seeds"][PARTS[which]][arm]
    return max(found) - min(found)


def system(name: str, wanted: str, batch: int = 1) -> dict:
    """A system of a report of benchmarks.decoding, by the beginning of its name."""
    rows = summary(f"decoding-{name}")["systems"]
    return next(row for row in rows if row["name"].startswith(wanted) and row["batch"] == batch)


def speed(name: str, wanted: str, batch: int = 1) -> float:
    return system(name, wanted, batch)["tokens_per_second"]


def over_stock(name: str, wanted: str, batch: int = 1) -> float:
    return speed(name, wanted, batch) / speed(name, "stock generate")


def at(name: str, wanted: str, aim: float = 6.4) -> float:
    """Tokens per second at the acceptance length that was aimed at, not the one that was drawn."""
    return speed(name, wanted) * aim / system(name, wanted)["acceptance_length"]


def cycles(name: str, wanted: str) -> float:
    """A second, prefill included."""
    return speed(name, wanted) / system(name, wanted)["acceptance_length"]


def runs(name: str, wanted: str) -> str:
    """56.1 to 74.4: of the slowest and the fastest run."""
    return "{:.1f} to {:.1f}".format(*system(name, wanted)["tokens_per_second_range"])


def verification(name: str, nodes: int) -> float:
    """Milliseconds."""
    return summary(f"decoding-{name}")["verification"][str(nodes)]


def machine(name: str, fact: str) -> float:
    return summary(f"decoding-{name}")["machine"][fact]


def floor_ms(name: str) -> float:
    """Milliseconds in which the weights of a cycle of chains of 10 can be read, the drafter's in eight bits."""
    weights = machine(name, "target_bytes") + 10 * machine(name, "draft_step_bytes") / 2
    return 1000 * weights / machine(name, "matmul_bytes_per_second")


def cycle(name: str, stage: str) -> float:
    return system(name, "PPOW fast, chain")["cycle_ms"][stage]


def of_drafter(name: str) -> str:
    """Cells: a chain's tokens per second, least and most; its cycle; its draft alone; sampled; a tree."""
    chain, (least, most) = "PPOW fast, chain", system(name, "PPOW fast, chain")["tokens_per_second_range"]
    whole = f"{speed(name, chain):.0f} ({least:.0f} to {most:.0f}) | {1000 / cycles(name, chain):.2f} ms"
    others = f"{speed(name, f'{chain}, sampled'):.0f} | {speed(name, 'PPOW fast, tree'):.0f}"
    return f"{whole} | {cycle(name, 'draft'):.2f} ms | {others}"


def sampled_ways(name: str) -> str:
    """Cells: tokens per second greedily, with torch's draws, with kernels for them, and so with top_p."""
    ways = "", ", sampled, torch's draws", ", sampled", ", sampled, top_p 0.9"
    return " | ".join(f"{speed(name, f'PPOW fast, chain{way}'):.0f}" for way in ways)


def shorter(name: str) -> float:
    """Acceptance length when sampled over that of greedy chains, both simulated."""
    found = [system(name, f"PPOW fast, chain{way}")["acceptance_length"] for way in (", sampled", "")]
    return found[0] / found[1]


def both(name: str, wanted: str) -> list[dict]:
    """The figures of a system for each of two drafters."""
    return [row for row in summary(f"decoding-{name}")["systems"] if row["name"] == wanted]


def against(name: str, wanted: str) -> str:
    """Cells: tokens per second and acceptance length of both, and the second's speed over the first's."""
    first, second = both(name, wanted)
    cells = [f"{row['tokens_per_second']:,.0f} | {row['acceptance_length']:.2f}" for row in (first, second)]
    return " | ".join([*cells, f"{second['tokens_per_second'] / first['tokens_per_second']:.2f}"])


def estimator(verification: str, name: str) -> dict:
    return summary(f"gradients-{verification}")["estimators"][name]


def timed(found: dict, unit: str) -> str:
    """Cells: 994 rollouts | 0.0644 (0.0643 to 0.0661)."""
    least, most = found["seconds_range"]
    return f"{found[f'{unit}_per_second']:.0f} {unit} | {found['seconds']:.4f} ({least:.4f} to {most:.4f})"


def verified(way: str) -> str:
    return timed(summary(ROLLOUTS)["verification"][way], "rollouts")


def stepped(step: str, unit: str) -> str:
    return timed(summary(ROLLOUTS)["steps"][step], unit)


def peak(step: str, which: str = "peak_memory_gib") -> float:
    return summary(ANSWERS)["steps"][step][which]


def scaled(name: str, run: int) -> str:
    """Cells: processes, rollouts per second, over one process, seconds of a step (quartiles)."""
    found = summary(f"scaling-{name}")["runs"][run]
    low, _, high = found["seconds_per_step_quartiles"]
    cells = [f"{found['processes']}", f"{found['rollouts_per_second']:.0f}", f"{found['speedup']:.2f}"]
    return " | ".join([*cells, f"{found['seconds_per_step']:.3f} ({low:.3f} to {high:.3f})"])


def product(part: str, way: str) -> float:
    return summary("products-llama-3.1-8b-h100")["milliseconds"][part][way]


def accepts(name: str, which: str, arm: str = "stage1") -> str:
    """Cells: acceptance length on GSM8K, HumanEval and MT-Bench, of a drafter that was measured alone or of an arm."""
    found = summary(name)["domains"]
    return " | ".join(f"{found[f'{domain} {which}'][arm]:.2f}" for domain in ("gsm8k", "humaneval", "mt_bench"))


def of_the_bundled(domain: str) -> float:
    """The acceptance length of the drafter that was trained without data over the bundled one's, in percent."""
    ours, theirs = (summary(f"smollm2-own-prompts{name}")["domains"][domain]["stage1"] for name in ("", "-bundled"))
    return 100 * ours / theirs


def four_rows(name: str) -> float:
    """Time of the products of four rows, in the faster order, over that of the library's of one."""
    found = summary(name)["milliseconds"]
    return found["verification of 4 nodes"]["kernel where it is faster"] / found["verification of 1 nodes"]["library"]


def rule(name: str, part: int, system: str) -> dict:
    """Of a summary of `benchmarks.stopping`: the figures of a rule that ends windows."""
    (row,) = (s for s in summary(name)["parts"][part]["systems"] if s["name"] == system)
    return row


def stopping(part: int, system: str, more: str = "") -> dict:
    """Of the demo's pair on a CPU: 0 GSM8K, 1 HumanEval, 2 MT-Bench; at temperature 1 with "-sampled"."""
    return rule("stopping-smollm2-epyc" + more, part, system)


def by_domain(system: str, between: str = " | ", which: str = "speedup", unit: str = "x", more: str = "") -> str:
    """Cells: a figure of such a rule in each domain."""
    return between.join(f"{stopping(part, system, more)[which]:.2f}{unit}" for part in range(3))


def over_the_best(system: str, fixed: tuple = (1, 2, 3, 10), more: str = "") -> float:
    """Percent that a rule gains over the fixed length that is best in a domain, mean over the domains."""
    best = [max(stopping(part, f"window {k}", more)["speedup"] for k in fixed) for part in range(3)]
    return 100 * statistics.fmean(stopping(part, system, more)["speedup"] / best[part] - 1 for part in range(3))


def against_gammatune(part: int) -> float:
    """Percent that GammaTune+ gains over GammaTune there, at temperature 1."""
    return 100 * (
        stopping(part, "gammatune+", "-sampled")["speedup"] / stopping(part, "gammatune", "-sampled")["speedup"] - 1
    )


def sped(name: str, which: str) -> float:
    """Speedup in a record of `ppow evaluate`."""
    return summary(name)["results"][which]["speedup"]


def few(threads: int, nodes: int, way: str) -> str:
    """Milliseconds of a verification's products on a CPU."""
    found = summary(f"products-smollm2-135m-cpu-{threads}")["milliseconds"]
    return f"{found[f'verification of {nodes} nodes'][way]:.1f}"


def heldout(name: str, step: int) -> float:
    return summary(name)["heldout_acceptance_length"][str(step)]


# -- pages and their figures -------------------------------------------------------------------------------------------


def table() -> dict[str, list[str]]:
    """Page -> the lines of figures.txt below its name."""
    pages, lines = {}, []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            lines = pages.setdefault(line.removeprefix("== "), [])
        elif line and not line.startswith("# "):
            lines.append(line)
    return pages


def rendered(line: str) -> list[tuple[str, str | None]]:
    """A line as (text before, figure of today); the last figure may be None."""
    found = []
    for literal, expression, form, _ in string.Formatter().parse(line):
        value = None if expression is None else format(eval(expression, globals()), form)
        found.append((literal, value))
    return found


def pattern(parts: list) -> re.Pattern:
    """Finds a line in its page: any whitespace for a space, and any numbers, as groups, for those of a figure."""
    text = ""
    for literal, value in parts:
        text += spaced(literal)
        if value is not None:
            text += rf"({NUMBER})(?!\.?\d)".join(map(spaced, re.split(NUMBER, value)))
    whole = r"(?!\w)" if parts[-1][1] is None else ""  # a unit may follow a figure at once
    return re.compile(rf"(?<![\w.,]){text}{whole}")


def spaced(literal: str) -> str:
    return r"\s+".join(map(re.escape, re.split(r"\s+", literal)))


def fill(page: str, lines: list[str]) -> tuple[str, list[str]]:
    """-> the page with the figures of today, and what is wrong with it: lines not found, figures not looked up."""
    faults, places, covered = [], [], []
    for line in lines:
        parts = rendered(line)
        found = list(pattern(parts).finditer(page))
        today = [number for _, value in parts if value is not None for number in re.findall(NUMBER, value)]
        if not found or (today and len(found) > 1):
            faults.append(f"found {len(found)} times: {line}")
        for match in found:
            places += [(match.span(1 + i), number) for i, number in enumerate(today)]
            covered += [match.span(1 + i) for i in range(len(today))] or [match.span()]
    hidden = [match.span() for match in NO_FIGURES.finditer(page)]
    for match in FIGURE.finditer(page):
        first, last = match.span(match.lastindex)  # of the number alone
        if not any(start <= first and last <= end for start, end in covered + hidden):
            around = page[max(0, match.start() - 30) : match.end() + 30]
            faults.append(f"looked up nowhere: {match[0]!r} in {' '.join(around.split())!r}")
    for (start, end), number in sorted(places, reverse=True):
        page = page[:start] + number + page[end:]
    return page, faults


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the figures of today in their places")
    arguments = parser.parse_args(argv)
    wrong = False
    for name, lines in table().items():
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after, faults = fill(before, lines)
        for fault in faults:
            print(f"{name}: {fault}")
        if after != before and not arguments.write:
            print(f"{name}: has other figures than the summaries; --write puts them in")
        elif after != before:
            path.write_text(after, encoding="utf-8")
        wrong |= bool(faults) or (after != before and not arguments.write)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
