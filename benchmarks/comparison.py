"""What the comparison of objectives says: pooled figures with intervals, a table and a plot.

Acceptance length = tokens gained / verifications, pooled, bonus included. Intervals are 95% percentile bootstrap over
prompts, of the difference to the best ``cst`` arm on the same texts. Texts that end in an exact loop are counted, and
the others are reported apart.

    python -m benchmarks.comparison benchmarks/results/objectives-large-160s.json --control lk

compares the arms of a report with another of them; with ``--plot``, several reports make one picture of their gains.
"""

import argparse
import json
from pathlib import Path

import numpy


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


def compared(tokens: numpy.ndarray, counts: dict, resamples: int) -> dict:
    """Acceptance length of every arm, and the paired difference to the best CST arm with its 95% interval."""
    lengths = {name: float(tokens.sum() / values.sum()) for name, values in counts.items()}
    control = best_cst(counts)
    found = {name: {"acceptance_length": length} for name, length in lengths.items()}
    if control is not None:
        for name, (difference, low, high) in differences(tokens, counts, control, resamples).items():
            found[name] |= {"over_cst": difference, "over_cst_95": [low, high]}
    return {"control": control, "prompts": len(tokens), "arms": found}


def best_cst(counts: dict) -> str | None:
    """The arm of continued supervised training with the fewest verifications; None when there is no such arm."""
    return min((name for name in counts if name.startswith("cst")), key=lambda name: counts[name].sum(), default=None)


def differences(tokens: numpy.ndarray, counts: dict, control: str, resamples: int, seed: int = 0) -> dict:
    """name -> difference of every arm's acceptance length to the control's, paired by prompt, and its 95% interval."""
    draws = numpy.random.default_rng(seed).integers(0, len(tokens), (resamples, len(tokens)))
    weights = numpy.stack([numpy.bincount(row, minlength=len(tokens)) for row in draws])  # (resamples, n)
    resampled = {name: (weights @ tokens) / (weights @ values) for name, values in counts.items()}
    found = {}
    for name, values in counts.items():
        low, high = numpy.percentile(resampled[name] - resampled[control], [2.5, 97.5])
        difference = tokens.sum() / values.sum() - tokens.sum() / counts[control].sum()
        found[name] = (float(difference), float(low), float(high))
    return found


def summarize(report: dict, resamples: int) -> dict:
    """Pooled over domains: at both temperatures, all texts and those that do not loop; trees; and per seed."""
    summary = {}
    for temperature in (0, 1):
        for straight in (False, True):
            tokens, counts = pooled(report, f"T={temperature}", straight)
            if len(tokens):
                title = f"T={temperature}" + (", not looping" if straight else "")
                summary[title] = compared(tokens, counts, resamples)
    if report["settings"]["tree_prompts"]:
        for tree in (f"tree {nodes}" for nodes in report["settings"]["tree_nodes"].split(",")):
            summary[f"{tree}, T=0"] = compared(*tree_pooled(report, tree), resamples)
    summary["by domain"] = {
        name: compared(*pooled(report, name), resamples) for name in report["texts"] if report["texts"][name]["tokens"]
    }
    summary["loops"] = {name: float(numpy.mean(text["loops"])) for name, text in report["texts"].items()}
    summary["seeds"] = {key: {} for key in report["arms"]}
    for temperature in (0, 1):
        tokens, counts = pooled(report, f"T={temperature}", seeds=True)
        for key, values in counts.items():
            summary["seeds"][key][f"T={temperature}"] = float(tokens.sum() / values.sum())
    return summary


def table(report: dict) -> str:
    """The summary in Markdown: acceptance length, and the difference to the best CST with its interval."""
    parts = {name: part for name, part in report["summary"].items() if "arms" in part}
    lines = ["| arm | steps | " + " | ".join(parts) + " |", "|---" * (len(parts) + 2) + "|"]
    steps = {}
    for key, row in report["arms"].items():
        steps.setdefault(key.rpartition("/")[0], []).append(row.get("steps", 0))
    for name in steps:
        cells = []
        for part in parts.values():
            row = part["arms"][name]
            cell = f"{row['acceptance_length']:.3f}"
            if "over_cst" in row:
                low, high = row["over_cst_95"]
                cell += f" {row['over_cst']:+.3f} [{low:+.3f}, {high:+.3f}]"
            cells.append(cell)
        least, most = min(steps[name]), max(steps[name])
        taken = f"{least}" if least == most else f"{least} to {most}"
        lines.append(f"| {name} | {taken} | " + " | ".join(cells) + " |")
    loops = ", ".join(f"{name} {share:.0%}" for name, share in report["summary"]["loops"].items())
    return "\n".join([*lines, "", f"looping texts: {loops}"])


