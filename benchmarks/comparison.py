"""What the comparison of objectives says: pooled figures with intervals, tables and a picture.

Acceptance length = tokens gained / verifications, pooled, bonus included. Intervals are 95% percentile bootstrap over
prompts, of the difference between two arms on the same texts. Texts that end in an exact loop are counted, and the
others are reported apart.

    python -m benchmarks.comparison benchmarks/results/objectives-large-averaged.json --control "lk averaged"

compares the arms of a summary with another of them; with ``--plot``, several make one picture of their gains.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy

RESAMPLES = 2000

# -- of a raw report ---------------------------------------------------------------------------------------------------


def figures(report: dict) -> dict:
    """What a raw report of benchmarks.objectives amounts to.

    Pooled over domains, for both temperatures, for all texts and those that do not loop, and for trees: the acceptance
    length of every arm, and the difference of every arm to each one named before it, as [difference, low, high].
    """
    resamples = report.get("bootstrap", RESAMPLES)
    parts = {}
    for temperature in (0, 1):
        for straight in (False, True):
            found = pooled(report, f"T={temperature}", straight)
            if len(found[0]):
                parts[f"T={temperature}" + (", not looping" if straight else "")] = compared(*found, resamples)
    if report["settings"]["tree_prompts"]:
        for tree in (f"tree {nodes}" for nodes in report["settings"]["tree_nodes"].split(",")):
            parts[f"{tree}, T=0"] = compared(*tree_pooled(report, tree), resamples)
    domains = [name for name, text in report["texts"].items() if text["tokens"]]
    return {
        "arms": arms(report),
        "parts": parts,
        "seeds": {part: seed_lengths(report, part) for part in ("T=0", "T=1")},
        "domains": {name: lengths(*pooled(report, name)) for name in domains},
        "looping": {name: float(numpy.mean(text["loops"])) for name, text in report["texts"].items()},
    }


def arms(report: dict) -> dict:
    """arm -> what it changes in the recipe, and of its seeds how many there are, and the least and most steps."""
    rows = {}
    for key, row in report["arms"].items():
        rows.setdefault(key.rpartition("/")[0], []).append(row)
    found = {}
    for name, seeds in rows.items():
        taken = [row.get("steps", 0) for row in seeds]
        found[name] = {"changes": seeds[0].get("changes"), "seeds": len(seeds), "steps": [min(taken), max(taken)]}
    return found


def pooled(report: dict, ending: str, straight: bool = False, seeds: bool = False) -> tuple[numpy.ndarray, dict]:
    """Tokens (n,) of all texts whose name ends so, and their verifications (n,) per arm, mean over its seeds.

    ``straight``: only texts that do not loop; ``seeds``: every seed for itself.
    """
    names = [name for name in report["texts"] if name.endswith(ending)]
    tokens = numpy.concatenate([report["texts"][name]["tokens"] for name in names])
    keep = numpy.ones(len(tokens), dtype=bool)
    if straight:
        keep = ~numpy.concatenate([report["texts"][name]["loops"] for name in names]).astype(bool)
    counts = {}
    for key, row in report["arms"].items():
        values = numpy.concatenate([row["results"][name]["chain"] for name in names])
        counts.setdefault(key if seeds else key.rpartition("/")[0], []).append(values[keep])
    return tokens[keep], {name: numpy.mean(values, 0) for name, values in counts.items()}


def tree_pooled(report: dict, tree: str) -> tuple[numpy.ndarray, dict]:
    """The same for a tree, first seeds only, on the texts that were decoded with one."""
    size = report["settings"]["tree_prompts"]
    names = [name for name in report["texts"] if name.endswith("T=0")]
    tokens = numpy.concatenate([report["texts"][name]["tokens"][:size] for name in names])
    counts = {}
    for key, row in report["arms"].items():
        if key.endswith("/0"):
            counts[key[:-2]] = numpy.concatenate([row["results"][name][tree] for name in names])
    return tokens, counts


def lengths(tokens: numpy.ndarray, counts: dict) -> dict:
    return {name: float(tokens.sum() / values.sum()) for name, values in counts.items()}


def seed_lengths(report: dict, ending: str) -> dict:
    """arm -> the acceptance length of each of its seeds."""
    found = {}
    for key, length in lengths(*pooled(report, ending, seeds=True)).items():
        found.setdefault(key.rpartition("/")[0], []).append(length)
    return found


def compared(tokens: numpy.ndarray, counts: dict, resamples: int, seed: int = 0) -> dict:
    """Acceptance length of every arm; arm -> every later arm's difference to it, paired by prompt, and 95% interval."""
    draws = numpy.random.default_rng(seed).integers(0, len(tokens), (resamples, len(tokens)))
    weights = numpy.stack([numpy.bincount(row, minlength=len(tokens)) for row in draws])  # (resamples, n)
    resampled = {name: (weights @ tokens) / (weights @ values) for name, values in counts.items()}
    whole, differences = lengths(tokens, counts), {name: {} for name in list(counts)[:-1]}
    for control, name in itertools.combinations(counts, 2):
        low, high = numpy.percentile(resampled[name] - resampled[control], [2.5, 97.5])
        differences[control][name] = [whole[name] - whole[control], float(low), float(high)]
    return {"prompts": len(tokens), "lengths": whole, "differences": differences}


# -- of a summary ------------------------------------------------------------------------------------------------------


