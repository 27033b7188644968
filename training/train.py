"""The whole road with one command: ``ppow train --target TARGET --output-dir RUN``.

    RUN/train.json              the options, what was decided of them, what is done, and the time it took
    RUN/prompts.jsonl           ppow prompts, or the rows of --data in a random order
    RUN/heldout.jsonl           prompts that nothing is trained on: the last ones that were written, or chosen rows
    RUN/answers.jsonl           ppow regenerate; of the held-out prompts heldout-answers.jsonl
    RUN/mixed-answers.jsonl     for stage 2: some of these answers, and as many sampled ones (ppow regenerate)
    RUN/stage1, RUN/stage2      ppow supervised, ppow reinforce
    RUN/figures                 ppow evaluate, on the held-out prompts
    RUN/drafter                 the repository, as ppow push makes it

Each part is the single command's own ``main`` in this process. What it is to do is decided once, written to train.json
before it is begun, and read from there afterwards; so a run that was killed, wherever that was, ends with the bytes of
one that was not (but for sampled answers of targets that are answered in batches, which depend on each other). With
``--budget`` counts of prompts and steps are decided by timing a few of them, in a folder that is gone afterwards.
"""

import contextlib
import dataclasses
import functools
import gc
import io
import json
import os
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from . import evaluate, own_prompts, plan, push, regenerate, reinforce, supervised
from .config import PushConfig, RegenerateConfig, ReinforceConfig, SupervisedConfig, TrainConfig
from .data import BadRows, Row, encode, load_rows
from .files import LOCK, claim_folder, remove, scratch, whole, write_json
from .fingerprints import fingerprint
from .hub import check_repository_name
from .loading import load_tokenizer, named, place_of
from .metrics import read_metrics
from .openings import openings
from .outlook import between, duration, planned, show
from .preparation import load_examples
from .prompts import from_row
from .recipes import EVALUATIONS, KINDS, Choices, complete, held_out_of, mixed_of, parts_of
from .repository import assemble
from .rows import TEMPLATE_COLUMNS
from .sources import say
from .stopping import Stopped, again, asked
from .supervised import EVAL_WINDOW
from .writers import ROWS

FILE = "train.json"
_FREE = {"output_dir", "resume", "plan", "push_to_hub", "skip_bad_rows"}  # options that change nothing of a drafter
# Under these a part is not cut, whatever the budget says
FEWEST = {"supervised": 50, "reinforce": 20, "evaluate": 4}
_TIMED = 8  # steps of a stage that are timed; the first two warm up
_TIMED_PROMPTS = 2  # of an evaluation, besides an answer that warms up