def plot(report: dict, path: Path) -> None:
    """Differences to CST with intervals, and training curves; without matplotlib, nothing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [name for name in ("T=0", "T=1") if report["summary"].get(name, {}).get("control")]
    # along texts first, where every objective has the same figure; rollouts have only their own
    curves = (("reward",), ("greedy_acceptance_length", "acceptance_length"), ("text_kl", "kl"))
    wide = len(parts) + len(curves)
    figure, axes = pyplot.subplots(1, wide, figsize=(5 * wide, 6), layout="constrained")
    for axis, part in zip(axes, parts):
        arms = report["summary"][part]["arms"]
        for y, row in enumerate(arms.values()):
            axis.plot(row["over_cst_95"], [y, y], color="tab:blue")
            axis.plot(row["over_cst"], y, "o", color="tab:blue")
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.invert_yaxis()
        axis.set(title=f"chain, {part}", xlabel=f"acceptance length over {report['summary'][part]['control']}")
    for axis, figures in zip(axes[len(parts) :], curves):
        switches = [
            point["seconds"]
            for row in report["arms"].values()
            for point in row.get("curve", ())
            if point.get("adaptive")
        ]
        if switches:
            axis.axvline(min(switches), color="gray", linestyle=":", label="windows by criticality from here")
        for key, row in report["arms"].items():
            name = next((f for f in figures if f in (row.get("curve") or [{}])[-1]), None)
            if name and key.endswith("/0"):
                points = [(point["seconds"], point[name]) for point in row["curve"] if name in point]
                axis.plot(*zip(*points), label=key[:-2], linewidth=0.8)
        axis.set(title=figures[0].replace("_", " "), xlabel="seconds of training")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def overview(found: dict[str, dict], arms: list[str], path: Path) -> None:
    """One picture of several reports: gains in percent of the control's acceptance length, with intervals.

    Args:
        found: name of a report -> "T=0" and "T=1" -> arm -> (gain, low, high) in percent.
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


def over(report: dict, control: str | None, wanted: list[str], resamples: int) -> dict:
    """Gains over an arm, by default the best CST: {"T=0": {control, length, gains by arm}, "T=1": ..}.

    Empty for a report that has none of these arms or not the control.
    """
    found = {}
    for part in ("T=0", "T=1"):
        tokens, counts = pooled(report, part)
        chosen = control or best_cst(counts)
        shown = [arm for arm in wanted if arm in counts]
        if not shown or chosen not in counts:
            return {}
        gains = differences(tokens, counts, chosen, resamples)
        length = tokens.sum() / counts[chosen].sum()
        found[part] = {"control": chosen, "length": length, "gains": {arm: gains[arm] for arm in shown}}
    return found


def show(name: str, parts: dict) -> None:
    print(f"| {name} | " + " | ".join(f"{part}, over {found['control']}" for part, found in parts.items()) + " |")
    print("|---" * 3 + "|")
    for arm in parts["T=0"]["gains"]:
        cells = ("{:+.3f} [{:+.3f}, {:+.3f}]".format(*found["gains"][arm]) for found in parts.values())
        print(f"| {arm} | " + " | ".join(cells) + " |")
    print()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", help="what benchmarks/objectives.py wrote")
    parser.add_argument("--control", help="the arm to compare the others with; none: the best CST of each column")
    parser.add_argument("--arms", help="comma separated names of the arms to show; none: all")
    parser.add_argument("--plot", type=Path, help="draw the gains of all reports into this file")
    parser.add_argument("--bootstrap", type=int, default=2000)
    arguments = parser.parse_args(argv)
    reports = {path.stem: json.loads(path.read_text()) for path in arguments.reports}
    if len(reports) < len(arguments.reports):
        parser.error("two reports have one name; a name stands for a report in the picture")
    known = {key.rpartition("/")[0]: None for report in reports.values() for key in report["arms"]}
    wanted = arguments.arms.split(",") if arguments.arms else list(known)
    unknown = {*wanted, *([arguments.control] if arguments.control else [])} - set(known)
    if unknown:
        parser.error(f"no report has an arm {sorted(unknown)[0]!r}; they have {', '.join(known)}")
    drawn = {}
    for name, report in reports.items():
        parts = over(report, arguments.control, wanted, arguments.bootstrap)
        if not parts:
            print(f"{name}: left out, it has none of these arms or not the control\n")
            continue
        show(name, parts)
        drawn[name.removeprefix("objectives-")] = {
            part: {arm: [100 * gain / found["length"] for gain in gains] for arm, gains in found["gains"].items()}
            for part, found in parts.items()
        }
    if arguments.plot:
        overview(drawn, wanted, arguments.plot)


if __name__ == "__main__":
    main()
