"""The README's moving picture: drawn from its record, of the drafter that is in bundled/."""

import hashlib
import json

import pytest
from PIL import Image

from ppow.training.fingerprints import fingerprint

BENCHMARK = "race"
AGAIN = "record it anew: python -m benchmarks.race"


@pytest.fixture
def record():
    """A race of two tokens a second against four."""
    pieces = ["One", " two", ".\n", "Three"]
    slow = {"seconds": 2.0, "tokens_per_second": 2.0, "times": [0.5, 1.0, 1.5, 2.0], "marks": ["plain"] * 4}
    fast = {"seconds": 1.0, "tokens_per_second": 4.0, "times": [0.25, 1.0, 1.0, 1.0]}
    fast["marks"] = ["own", "accepted", "accepted", "bonus"]
    systems = {"plain": slow | {"pieces": pieces}, "PPOW": fast | {"pieces": pieces}}
    found = {
        "target": "ORG/small",
        "prompt": "Count.",
        "speedup": 2.0,
        "speedup_range": [1.5, 2.5],
        "identical": True,
        "systems": systems,
    }
    return found | {"hardware": {"cpu": "A CPU", "torch_threads": 2, "gpus": []}}


@pytest.mark.parametrize(("slower", "pace"), [(1, 1), (10, 3)])
def test_a_race_is_drawn_at_its_speed_or_faster_by_a_named_factor(benchmark, record, tmp_path, slower, pace):
    for run in record["systems"].values():
        run["seconds"], run["times"] = slower * run["seconds"], [slower * time for time in run["times"]]
    file, picture = tmp_path / "race.json", tmp_path / "race.gif"
    file.write_text(json.dumps(record))
    benchmark.main(["--draw", "--record", str(file), "--picture", str(picture)])
    assert benchmark.pace_of(record) == pace
    with Image.open(picture) as image:
        assert image.size == (benchmark.WIDTH, benchmark.HEIGHT) and image.info["loop"] == 0
        pauses = []
        for number in range(image.n_frames):
            image.seek(number)
            pauses.append(image.info["duration"])
    moving = sum(pauses) / 1000 - benchmark.HOLD
    assert abs(moving - 2 * slower / pace) <= 2 / benchmark.FRAMES and moving <= benchmark.LONGEST


def test_tokens_appear_when_they_were_written(benchmark, record):
    font, green = benchmark.fonts(), (213, 240, 220)
    seen = [
        sum(pixel == green for pixel in benchmark.frame(record, seconds, font).get_flattened_data())
        for seconds in (0.9, 1.0)
    ]
    assert seen[1] > seen[0] + 300  # the legend has this colour, too; two accepted tokens join it


def test_the_picture_shows_its_record_and_the_drafter_that_ships(benchmark):
    text = benchmark.RECORD.read_bytes()
    with Image.open(benchmark.PICTURE) as image:
        assert image.info["comment"].decode() == f"record {hashlib.sha256(text).hexdigest()}", f"{AGAIN} --draw"
    bundled = fingerprint(benchmark.ROOT / "bundled" / "drafter", whole=True)
    assert json.loads(text)["drafter"] == bundled, AGAIN
    assert benchmark.PICTURE.stat().st_size < 1e6
