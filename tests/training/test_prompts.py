import json
from pathlib import Path

import datasets
import pytest

from ppow.training.prompts import BENCHMARKS, Prompt, first_turn, from_hub, load_prompts, prompt_sets

SHARED = Path(__file__).parents[3] / "shared" / "data" / "prompts"  # present on some machines, never needed


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_users_file_with_turns_prompt_or_messages(tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {"id": "a", "category": "code", "turns": ["one", "two"]},
        {"prompt": "def f():", "raw_completion": True},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q1"},
                {"role": "assistant", "content": "a1"},
                {"role": "user", "content": "q2"},
            ]
        },
    )
    expected = [
        Prompt("a", "code", ["one", "two"], False),
        Prompt("1", "", ["def f():"], True),
        Prompt("2", "", ["q1", "q2"], False, [{"role": "system", "content": "s"}]),
    ]
    assert load_prompts(path) == expected
    assert load_prompts(path, limit=2) == expected[:2]


@pytest.mark.parametrize("file", ["gsm8k.jsonl", "gsm8k_test.jsonl"])
def test_a_benchmark_from_a_folder(tmp_path, file):
    write(tmp_path / file, {"id": "gsm8k-test-0", "category": "math", "turns": ["How many?"], "answer": "18"})
    assert load_prompts("gsm8k", str(tmp_path)) == [Prompt("gsm8k-test-0", "math", ["How many?"])]


# Each as the Hub serves it: column names, splits and configuration of the real repository, with one row.
HUB = {
    "mt_bench": (
        {"category": "writing", "prompt": ["first", "second"], "reference": [], "prompt_id": 81},
        Prompt("81", "writing", ["first", "second"]),
    ),
    "humaneval": (
        {
            "task_id": "HumanEval/0",
            "prompt": "def f():\n",
            "canonical_solution": "    pass",
            "test": "",
            "entry_point": "f",
        },
        Prompt("HumanEval/0", "code", ["def f():\n"], raw_completion=True),
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"},
        Prompt("gsm8k-test-0", "math", ["How many?"]),
    ),
    "mbpp": (
        {"task_id": 11, "text": "Write f.", "code": "", "test_list": ["assert f(1)", "assert f(2)"]},
        Prompt("mbpp-11", "code", ["Write f.\nYour code should pass these tests:\nassert f(1)\nassert f(2)"]),
    ),
}


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_a_benchmark_as_the_hub_serves_it(tmp_path, name):
    row, expected = HUB[name]
    benchmark = BENCHMARKS[name]
    folder = benchmark.config or "default"
    (tmp_path / folder).mkdir()
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / folder / f"{benchmark.split}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {folder}\n  data_files:\n"
        f"  - split: {benchmark.split}\n    path: {folder}/{benchmark.split}-*\n"
        "- config_name: other\n  data_files: nothing-*\n---\n"
    )
    assert from_hub(benchmark._replace(repository=str(tmp_path), config=folder)) == [expected]


def test_an_unreachable_hub_says_what_to_do():
    with pytest.raises(OSError, match=r"Cannot load openai/gsm8k from the Hub .*--prompts-dir"):
        load_prompts("gsm8k")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"title": "q"}, r"mine.jsonl:1: expected 'turns', 'prompt' or 'messages', got the keys \['title'\]"),
        ({"turns": []}, "mine.jsonl:1: the turns must be non-empty texts"),
        ({"turns": "one"}, "mine.jsonl:1: the turns must be non-empty texts"),
        ({"prompt": "  "}, "mine.jsonl:1: the turns must be non-empty texts"),
        ({"prompt": 3}, "mine.jsonl:1: the turns must be non-empty texts"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "mine.jsonl:1: the turns must be non-empty texts"),
        ({"messages": ["a"]}, "mine.jsonl:1: expected 'turns', 'prompt' or 'messages'"),
        ({"turns": ["a", "b"], "raw_completion": True}, "mine.jsonl:1: raw_completion must be"),
        ({"prompt": "a", "raw_completion": "yes"}, "mine.jsonl:1: raw_completion must be"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path / "mine.jsonl", row))


def test_bad_names_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'gsm9k' is neither a benchmark \(mt_bench, humaneval, gsm8k, mbpp\)"):
        load_prompts("gsm9k")
    with pytest.raises(FileNotFoundError, match=r"neither mt_bench.jsonl nor mt_bench_test.jsonl"):
        load_prompts("mt_bench", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_prompts(str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match="holds no prompts"):
        load_prompts(write(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load_prompts("mt_bench", limit=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not on this machine")
@pytest.mark.parametrize(("name", "rows"), [("mt_bench", 80), ("humaneval", 164), ("gsm8k", 1319), ("mbpp", 500)])
def test_the_real_benchmarks(name, rows):
    prompts = load_prompts(name, str(SHARED))
    assert len(prompts) == rows and len({prompt.id for prompt in prompts}) == rows
    assert all(prompt.raw_completion == (name == "humaneval") for prompt in prompts)


def test_sets_of_prompts_are_called_by_their_files(tmp_path):
    path = write(tmp_path / "mine.v2.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert {name: len(found) for name, found in prompt_sets([path], limit=1).items()} == {"mine.v2": 1}


def test_a_first_turn_is_put_through_the_template_unless_it_is_a_raw_completion(tiny_tokenizer):
    chat = first_turn(tiny_tokenizer, Prompt("a", "", ["Add one.", "And two?"]))
    text = "<|im_start|>user\nAdd one.<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(chat) == text
    raw = first_turn(tiny_tokenizer, Prompt("b", "", ["def add(a, b):"], raw_completion=True))
    assert tiny_tokenizer.decode(raw) == "def add(a, b):"
