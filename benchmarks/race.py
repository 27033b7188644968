"""The README's moving picture: one race of the demo's pair, recorded, then drawn.

    python -m benchmarks.race               # race, write benchmarks/results/race.json, draw docs/race.gif
    python -m benchmarks.race --draw        # only draw the race that is recorded

The race is the page's (space/race.py): a warm-up, three rounds of changing order, the median run of each system. It is
replayed at the speed at which it ran, or, where that takes more than 8 seconds, faster by a whole factor that the
picture names. The picture carries the fingerprint of its record, so that a test can tell when one of the two is old.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ppow.training.space import FOLDER

from . import report

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "race.json"
PICTURE = ROOT / "docs" / "race.gif"
WIDTH, HEIGHT, GAP, PANE = 900, 350, 16, 62  # pixels; of the picture, between its parts, above the panes
FRAMES, HOLD, LONGEST = 10, 4, 8  # per second; seconds for which the end is shown; and of a replay, at most
INK, QUIET, LINE = "#1f2328", "#57606a", "#d0d7de"
MARKS = {"plain": "#ffffff", "accepted": "#d5f0dc", "bonus": "#d7e5fb", "own": "#fde3c8"}
TITLES = {"plain": "plain generate()", "PPOW": "with the PPOW drafter"}


def record(example: str, tokens: int, output: Path, arguments, argv: list[str] | None) -> None:
    """Race the demo's pair on a prompt of the page and write what the picture needs."""
    sys.path.insert(0, str(FOLDER))
    import page
    import pair as pairs
    import race
    import render
    from ppow.training.fingerprints import fingerprint
    from ppow.training.smollm2 import TARGET, demo_pair
    from text import answer_pieces

    names = pairs.Names(*demo_pair())
    pair = pairs.load_pair(names)
    race.warm_up(pair)
    settings = race.Settings.own(pair, page.EXAMPLES[example])
    settings = race.Settings(**{**vars(settings), "max_new_tokens": tokens}).check()
    *_, runs = race.race(pair, settings, race.StopFlag())
    plain, ours = runs
    ratio, *spread = race.speedup(ours, plain)
    marks = {"plain": ["plain"] * len(plain.tokens), "PPOW": render.kinds(ours, settings.window_size)}
    found = report.facts("race", arguments, argv, without=("record", "picture", "draw"))
    found |= {"target": TARGET, "drafter": fingerprint(names.drafter, whole=True), "prompt": settings.prompt}
    found |= {"speedup": ratio, "speedup_range": spread, "identical": race.identical(runs, settings.temperature)}
    found["acceptance_length"] = sum(ours.gained) / len(ours.gained)
    found["systems"] = {
        name: {
            "seconds": run.seconds,
            "tokens_per_second": run.rate,
            "rates": run.rates,
            "times": [round(seconds, 3) for seconds, some in run.steps for _ in some],
            "pieces": answer_pieces(pair.tokenizer, run.tokens),
            "marks": marks[name],
        }
        for name, run in zip(("plain", "PPOW"), runs)
    }
    output.write_text(report.compact(found) + "\n", encoding="utf-8")


def fonts() -> dict:
    return {size: ImageFont.load_default(size) for size in (13, 15, 18, 22)}


def pace_of(race: dict) -> int:
    """How many times faster than it ran a race is replayed."""
    return math.ceil(max(run["seconds"] for run in race["systems"].values()) / LONGEST)


