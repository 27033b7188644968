"""What a benchmark leaves behind: a raw report for itself to go on from, and a compact summary for people and pages.

``--output FOLDER/NAME.json`` names the summary; the raw report, with figures of every prompt and repetition, goes to
``FOLDER/raw/NAME.json``, which no repository needs (`.gitignore` has it). A summary says how it was made (command,
commit, settings, seeds, versions, hardware) and what was found: means, intervals, least and most. Its floats have six
significant digits and its lines hold as much as fits. The records of other commands become summaries by

    python -m benchmarks.report demo.json benchmarks/results/demo-cpu.json          # of `ppow demo --output demo.json`
    python -m benchmarks.report runs/stage2/metrics.jsonl benchmarks/results/X.json     # of a stage's run
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from ppow.training import provenance
from ppow.training.files import write_json

HEAD = ("command", "seed", "time_utc", "git", "versions", "hardware")
WIDTH = 118  # of a line of a summary, where its content can be cut


def facts(name: str, arguments, argv: list[str] | None, without=("output",), **more) -> dict:
    """What a report of the benchmark ``name`` opens with.

    Args:
        arguments: the parsed options, ``argv`` what was parsed (None: the command line); without: of those, what
            changes no figure.
        more: settings beside the options. What torch's compiler was told by the environment joins them.
    """
    settings = {key: value for key, value in vars(arguments).items() if key not in without} | more
    told = {name: value for name, value in os.environ.items() if name.startswith("TORCHINDUCTOR_")}
    told.pop("TORCHINDUCTOR_CACHE_DIR", None)  # a place, no setting
    if told:
        settings["environment"] = told
    argv = sys.argv[1:] if argv is None else argv
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *map(provenance.scrub, argv)]),
        "git": provenance.git_revision(Path(provenance.__file__).parent),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "settings": settings,
    }


def ran_on(report: dict) -> str:
    """The machine of a report, as pages name it: its first GPU, or its CPU and the threads that were used."""
    hardware = report["hardware"]
    threads = hardware["torch_threads"]
    return (hardware["gpus"] or [f"{hardware['cpu']}, {threads} thread{'s'[: threads > 1]}"])[0]


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="file of the summary; the raw report goes to raw/ beside it")


def raw_path(output: Path) -> Path:
    return output.parent / "raw" / output.name


def keep(report: dict, output: Path | None) -> None:
    """Write the raw report that belongs to the summary ``output``; None: nothing."""
    if output:
        write_json(raw_path(output), report)


def save(report: dict, output: Path | None) -> dict:
    """Write the raw report and its summary: -> the summary."""
    summary = summarize(report)
    keep(report, output)
    if output:
        write(summary, output)
    return summary


def write(summary: dict, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(compact(summary) + "\n", encoding="utf-8")
    os.replace(partial, output)


def summarize(report: dict) -> dict:
    """A report without what only its own command reads: the same facts, and what was found in few numbers."""
    from . import comparison  # it reads summaries

    found = {key: value for key, value in report.items() if key not in {*HEAD, "argv", "settings", "config"}}
    if "arms" in report:  # of benchmarks.objectives
        found = comparison.figures(report)
    elif "answers" in report:  # of `ppow demo`
        found = race_figures(report["answers"])
    elif "rows" in report:  # of a training stage
        found = course(report["rows"], report["config"]["log_every"])
    head = {key: report[key] for key in HEAD if key in report}
    if "argv" in report:
        head["command"] = " ".join(report["argv"])
    settings = report.get("settings") or report.get("config") or {}
    settings = {key: value for key, value in provenance.scrub(settings).items() if value is not None}
    return rounded({**head, "settings": settings, **ranges(found)})


def race_figures(answers: list[dict]) -> dict:
    speedups = [answer["speedup"] for answer in answers]
    figures = {"median": statistics.median(speedups), "least": min(speedups), "most": max(speedups)}
    identical = sum(answer["identical"] for answer in answers)
    return {"prompts": len(answers), "identical": identical, "speedup": figures}


def course(rows: list[dict], log_every: int) -> dict:
    """How a stage went: step -> acceptance length on held-out texts; seconds of the steps."""
    seconds = log_every * sum(row["seconds"] for row in rows)  # a row has the mean over its steps
    heldout = {row["step"]: row["eval_acceptance_length"] for row in rows if "eval_acceptance_length" in row}
    return {"steps": rows[-1]["step"], "seconds": seconds, "heldout_acceptance_length": heldout}


def ranges(value):
    """``value`` with every list of repetitions, ``X_runs``, as its least and most, ``X_range``."""
    if isinstance(value, list):
        return [ranges(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, item in value.items():
        if isinstance(key, str) and key.endswith("_runs"):
            found[f"{key.removesuffix('_runs')}_range"] = [min(item), max(item)]
        else:
            found[key] = ranges(item)
    return found


def rounded(value):
    """``value`` with every float cut to six significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def compact(value, indent: int = 0) -> str:
    """JSON in few lines: every line holds as many parts as fit; a part that takes several begins on its own."""
    line = json.dumps(value, ensure_ascii=False)
    if indent + len(line) <= WIDTH or not value or not isinstance(value, (dict, list)):
        return line
    if isinstance(value, dict):
        parts = [json.dumps(str(key), ensure_ascii=False) + ": " + compact(v, indent + 1) for key, v in value.items()]
    else:
        parts = [compact(item, indent + 1) for item in value]
    lines = []
    for part in parts:
        room = WIDTH - indent - len(part) - 3
        if lines and "\n" not in part and "\n" not in lines[-1] and len(lines[-1]) <= room:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    space = "\n" + " " * (indent + 1)
    return opening + space + f",{space}".join(lines) + "\n" + " " * indent + closing


def read_raw(path: Path) -> dict:
    """A raw report, or a training stage's metrics.jsonl together with the record beside it."""
    if path.suffix != ".jsonl":
        return json.loads(path.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    record = provenance.read(path.with_name(provenance.FILE))
    record.pop("started_from", None)
    record.pop("earlier", None)
    return {**record, "rows": rows}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="a raw report, or the metrics.jsonl of a training run")
    parser.add_argument("output", type=Path, help="the summary to write")
    arguments = parser.parse_args(argv)
    write(summarize(read_raw(arguments.report)), arguments.output)


if __name__ == "__main__":
    main()
