"""Whether ``ppow doctor`` names what is wrong: a real pair, its drafter damaged on purpose, one fault at a time.

    python -m benchmarks.diagnoses    (benchmarks/results/diagnoses.json, and the table of docs/doctor.md)

Without names it takes SmolLM2-135M-Instruct and the drafter in bundled/. Every damaged drafter is written to a folder,
the good one's records beside it, and examined as by the command, on a GPU where there is one. What must hold: the first
finding is the fault that was planted, and healthy drafters have none. tests/training/test_doctor.py plants the same
faults in a smaller pair, and tries what doctor says fixes them.

A call that was cut off goes on: rows of the summary that came of the same settings, commit, versions and machine stay,
and `--only` adds a few at a time. Delete the summary to begin anew.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ppow import PPOWConfig, PPOWDrafter
from ppow.training import cli, doctor, provenance
from ppow.training.config import DoctorConfig
from ppow.training.loading import is_gguf
from ppow.training.smollm2 import save_plain

from .pairs import add_pair, parse_with_pair
from .report import add_output, facts, ran_on, rounded, write

ROOT = Path(__file__).resolve().parents[1]
PAGE, SUMMARY = ROOT / "docs" / "doctor.md", ROOT / "benchmarks" / "results" / "diagnoses.json"
START, END = "<!-- written by python -m benchmarks.diagnoses -->\n", "<!-- diagnoses end -->"
EXPORTED = "exported to vLLM's format and read again"
HEALTHY = {"as it is": {}, "in bfloat16": {"dtype": "bfloat16"}, EXPORTED: {}}


def shuffled(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def choose_tokens(drafter: PPOWDrafter, ids: torch.Tensor) -> None:
    """Name the draft vocabulary anew, by ascending target ids (D,)."""
    member = torch.zeros(drafter.config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    drafter.set_draft_vocabulary(ids - torch.arange(len(ids)), member)


def move_taps(drafter: PPOWDrafter, step: int) -> None:
    drafter.config.target_taps = [tap + step for tap in drafter.config.target_taps]


def switch(drafter: PPOWDrafter, field: str) -> None:
    setattr(drafter.config, field, not getattr(drafter.config, field))


def set_d2t(drafter: PPOWDrafter, values: torch.Tensor) -> None:
    drafter.d2t.copy_(values)


def permute_d2t(drafter: PPOWDrafter) -> None:
    ids = drafter.draft_columns()
    set_d2t(drafter, ids[shuffled(len(ids))] - torch.arange(len(ids)))


def take_other_tokens(drafter: PPOWDrafter) -> None:
    """A draft vocabulary like the right one in everything that can be read off it."""
    config = drafter.config
    choose_tokens(drafter, shuffled(config.vocab_size)[: config.draft_vocab_size].sort().values)


def leave_out_common_tokens(drafter: PPOWDrafter) -> PPOWDrafter:
    """Without the seventh of the draft vocabulary that has the lowest ids."""
    size, tensors = drafter.config.draft_vocab_size, drafter.state_dict()
    less = size // 7
    small = PPOWDrafter(PPOWConfig.from_dict({**drafter.config.to_dict(), "draft_vocab_size": size - less}))
    tensors["lm_head.weight"] = tensors["lm_head.weight"][less:]
    small.load_state_dict({name: t for name, t in tensors.items() if name not in ("d2t", "t2d")}, strict=False)
    choose_tokens(small, drafter.draft_columns()[less:])
    return small


@torch.no_grad()
def lift_logits(drafter: PPOWDrafter) -> None:
    """By the same for all tokens: nothing changes in float32, and bfloat16 rounds what tells them apart away."""
    drafter.lm_head.weight += 300


def forget(drafter: PPOWDrafter) -> None:
    for parameter in drafter.layers.parameters():
        nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))


class Damage(NamedTuple):
    """What is done to a drafter.

    Attributes:
        change: does it, or returns another drafter.
        fault: what doctor is to say first, to be filled with the good drafter's ``config``.
    """

    change: Callable[[PPOWDrafter], PPOWDrafter | None]
    fault: str


def setting(field: str, value: int) -> Callable[[PPOWDrafter], None]:
    return lambda drafter: setattr(drafter.config, field, value)


DAMAGES = {
    "taps one layer too early": Damage(lambda drafter: move_taps(drafter, -1), "taps one layer later"),
    "taps one layer too late": Damage(lambda drafter: move_taps(drafter, 1), "taps one layer earlier"),
    "`norm_output` switched": Damage(lambda d: switch(d, "norm_output"), "norm_output {config.norm_output}"),
    "`norm_before_residual` switched": Damage(
        lambda d: switch(d, "norm_before_residual"), "norm_before_residual {config.norm_before_residual}"
    ),
    "d2t permuted": Damage(permute_d2t, "draft vocabulary in order"),
    "absolute ids in d2t": Damage(lambda d: set_d2t(d, d.draft_columns()), "draft vocabulary"),
    "d2t rounded to bfloat16": Damage(lambda d: set_d2t(d, d.d2t.bfloat16()), "draft vocabulary"),
    "d2t and t2d of another run": Damage(take_other_tokens, "draft vocabulary of another run"),
    "the commonest tokens left out": Damage(leave_out_common_tokens, "coverage of the draft vocabulary"),
    "logits too large for bfloat16": Damage(lift_logits, "bfloat16"),
    "512 positions": Damage(setting("max_position_embeddings", 512), "positions"),
    "another end-of-text token": Damage(setting("eos_token_id", 0), "special tokens"),
    "made for a deeper target": Damage(setting("target_num_layers", 99), "another target"),
    "an untrained layer": Damage(forget, "low acceptance"),
}


def main(argv=None) -> dict:
    arguments = parse(argv)
    names = chosen(arguments.only)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    output = arguments.output or SUMMARY
    report = opened(rounded(provenance.scrub(facts("diagnoses", arguments, argv, without=("output", "only")))), output)
    with tempfile.TemporaryDirectory() as work:
        if is_gguf(arguments.target):  # which takes longer to read than to examine
            save_plain(arguments.target, Path(work) / "target")
            arguments.target = str(Path(work) / "target")
        known = {row["drafter"]: row for row in report["rows"]}
        for name in names:
            if name not in known:
                with tempfile.TemporaryDirectory() as folder:
                    known[name] = rounded(examine(name, arguments, Path(folder)))
                report["rows"] = [known[each] for each in (*DAMAGES, *HEALTHY) if each in known]
                write(report, output)  # what is done stays, whatever becomes of the others
            print(line(known[name]), flush=True)
    if arguments.output is None:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.partition(START)[0], page.partition(END)[2]
        PAGE.write_text(before + START + table(report) + END + after, encoding="utf-8")
    return report


def opened(report: dict, output: Path) -> dict:
    """The report to go on with: with the rows of the one in ``output``, if that was made in the same way."""
    before = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    ways = [
        {name: made.get(name) for name in ("settings", "versions", "hardware")}
        | {"commit": (made.get("git") or {}).get("commit")}
        for made in (report, before)
    ]
    return report | {"rows": before["rows"] if ways[0] == ways[1] else []}


def chosen(only: str | None) -> list[str]:
    """Names of drafters that hold one of the parts.

    Raises:
        ValueError: a part that is in none of them.
    """
    names, parts = [*DAMAGES, *HEALTHY], only.split(",") if only else [""]
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"--only: {part!r} is in no drafter's name; there are: {'; '.join(names)}.")
    return [name for name in names if any(part in name for part in parts)]


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair(parser)
    parser.add_argument("--data", help="a file of prompts; none: the demo's")
    parser.add_argument("--limit", type=int, default=8, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, help="of the CPU; none: torch's choice")
    parser.add_argument("--only", help="comma separated parts of names of drafters to examine")
    add_output(parser)
    return parse_with_pair(parser, argv)


def examine(name: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """Plant a fault, or none, and let doctor look. -> a row of the summary."""
    place, planted, options = folder / "drafter", None, HEALTHY.get(name, {})
    begun = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if name == EXPORTED:
            command = ["export", arguments.drafter, "--format", "vllm", "--target", arguments.target]
            if cli.main([*command, "--out", str(place)]):
                raise SystemExit(f"{arguments.drafter} cannot be exported")
        else:
            shutil.copytree(arguments.drafter, place)
        if name in DAMAGES:
            drafter = PPOWDrafter.from_pretrained(place, dtype=torch.float32)
            planted = DAMAGES[name].fault.format(config=drafter.config)
            (DAMAGES[name].change(drafter) or drafter).save_pretrained(place)
        config = DoctorConfig(
            target=arguments.target,
            drafter=str(place),
            data=[arguments.data] if arguments.data else [],
            limit=arguments.limit,
            max_new_tokens=arguments.max_new_tokens,
            **options,
        )
        report = doctor.main(config)
    row = {"drafter": name, "planted": planted, "found": [finding["fault"] for finding in report["findings"]]}
    if report["figures"]:
        row |= {"length": report["figures"]["ways"]["as given"]["length"]}
        row |= {"first_draft": report["figures"]["first_draft"]}
    return row | {"seconds": time.perf_counter() - begun}


def holds(row: dict) -> bool:
    """Whether doctor's first finding is what was planted; of a healthy drafter, whether there is none."""
    return row["found"][:1] == ([row["planted"]] if row["planted"] else [])


def line(row: dict) -> str:
    gained = f"{row['length']:.2f}" if "length" in row else "not run"
    said = "; ".join(row["found"]) or "nothing is wrong"
    wanted = "" if holds(row) else f" (expected: {row['planted'] or 'nothing'})"
    return f"| {row['drafter']} | {gained} | {said}{wanted} |"


def table(report: dict) -> str:
    """The summary as Markdown."""
    damaged, healthy = ([row for row in report["rows"] if bool(row["planted"]) is side] for side in (True, False))
    right = [f"{sum(map(holds, rows))} of {len(rows)}" for rows in (damaged, healthy)]
    settings, seconds = report["settings"], [row["seconds"] for row in report["rows"]]
    return "\n".join(
        [
            "| drafter | tokens a window gains | doctor's findings, the first one first |",
            "|---|---|---|",
            *map(line, report["rows"]),
            "",
            f"The planted fault is named first in {right[0]} damaged drafters, and {right[1]} healthy ones have none: "
            f"{settings['limit']} prompts, answers of {settings['max_new_tokens']} tokens, float32; on "
            f"{ran_on(report)}, {min(seconds):.0f} to {max(seconds):.0f} s each.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(not all(map(holds, main()["rows"])))