def frame(race: dict, seconds: float, font: dict) -> Image.Image:
    """The picture after ``seconds`` of the race."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "#ffffff")
    draw = ImageDraw.Draw(image)
    draw.text((GAP, 10), race["prompt"], INK, font[18])
    model = race["target"].rpartition("/")[2]
    pace = pace_of(race)
    shown = "at the measured speed" if pace == 1 else f"{pace} times faster than measured"
    draw.text((GAP, 37), f"{model}, {report.ran_on(race)}, temperature 0, replayed {shown}", QUIET, font[13])
    width = (WIDTH - 3 * GAP) // 2
    for number, (name, run) in enumerate(race["systems"].items()):
        left = GAP + number * (width + GAP)
        pane(draw, run, TITLES[name], (left, PANE, left + width, HEIGHT - 52), seconds, font)
    legend(draw, font)
    if seconds >= max(run["seconds"] for run in race["systems"].values()):
        same = "same tokens" if race["identical"] else "tokens differ by rounding"
        draw.text((GAP, HEIGHT - 46), f"{race['speedup']:.2f}x as fast, {same}", INK, font[22])
        low, high = race["speedup_range"]
        draw.text((GAP, HEIGHT - 18), f"median of three rounds, {low:.2f}x to {high:.2f}x", QUIET, font[13])
    return image


def pane(draw: ImageDraw.ImageDraw, run: dict, title: str, box: tuple, seconds: float, font: dict) -> None:
    """One system: its clock, its rate, and the tokens that it has written by now."""
    left, top, right, bottom = box
    draw.rounded_rectangle(box, 10, "#ffffff", LINE)
    clock = min(seconds, run["seconds"])
    written = sum(time <= clock for time in run["times"])
    done = seconds >= run["seconds"]
    rate = run["tokens_per_second"] if done else written / clock if clock else 0
    draw.text((left + 12, top + 8), title, INK, font[18])
    draw.text((right - 12, top + 10), f"{clock:.1f} s   {rate:.0f} tokens/s", INK if done else QUIET, font[15], "ra")
    x, y, step = left + 12, top + 40, 22
    for piece, mark in zip(run["pieces"][:written], run["marks"]):
        for part in piece.replace("\n", "\n\0").split("\0"):
            text = part.rstrip("\n")
            wide = draw.textlength(text, font[15])
            if x + wide > right - 12:
                x, y, text = left + 12, y + step, text.lstrip(" ")
                wide = draw.textlength(text, font[15])
            if y + step > bottom:
                return
            if text:
                draw.rectangle((x, y, x + wide, y + 18), MARKS[mark])
                draw.text((x, y), text, INK, font[15])
            x = left + 12 if part.endswith("\n") else x + wide
            y += step if part.endswith("\n") else 0


def legend(draw: ImageDraw.ImageDraw, font: dict) -> None:
    x = WIDTH - GAP
    for mark, meaning in reversed(
        {"accepted": "drafted, accepted", "bonus": "bonus token", "own": "the target's own"}.items()
    ):
        x -= draw.textlength(meaning, font[13])
        draw.text((x, HEIGHT - 36), meaning, QUIET, font[13])
        draw.rectangle((x - 20, HEIGHT - 35, x - 7, HEIGHT - 22), MARKS[mark], LINE)
        x -= 36


def draw(file: Path, output: Path) -> None:
    """Draw a recorded race as an animated GIF that repeats for ever."""
    text = file.read_bytes()
    race, font = json.loads(text), fonts()
    end = max(run["seconds"] for run in race["systems"].values())
    step = pace_of(race) / FRAMES
    times = [number * step for number in range(int(end / step) + 1)] + [end]
    frames = [frame(race, seconds, font) for seconds in times]
    palette = frames[-1].quantize(64)
    shown = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in frames]
    pauses = [1000 // FRAMES] * (len(shown) - 1) + [1000 * HOLD]
    kept = hashlib.sha256(text).hexdigest()
    options = {"save_all": True, "append_images": shown[1:], "duration": pauses, "loop": 0}
    shown[0].save(output, comment=f"record {kept}".encode(), optimize=True, **options)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only draw the race that is recorded")
    parser.add_argument("--example", default="Arithmetic", help="which of the prompts of the page is raced")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--record", type=Path, default=RECORD, help="file of the record")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="file of the picture")
    arguments = parser.parse_args(argv)
    if not arguments.draw:
        record(arguments.example, arguments.tokens, arguments.record, arguments, argv)
    draw(arguments.record, arguments.picture)


if __name__ == "__main__":
    main()