def main(config: TrainConfig) -> None:
    """Go the road, or on with it; with ``--plan`` only show what it takes.

    Raises:
        ValueError: options, names or data that cannot be right, a folder that holds something else or another run.
        OSError: what cannot be read or written.
        Stopped: after SIGTERM, with everything kept.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "`ppow train` runs in one process. On several GPUs run its parts one by one, as docs/train.md names them, "
            "the stages with `accelerate launch -m ppow.training.cli supervised ...`."
        )
    if config.push_to_hub:
        check_repository_name(config.push_to_hub, "--push-to-hub")
    with named("target", config.target):
        target = AutoConfig.from_pretrained(**place_of(config.target))
    if config.plan is not None:
        show(config, target)
        return
    with claim_folder(config.output_dir):
        Road(config, target).go()


class Road:
    """One run: its folder, and what its train.json says."""

    def __init__(self, config: TrainConfig, target: PreTrainedConfig):
        self.config, self.folder = config, Path(config.output_dir)
        before = self._read()
        with named("target", config.target):
            self.choices = Choices(config, target, plan.this_device(), torch.cuda.is_available())
        self.record = before or self._new()
        self.parts = parts_of(self.record["decided"])
        self._know_target()

    # -- train.json ----------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Any] | None:
        """What an earlier start has left, if it is of this run."""
        path = self.folder / FILE
        if not path.exists():
            other = sorted(entry.name for entry in self.folder.iterdir() if entry.name[0] != ".")
            if other:
                raise ValueError(
                    f"--output-dir {self.folder} holds something else ({', '.join(other[:3])}); give an empty or a "
                    "new folder."
                )
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            before, _, _, spent = (record[key] for key in ("options", "decided", "done", "seconds"))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} was not written by `ppow train`; give another --output-dir.") from None
        made = any(entry.name[0] != "." for entry in self.folder.iterdir() if entry != path)
        if not made and not (self.config.resume and before == self._options()):
            return None  # broken off before there was anything to go on with
        if not self.config.resume:
            raise ValueError(
                f"--output-dir {self.folder} already holds a run. Pass --resume to go on with it, or give another "
                "folder."
            )
        if changed := list(_changes(before, self._options())):
            raise ValueError(
                f"{self.folder} holds a run with other options, and its drafter would be of neither: "
                f"{'; '.join(changed)}. Restore them, or give another --output-dir."
            )
        if (running := record.pop("running", None)) is not None:  # killed: until its last sign of life
            files = (file for file in self.folder.rglob("*") if file.is_file() and not file.name.endswith(LOCK))
            last = min(time.time(), max(file.stat().st_mtime for file in files))
            spent[running["part"]] = spent.get(running["part"], 0.0) + max(0.0, last - running["since"])
        return record

    def _new(self) -> dict[str, Any]:
        """Decide what can be decided, once what can be known now to be wrong is not."""
        if self.config.data is None:
            with named("target", self.config.target):
                tokenizer = load_tokenizer(self.config.target)
            openings(tokenizer, self.config.openings)
        choices, decided = self.choices, self.choices.all()
        for stage in ("supervised", "reinforce"):
            explicit = "batch_size" in getattr(self.config, stage)
            total = choices.step(stage, {"steps": 10**9, **decided[stage]}, decided["supervised"])["memory_gib"][
                "total"
            ]
            if not explicit and total * plan.GIB > choices.most():
                raise ValueError(
                    f"A step of `ppow {stage}` with one text of {decided[stage]['max_length']} tokens takes up to "
                    f"{total:.1f} GiB, and {choices.most() / plan.GIB:.1f} GiB of {choices.device.name} may be taken. "
                    f"Give {stage} a smaller max_length, or a batch_size to try it anyway"
                    + (f"; or {choices.recipe.hint}." if choices.recipe.hint else ".")
                )
        return {"options": self._options(), "decided": decided, "done": [], "seconds": {}, "target": None}

    def _options(self) -> dict:
        return self.config.to_dict(without=_FREE)

    def _know_target(self) -> None:
        """Note which weights the target's name stands for, as soon as they are here; refuse others."""
        found, known = fingerprint(self.config.target), self.record["target"]
        if known and found and known != found:
            raise ValueError(
                f"--target {self.config.target} holds other weights ({found[:12]}) than {self.folder} was begun with "
                f"({known[:12]}). Restore them, or give another --output-dir."
            )
        if found != known and found:
            self.record["target"] = found
            self._write()

    def _write(self) -> None:
        write_json(self.folder / FILE, self.record)

    def decide(self, name: str, **values: Any) -> None:
        """Keep a decision, on disk before anything follows from it."""
        self.record["decided"].setdefault(name, {}).update(values)
        complete(self.record["decided"][name])
        self._write()

    def decided(self, name: str) -> dict[str, Any]:
        """What was decided for a command."""
        return self.record["decided"].get(name, {})

    @contextlib.contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Count the time inside for a part, however it ends."""
        since, seconds = time.time(), self.record["seconds"]
        self.record["running"] = {"part": part, "since": since}
        self._write()
        try:
            yield
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.time() - since
            del self.record["running"]
            if (self.folder / FILE).exists():  # not in a folder that was taken away
                self._write()

    # -- the road ------------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """All parts that are not done yet, one after the other."""
        self._write()
        for number, (name, part) in enumerate(self.parts.items(), 1):
            done = name in self.record["done"] and all((self.folder / result).exists() for result in part.results)
            if done:
                continue
            with self.spending(name):
                print(f"\npart {number} of {len(self.parts)}: {part.title}; {self._clock(name)}", flush=True)
                getattr(self, f"_{name}")()
                self.record["done"] = [*(other for other in self.record["done"] if other != name), name]
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._know_target()
            if asked():
                raise Stopped(f"stopped by SIGTERM after part {number} of {len(self.parts)}, which is done. {again()}.")
        if self.config.push_to_hub:
            push.main(self._push(self.config.push_to_hub))
        print(f"\n{self.results()}", flush=True)

    def _clock(self, name: str) -> str:
        """The time so far, and what a part will take: its share of a budget, or what the plan says."""
        told = f"{duration(sum(self.record['seconds'].values()))} so far"
        left = self.left(name)
        if left is not None:
            return f"{told}, about {duration(left)} for it" if self.parts[name].share else told
        count = self.decided("regenerate").get("limit") or self.decided("prompts").get("count", 0)
        if not count or not self.parts[name].share:
            return told
        rows = planned(self.choices, self.record["decided"], count, self.decided("evaluate")["limit"])
        least, low, high = next((row.seconds for row in rows if row.part == name), (0.0, 0.0, 0.0))
        expected = f"likely {between(low, high)}" if self.choices.cuda else f"at least {duration(least)}"
        return f"{told}, {expected} for it" if least else told

    def left(self, *names: str) -> float | None:
        """Seconds that the budget gives to some parts that come next: their share of what is left. None: no budget."""
        budget = self.config.seconds()
        if budget is None:
            return None
        seconds, running = self.record["seconds"], self.record.get("running")
        spent = sum(seconds.values()) + (time.time() - running["since"] if running else 0.0)
        first = list(self.parts).index(names[0])
        rest = sum(part.share for part in list(self.parts.values())[first:])
        return max(0.0, budget - spent) * sum(self.parts[name].share for name in names) / rest if rest else 0.0

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's, read once: of a GGUF file that takes seconds."""
        with named("target", self.config.target):
            return load_tokenizer(self.config.target)

    def _at(self, *path: str) -> str:
        return str(self.folder.joinpath(*path))

    def command(self, name: str, **places: Any) -> Any:
        """The configuration of a single command, as decided."""
        shared = {"target": self.config.target, "seed": self.config.seed, "resume": True}
        if "endpoint" in self.decided(name):
            del shared["target"]
        if name in ("regenerate", "supervised", "reinforce"):
            shared["skip_bad_rows"] = self.config.skip_bad_rows
        if name in ("supervised", "reinforce") and self.decided("heldout").get("usable"):
            shared["eval_data"] = self._at("heldout-answers.jsonl")
        return KINDS[name].from_dict({**shared, **self.decided(name), **places})

    def _prompts(self) -> None:
        if self.config.data is not None:
            self._split()
            return
        if "count" not in self.decided("prompts"):
            self._count_prompts()
        count = self.decided("prompts")["count"]
        held = held_out_of(count)
        self._fit_steps(count)
        self._run(own_prompts.main, self.command("prompts", output=self._at("prompts.jsonl"), count=count + held))
        with open(self.folder / "prompts.jsonl", encoding="utf-8", newline="\n") as file:
            _write_lines(self.folder / "heldout.jsonl", list(file)[count : count + held])
        self.decide("regenerate", limit=count)

    def _split(self) -> None:
        """Put the rows of ``--data`` in a random order, and some that no other row repeats aside."""
        bad = BadRows(self.config.skip_bad_rows)
        assert self.config.data is not None
        rows = load_rows(self.config.data, self.config.split, None, bad)
        asking = [_prompt_of(row) for row in rows if regenerate.turns(row.get("messages", []))]
        if len(asking) < len(rows):
            bad.left_out["they have no user turn to answer"] += len(rows) - len(asking)
        random.Random(self.config.seed).shuffle(asking)
        aside: list[Row] = []
        rest: list[Row] = []
        known: dict[str, bool] = {}  # prompts, and whether they were put aside
        wanted = held_out_of(len(asking))
        for row in asking:
            words = own_prompts.plain(
                " ".join(str(message["content"]) for message in row["messages"] if message["role"] != "assistant")
            )
            if len(aside) < wanted and words not in known and _can_be_put(row):
                known[words] = True
                aside.append(row)
            elif not known.setdefault(words, False):
                rest.append(row)
            else:
                bad.left_out["they repeat a held-out prompt"] += 1
        bad.report(self.config.data)
        if not aside or not rest:
            raise ValueError(
                f"{self.config.data} has {len(asking)} rows with a user turn to answer, of which {len(aside)} can be "
                f"held out to measure on and {len(rest)} are left to train on; at least one of each is needed."
            )
        count = min(self.config.prompts or len(rest), len(rest))
        self._fit_steps(count)
        for name, chosen in (("heldout", aside), ("prompts", rest)):
            _write_lines(self.folder / f"{name}.jsonl", [json.dumps(row, ensure_ascii=False) + "\n" for row in chosen])
        print(f"{len(rest)} rows to train on, {len(aside)} held out")
        if self.config.prompts is None and self.config.budget is not None:
            pace = self._pace_of_answers(self.folder / "prompts.jsonl")
            self._fit_steps(count := self._within(pace, count, "answers", "heldout"))
        self.decide("regenerate", limit=count)

    def _fit_steps(self, rows: int) -> None:
        """Take no more texts a step than half of what there is, which may lose some; what was asked for is refused."""
        for name in ("supervised", "reinforce"):
            size, times = (self.decided(name)[key] for key in ("batch_size", "accumulation"))
            given = getattr(self.config, name).keys() & {"batch_size", "accumulation"}
            if given and size * times > rows:
                raise ValueError(
                    f"One step of `ppow {name}` takes {size * times} texts ({', '.join(sorted(given))} given), and "
                    f"there are {rows} to train on; lower it, or take more prompts."
                )
            while not given and size * times > max(1, rows // 2):
                size, times = (size, times // 2) if times > 1 else (size // 2, 1)
            self.decide(name, batch_size=size, accumulation=times)

    def _answers(self) -> None:
        given = {"data": self._at("prompts.jsonl"), "output": self._at("answers.jsonl")}
        self._run(regenerate.main, self.command("regenerate", **given))

    def _heldout(self) -> None:
        given = {"data": self._at("heldout.jsonl"), "output": self._at("heldout-answers.jsonl"), "limit": None}
        self._run(regenerate.main, self.command("regenerate", **given))

    def _mixed(self) -> None:
        rows, stage = self.decided("regenerate")["limit"], self.decided("reinforce")
        if "limit" not in self.decided("mixed"):
            count = mixed_of(rows, stage) if "steps" in stage else rows
            if self.config.budget is not None:
                pace = self.record["seconds"]["answers"] / rows * (1 - self.decided("mixed")["greedy_share"])
                count = self._within(pace, count, "mixed")
            self.decide("mixed", limit=count)
        given = {"data": self._at("prompts.jsonl"), "output": self._at("mixed-answers.jsonl")}
        config = self.command("regenerate", **given, **self.decided("mixed"))
        self._take_greedy_answers(config)
        self._run(regenerate.main, config)

    def _take_greedy_answers(self, config: RegenerateConfig) -> None:
        """Begin an output with those of part 2 that would be written again."""
        if Path(config.output).exists():
            return
        by = regenerate.writers_of(config, range(self.decided("mixed")["limit"]))
        with open(self.folder / "answers.jsonl", encoding="utf-8", newline="\n") as file:
            answers = [(json.loads(line), line) for line in file]
        _write_lines(
            Path(config.output),
            [line for row, line in answers if row["by"] == by.get(row["row"]) and row["by"]["temperature"] == 0],
        )

    def _supervised(self) -> None:
        if not self.decided("heldout"):
            self.decide("heldout", usable=self._measurable())
        self._stage("supervised", supervised.main)

    def _reinforce(self) -> None:
        self._stage("reinforce", reinforce.main)

    def _has_own_answers(self, name: str) -> bool:
        """Whether a stage learns from answers that are written for it alone."""
        return name == "reinforce" and "mixed" in self.parts

    def _stage(self, name: str, train: Callable[[Any], None]) -> None:
        given = {"data": self._at("mixed-answers.jsonl" if self._has_own_answers(name) else "answers.jsonl")}
        if name == "reinforce":
            given["drafter"] = self._at("stage1")
        if "steps" not in self.decided(name):
            self._count_steps(name, train, given)
        place = "stage1" if name == "supervised" else "stage2"
        self._run(train, self.command(name, **given, output_dir=self._at(place)))

    def _evaluate(self) -> None:
        given = {"drafter": self._at("stage2"), "baseline": self._at("stage1"), "prompts": [self._at("heldout.jsonl")]}
        if "limit" not in self.decided("evaluate"):
            self._count_evaluated(given)
        self._run(evaluate.main, self.command("evaluate", **given, output_dir=self._at("figures")))

    def _repository(self) -> None:
        name = re.sub(r"[^\w.-]+", "-", Path(self.config.target).name.removesuffix(".gguf")).strip("-.") or "drafter"
        with scratch(self.folder / ".unfinished-drafter") as partial:
            partial.mkdir()
            assemble(self._push(self.config.push_to_hub or f"ORG/{name}-PPOW"), partial)
            remove(self.folder / "drafter")
            os.replace(partial, self.folder / "drafter")

    def _push(self, repo: str) -> PushConfig:
        return PushConfig(drafter=self._at("stage2"), repo=repo, metrics=self._at("figures"))

    def _run(self, command: Callable[[Any], Any], config: Any) -> None:
        print(shlex.join(config.argv()), flush=True)
        command(config)

    def _measurable(self) -> bool:
        """Whether a held-out answer is long enough for a window; else the stages go without them."""
        place = self._at("heldout-answers.jsonl")
        config = self.command("supervised", data=place, output_dir="-", steps=10**9)
        try:
            load_examples(config, place, self.tokenizer, EVAL_WINDOW)
        except ValueError as error:
            say(f"the stages are not measured along the way: {error}")
            return False
        return True

    # -- what a budget decides -----------------------------------------------------------------------------------------

    def _count_prompts(self) -> None:
        """So many prompts as can be written and answered in the time of both."""
        with self._timing() as place:
            size = self.command("prompts", output="-").batch_size
            size *= 3 if self.choices.cuda else 1  # a GPU warms up meanwhile
            seconds = own_prompts.main(self.command("prompts", output=str(place / "prompts.jsonl"), count=size))
            pace = seconds / size
            pace += self._pace_of_answers(place / "prompts.jsonl")
        total = self._within(pace, sys.maxsize, "prompts", "answers", "heldout")
        self.decide("prompts", count=max(self._fewest_rows(), total - held_out_of(total)))

    def _pace_of_answers(self, prompts: Path) -> float:
        """Seconds per answer, of a first call or two of the target."""
        config = self.command("regenerate", data=str(prompts), output="-")
        limit = config.concurrency if config.endpoint else 3 * config.batch_size if config.batch_size else ROWS["cpu"]
        with self._timing("answers") as place:
            output = place / "answers.jsonl"
            seconds = regenerate.main(dataclasses.replace(config, output=str(output), limit=limit))
            return seconds / len(read_metrics(output))

    def _fewest_rows(self) -> int:
        """Of one step of either stage, which may lose some to short answers."""
        stages = [self.decided(name) for name in ("supervised", "reinforce")]
        return 2 * max(stage["batch_size"] * stage["accumulation"] for stage in stages)

    def _within(self, pace: float, most: int, *names: str) -> int:
        """How many prompts, of ``most``, some parts have time for."""
        available = self.left(*names)
        assert available is not None
        fewest = min(most, self._fewest_rows())
        return self._told("prompts", min(most, int(available / pace)), fewest, pace, available)

    def _count_steps(self, name: str, train: Callable[[Any], None], given: dict) -> None:
        """So many steps as the stage's share has time for, by a few of them."""
        texts = self.decided(name)["batch_size"] * self.decided(name)["accumulation"]
        short: dict[str, Any] = {"steps": _TIMED, "limit": 4 * _TIMED * texts, "log_every": 1, "eval_every": _TIMED}
        short |= {"warmup_steps": 0, "trackers": []}
        with self._timing() as place:
            run = place / name
            began = time.perf_counter()
            config = self.command(name, **given, **short, output_dir=str(run))
            train(config)
            lasted = time.perf_counter() - began
            seconds = [line["seconds"] for line in read_metrics(run / "metrics.jsonl")]
            # a checkpoint: from the last step's line to when the folder of the checkpoints has it
            logged, kept = ((run / entry).stat().st_mtime for entry in ("metrics.jsonl", "checkpoints"))
        step = statistics.median(seconds[2:-1])
        around = lasted - sum(seconds)  # loading before the first step, saving after the last one
        rows = self.decided("mixed" if self._has_own_answers(name) else "regenerate")["limit"]
        around += self._reading(config, rows)  # the texts that were not loaded here
        measuring = max(0.0, seconds[-1] - step)  # the held-out answers, in the last step
        available = self.left(name)
        assert available is not None
        pace = step + max(0.0, kept - logged) / config.save_every
        count = int((available - around - EVALUATIONS * measuring) / pace)
        self.decide(name, steps=self._told("steps", count, self._fewest(name), pace, available))

    def _reading(self, config: SupervisedConfig | ReinforceConfig, rows: int) -> float:
        """Seconds to load the answers beyond those that a timing was limited to, by how long these take."""
        assert config.limit is not None
        tokenizer = self.tokenizer
        began = time.perf_counter()
        encode(load_rows(config.data, limit=config.limit, bad=BadRows(True)), tokenizer, config.max_length, True)
        return (time.perf_counter() - began) / config.limit * max(0, rows - config.limit)

    def _fewest(self, name: str) -> int:
        return max(FEWEST[name], self.decided(name).get("warmup_steps", 0) + 1)

    def _count_evaluated(self, given: dict) -> None:
        """So many held-out prompts as there is time for."""
        with self._timing() as place:
            config = self.command("evaluate", **given, output_dir=str(place / "figures"), limit=_TIMED_PROMPTS)
            began = time.perf_counter()
            seconds = evaluate.main(dataclasses.replace(config, warmup=1))
            around = time.perf_counter() - began - seconds
        pace = seconds / min(_TIMED_PROMPTS, len(read_metrics(self.folder / "heldout.jsonl")))
        available = self.left("evaluate")
        assert available is not None
        count = int((available - around) / pace) - config.warmup + 1  # one that warms up is in `around`
        self.decide("evaluate", limit=self._told("prompts", count, FEWEST["evaluate"], pace, available))

    def _told(self, what: str, count: int, fewest: int, pace: float, available: float) -> int:
        """The count, or the fewest; either way it is said."""
        within = f"in {duration(available)}"
        if count < fewest:
            within = f"though {duration(available)} are left for them: fewer are worth nothing"
        count = max(count, fewest)
        print(f"{count} {what}, at {pace:.3g} s each, {within}", flush=True)
        return count

    @contextlib.contextmanager
    def _timing(self, name: str = "timing") -> Iterator[Path]:
        """A folder for a trial, gone afterwards; what is told there is not what becomes of the run."""
        print("timing a few first", flush=True)
        with scratch(self.folder / f".{name}") as place, contextlib.redirect_stdout(io.StringIO()):
            place.mkdir()
            try:
                yield place
            except Stopped as stopped:
                raise Stopped(f"stopped by SIGTERM while a few were timed. {again()}.") from stopped
            gc.collect()

    # -- at the end ----------------------------------------------------------------------------------------------------

    def results(self) -> str:
        """What came out: acceptance length and speedup of both stages, and the next command."""
        metrics = json.loads((self.folder / "figures" / "metrics.json").read_text(encoding="utf-8"))
        lines = []
        for title, second in metrics["results"].items():
            first = metrics["baseline"][title]
            lines.append(
                f"{title}: acceptance length {first['acceptance_length']:.2f} after stage 1, "
                f"{second['acceptance_length']:.2f} after stage 2; speedup {first['speedup']:.2f}x, "
                f"{second['speedup']:.2f}x"
            )
        lines.append(f"in {duration(sum(self.record['seconds'].values()))}; the repository is in {self._at('drafter')}")
        given = ["ppow", "push", self._at("stage2"), "--repo", "ORG/NAME", "--metrics", self._at("figures")]
        return "\n".join([*lines, *([] if self.config.push_to_hub else [f"Next: {shlex.join(given)}"])])


def _changes(before: dict, now: dict, prefix: str = "") -> Iterator[str]:
    """Every option that differs, with both values."""
    for key in {**before, **now}:
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changes(one, other, f"{key}.")
        elif one != other:
            yield f"{prefix}{key} was {one!r}, is {other!r}"


def _prompt_of(row: Row) -> Row:
    """A row without what is nothing to a prompt, and perhaps nothing that JSON can hold."""
    return Row({key: row[key] for key in ("messages", *TEMPLATE_COLUMNS) if key in row}, row.place, row.number)


def _can_be_put(row: Row) -> bool:
    """Whether an evaluation can put a row's turns to the target."""
    try:
        from_row(row, row.place, 0)
    except ValueError:
        return False
    return True


def _write_lines(path: Path, lines: list[str]) -> None:
    with whole(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8", newline="\n")
