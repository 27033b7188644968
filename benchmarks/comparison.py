"""What the comparison of objectives says: pooled figures with intervals, a table and a plot.

Acceptance length = tokens gained / verifications, pooled, bonus included. Intervals are 95% percentile bootstrap over
prompts, of the difference to the best ``cst`` arm on the same texts. Texts that end in an exact loop are counted, and
the others are reported apart.

    python -m benchmarks.comparison benchmarks/results/objectives-large-160s.json --control lk

compares the arms of a report with another of them.
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
    controls = [name for name in lengths if name.startswith("cst")]
    control = max(controls, key=lengths.get) if controls else None
    found = {name: {"acceptance_length": length} for name, length in lengths.items()}
    if control is not None:
        for name, (difference, low, high) in differences(tokens, counts, control, resamples).items():
            found[name] |= {"over_cst": difference, "over_cst_95": [low, high]}
    return {"control": control, "prompts": len(tokens), "arms": found}


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
    summary["seeds"] = {
        key: {
            f"T={t}": float(tokens.sum() / values[key].sum())
            for t, (tokens, values) in ((t, pooled(report, f"T={t}", seeds=True)) for t in (0, 1))
        }
        for key in report["arms"]
    }
    return summary


def table(report: dict) -> str:
    """The summary in Markdown: acceptance length, and the difference to the best CST with its interval."""
    parts = {name: part for name, part in report["summary"].items() if "arms" in part}
    lines = ["| arm | steps | " + " | ".join(parts) + " |", "|---" * (len(parts) + 2) + "|"]
    steps = {key.rpartition("/")[0]: row.get("steps", 0) for key, row in report["arms"].items()}
    for name in steps:
        cells = []
        for part in parts.values():
            row = part["arms"][name]
            cell = f"{row['acceptance_length']:.3f}"
            if "over_cst" in row:
                low, high = row["over_cst_95"]
                cell += f" {row['over_cst']:+.3f} [{low:+.3f}, {high:+.3f}]"
            cells.append(cell)
        lines.append(f"| {name} | {steps[name]} | " + " | ".join(cells) + " |")
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


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="what benchmarks/objectives.py wrote")
    parser.add_argument("--control", required=True, help="the arm to compare the others with")
    parser.add_argument("--bootstrap", type=int, default=2000)
    arguments = parser.parse_args(argv)
    report = json.loads(arguments.report.read_text())
    parts = {f"T={temperature}": pooled(report, f"T={temperature}") for temperature in (0, 1)}
    arms = list(parts["T=0"][1])
    if arguments.control not in arms:
        parser.error(f"{arguments.report} has no arm {arguments.control!r}; it has {', '.join(arms)}")
    found = {name: differences(*part, arguments.control, arguments.bootstrap) for name, part in parts.items()}
    print(f"| over {arguments.control} | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
    for arm in arms:
        cells = ("{:+.3f} [{:+.3f}, {:+.3f}]".format(*rows[arm]) for rows in found.values())
        print(f"| {arm} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
