"""The comparison of ways to write answers, on a tiny target."""

import json
from pathlib import Path

import pytest

from benchmarks import answers, prompt_mix


@pytest.fixture(scope="module")
def target(tmp_path_factory, save_target):
    folder = tmp_path_factory.mktemp("target")
    save_target(folder)
    return folder


def test_all_ways_write_the_same_answers(target, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Add {i} and {'two ' * i}."}) + "\n" for i in range(6)))
    given = ["--target", str(target), "--data", str(data), "--new", "6", "--batch-size", "4"]
    report = answers.main([*given, "--ways", "batches,slots,continuous"])
    assert report["same_answers"] == 1 and report["speedup"] > 0
    tokens = {way["tokens"] for way in report["ways"].values()}
    assert len(tokens) == 1 and report["prompts"] == 6


def test_a_mix_of_prompts(tmp_path):
    import lzma

    rows = [{"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "No."}]}
            for i in (1, 2, 2, 3)]  # fmt: skip
    rows += [{"messages": [{"role": "user", "content": "long " * 300}]}, {"text": "no chat"}]
    with lzma.open(tmp_path / "math-00.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    given = {"data": str(tmp_path), "groups": ["math:10"], "output": str(tmp_path / "out.jsonl")}
    prompt_mix.main(prompt_mix.PromptMixConfig(**given, python=5))
    made = [json.loads(line)["messages"][0]["content"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(made)[-3:] == ["What is 1?", "What is 2?", "What is 3?"] and len(made) == 8
    assert all(text.startswith(prompt_mix.ASK) for text in sorted(made)[:5])
    with pytest.raises(ValueError, match="give GROUP:COUNT, such as math:1000"):
        prompt_mix.main(prompt_mix.PromptMixConfig(**{**given, "groups": ["math"]}))


def test_the_page_has_the_figures_that_were_measured():
    root = Path(answers.__file__).parent.parent
    page = (root / "docs" / "train.md").read_text(encoding="utf-8")
    ways = json.loads((root / "benchmarks" / "results" / "answers.json").read_text())["ways"]
    slots, batches = ways["slots"], ways["batches"]
    times = slots["tokens_per_second"] / batches["tokens_per_second"]
    told = f"{slots['tokens_per_second']:,.0f} tokens/s in {slots['seconds']:.1f} s, against"
    told += f" {batches['tokens_per_second']:,.0f} in {batches['seconds']:.1f} s for batches ({times:.1f} times"
    assert told in " ".join(page.split())


def test_openings_of_functions():
    words = '"""Return x, doubled, and twice that when it is odd, as a list."""'
    source = f"class A:\n    def f(self, x):\n        {words}\n        return x\n"
    assert prompt_mix.openings(source) == [f"def f(self, x):\n    {words}"]
    assert prompt_mix.openings("def f(:") == [] and prompt_mix.openings("def f():\n    return 1\n") == []