def best_cst(part: dict) -> str | None:
    """The arm of continued supervised training with the longest acceptance; None when there is no such arm."""
    lengths = part["lengths"]
    return max((name for name in lengths if name.startswith("cst")), key=lengths.get, default=None)


def gain(part: dict, arm: str, control: str) -> tuple[float, float, float]:
    """Difference of an arm's acceptance length to a control's, and its 95% interval."""
    if arm == control:
        return 0.0, 0.0, 0.0
    differences = part["differences"]
    if arm in differences.get(control, ()):
        return tuple(differences[control][arm])
    difference, low, high = differences[arm][control]
    return -difference, -high, -low


def shown(values: tuple[float, float, float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)


def table(summary: dict) -> str:
    """The summary in Markdown: acceptance length, and the difference to the best CST of the part with its interval."""
    parts = summary["parts"]
    lines = ["| arm | steps | " + " | ".join(parts) + " |", "|---" * (len(parts) + 2) + "|"]
    for name, arm in summary["arms"].items():
        cells = []
        for part in parts.values():
            if name not in part["lengths"]:
                cells.append("")  # trees are of the first seed only
                continue
            control = best_cst(part)
            cells.append(f"{part['lengths'][name]:.3f}" + (f" {shown(gain(part, name, control))}" if control else ""))
        lines.append(f"| {name} | {steps(arm)} | " + " | ".join(cells) + " |")
    loops = ", ".join(f"{name} {share:.0%}" for name, share in summary["looping"].items())
    return "\n".join([*lines, "", f"looping texts: {loops}"])


def steps(arm: dict) -> str:
    least, most = arm["steps"]
    return f"{least}" if least == most else f"{least} to {most}"


def over(summary: dict, control: str | None, wanted: list[str]) -> dict:
    """Gains over an arm, by default the best CST: {"T=0": {control, length, gains by arm}, "T=1": ..}.

    Empty for a summary that has none of these arms or not the control.
    """
    found = {}
    for name in ("T=0", "T=1"):
        part = summary["parts"][name]
        chosen = control or best_cst(part)
        gains = {arm: gain(part, arm, chosen) for arm in wanted if arm in part["lengths"] and chosen in part["lengths"]}
        if not gains:
            return {}
        found[name] = {"control": chosen, "length": part["lengths"][chosen], "gains": gains}
    return found


def show(name: str, parts: dict) -> None:
    print(f"| {name} | " + " | ".join(f"{part}, over {found['control']}" for part, found in parts.items()) + " |")
    print("|---" * 3 + "|")
    for arm in parts["T=0"]["gains"]:
        print(f"| {arm} | " + " | ".join(shown(found["gains"][arm]) for found in parts.values()) + " |")
    print()


def overview(found: dict[str, dict], arms: list[str], path: Path) -> None:
    """One picture of several summaries: gains in percent of the control's acceptance length, with intervals.

    Args:
        found: name of a summary -> "T=0" and "T=1" -> arm -> (gain, low, high) in percent.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in arms if any(arm in parts["T=0"] for parts in found.values())]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 1.5 + 0.7 * len(found)), sharey=True, layout="constrained")
    for axis, part in zip(axes, ("T=0", "T=1")):
        for i, arm in enumerate(arms):
            rows = [(y, parts[part][arm]) for y, parts in enumerate(found.values()) if arm in parts[part]]
            heights = [y + 0.7 * ((i + 0.5) / len(arms) - 0.5) for y, _ in rows]
            gains = [gain for _, (gain, _, _) in rows]
            spread = [[gain - low for _, (gain, low, _) in rows], [high - gain for _, (gain, _, high) in rows]]
            mark = "os^D"[i // 10 % 4]  # there are ten colours
            axis.errorbar(gains, heights, xerr=spread, fmt=mark, markersize=4, label=arm)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set(title=f"chain, {part}", xlabel="acceptance length over the control, %")
        axis.set_yticks(range(len(found)), list(found))
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("summaries", type=Path, nargs="+", help="what benchmarks/objectives.py wrote")
    parser.add_argument("--control", help="the arm to compare the others with; none: the best CST of each column")
    parser.add_argument("--arms", help="comma separated names of the arms to show; none: all")
    parser.add_argument("--plot", type=Path, help="draw the gains of all summaries into this file")
    arguments = parser.parse_args(argv)
    summaries = {path.stem: json.loads(path.read_text()) for path in arguments.summaries}
    if len(summaries) < len(arguments.summaries):
        parser.error("two summaries have one name; a name stands for a summary in the picture")
    known = {name: None for summary in summaries.values() for name in summary["arms"]}
    wanted = arguments.arms.split(",") if arguments.arms else list(known)
    unknown = {*wanted, *([arguments.control] if arguments.control else [])} - set(known)
    if unknown:
        parser.error(f"no summary has an arm {sorted(unknown)[0]!r}; they have {', '.join(known)}")
    drawn = {}
    for name, summary in summaries.items():
        parts = over(summary, arguments.control, wanted)
        if not parts:
            print(f"{name}: left out, it has none of these arms or not the control\n")
            continue
        show(name, parts)
        drawn[name.removeprefix("objectives-")] = {
            part: {arm: [100 * value / found["length"] for value in row] for arm, row in found["gains"].items()}
            for part, found in parts.items()
        }
    if arguments.plot:
        overview(drawn, wanted, arguments.plot)


if __name__ == "__main__":
    main()
