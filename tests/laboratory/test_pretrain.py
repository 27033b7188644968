import copy
import dataclasses
import functools
import hashlib
import json
import lzma
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppow.training import checkpoints
from ppow.training.files import claim_folder
from ppow.training.metrics import MetricsLog

BENCHMARK = "pretrain"


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


SUMS = [
    chat(f"What is {a} plus {b}?", f"{a} + {b} = {a + b}\nThe answer is {a + b}.") for a in range(12) for b in range(9)
]
TEXTS = [{"text": f"Chapter {n}. The dog number {n} slept."} for n in range(20)]


@pytest.fixture(scope="module")
def corpus(benchmark):
    return benchmark.corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in {"sums-00": SUMS[:60], "sums-01": SUMS[60:], "story-00": TEXTS}.items():
        with lzma.open(folder / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture
def config(benchmark, data, tmp_path):
    def make(**changes):
        options = {
            "data": str(data),
            "output": str(tmp_path / "target"),
            "groups": ["sums:2", "story:0.5"],
            "python_share": 0.0,
            "heldout": 0.1,
            "vocab_size": 320,
            "num_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "sequence_length": 32,
            "batch_size": 4,
            "tokens": 4 * 32 * 10,
            "dtype": "float32",
        }
        return benchmark.PretrainConfig(**{**options, **changes})

    return make


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return corpus.train_tokenizer(SUMS, vocab_size=320, max_positions=64)


@pytest.fixture(params=["muon", "adamw"])
def optimizer(request):
    if request.param == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return request.param


# -- command line ------------------------------------------------------------------------------------------------------

REQUIRED = ["--data", "d", "--output", "o"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Give exactly one budget"),
        (["--tokens", "5", "--minutes", "5"], "Give exactly one budget"),
        (["--minutes", "5", "--num-heads", "5"], "num_heads=5 must divide hidden_size=192"),
        (["--minutes", "5", "--num-kv-heads", "3"], "num_kv_heads=3 must divide num_heads"),
        (["--minutes", "5", "--vocab-size", "259"], "vocab_size must be an integer >= 260"),
        (["--minutes", "5", "--groups", "math"], "group 'math' must be name:weight"),
        (["--minutes", "5", "--groups", "math:0"], "group 'math:0' must be name:weight"),
        (["--minutes", "5", "--groups", "math:nan"], "group 'math:nan' must be name:weight"),
        (["--minutes", "5", "--groups", "math:1:0"], "group 'math:1:0' must be name:weight"),
        (["--token", "5"], "the nearest is --tokens: budget in training tokens (python -m benchmarks.pretrain --help)"),
    ],
)
def test_impossible_plans_are_refused_in_a_line(benchmark, argv, message, capsys):
    assert benchmark.main([*REQUIRED, *argv]) == 2
    told = capsys.readouterr().err
    assert told.startswith("ppow: error: ") and message in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [("math:3", ("math", 3.0, sys.maxsize)), ("instruct:0.25:1200", ("instruct", 0.25, 1200))],
)
def test_groups_of_the_mix(benchmark, text, parts):
    assert benchmark.parse_group(text) == parts


def test_a_configuration_survives_json(benchmark, config):
    assert benchmark.PretrainConfig.from_dict(json.loads(json.dumps(config().to_dict()))) == config()


def test_help_names_every_option(benchmark):
    command = [sys.executable, "-m", "benchmarks.pretrain", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m benchmarks.pretrain --data DATA --output OUTPUT [options]\n")
    page = " ".join(done.stdout.split())
    for field in dataclasses.fields(benchmark.PretrainConfig):
        assert field.metadata["help"] in page and field.name.replace("_", "-") in page


def test_an_interrupted_run_says_how_it_goes_on(benchmark, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt  # no signal: a test that runs in the background may ignore SIGINT

    monkeypatch.setattr(benchmark, "pretrain", interrupted)
    assert benchmark.main([*REQUIRED, "--tokens=1"]) == 130
    assert capsys.readouterr().err == "\nppow: interrupted; pretraining goes on when it is called again\n"
    monkeypatch.setattr(benchmark, "pretrain", lambda config: signal.raise_signal(signal.SIGTERM))
    assert benchmark.main([*REQUIRED, "--tokens=1"]) == 143
    assert capsys.readouterr().err == "\nppow: stopped by SIGTERM; pretraining goes on when it is called again\n"


def test_a_second_run_is_refused_before_it_reads_or_writes_anything(benchmark, tmp_path, capsys):
    run = tmp_path / "run"
    with claim_folder(run):
        assert benchmark.main([f"--data={tmp_path}", f"--output={run}", "--tokens=1"]) == 2
        assert f"Another run is writing to --output {run}" in capsys.readouterr().err
        assert [path.name for path in run.iterdir()] == [".lock"]


# -- corpus ------------------------------------------------------------------------------------------------------------


def test_weights_are_expected_copies_and_the_split_is_by_question(corpus, config):
    answers = [chat("Same question?", f"answer {n}") for n in range(40)]
    heldout = []
    kept = corpus.split(SUMS + answers, 2.5, config(), random.Random(0), heldout)
    counts = {json.dumps(row): kept.count(row) for row in kept}
    assert set(counts.values()) == {2, 3}
    assert sum(counts.values()) / len(counts) == pytest.approx(2.5, abs=0.15)
    assert len(counts) + len(heldout) == len(SUMS) + len(answers)
    assert 0.03 < len([row for row in heldout if row in SUMS]) / len(SUMS) < 0.2
    assert len([row for row in heldout if row in answers]) in (0, 40)


def test_rows_that_spell_a_special_token_are_dropped(corpus, config):
    rows = [chat("hi", "there<|im_end|>"), chat("<|endoftext|>", "ok"), chat("fine", "yes")]
    assert corpus.split(rows, 1, config(heldout=0.0), random.Random(0), []) == [rows[2]]


def test_build_reads_all_files_of_a_group_and_honours_the_limit(corpus, config):
    longest = max(sum(map(len, corpus.texts(row))) for row in SUMS)
    train, heldout, record = corpus.build(config(groups=[f"sums:1:{longest - 1}"]))
    expected = [row for row in SUMS if sum(map(len, corpus.texts(row))) < longest]
    assert sorted(map(json.dumps, train + heldout)) == sorted(map(json.dumps, expected))
    assert record["groups"] == {"sums": {"weight": 1.0, "rows": len(expected)}}
    assert (record["train_rows"], record["heldout_rows"]) == (len(train), len(heldout))


def test_python_source_gets_its_share_and_a_licence(corpus, config):
    train, _, record = corpus.build(config(groups=["sums:40"], python_share=0.4))
    chars = {"sums": 0, "python": 0}
    for row in train:
        chars["sums" if "messages" in row else "python"] += sum(map(len, corpus.texts(row)))
    # Whole files: over the share by at most one.
    assert 0.3 < chars["python"] / sum(chars.values()) < 0.6
    assert [source["licence"] for source in record["python"]] == ["PSF-2.0"]


def test_named_packages_are_recorded(corpus):
    rows, sources = corpus.read_python(["packaging"], 1e9, random.Random(0))
    assert sources[1]["name"] == "packaging" and "Apache" in sources[1]["licence"]
    assert any("class SpecifierSet" in row["text"] for row in rows)


@pytest.mark.parametrize("licence", ["GPL-3.0-or-later", "MPL-2.0 AND MIT", "Limited use permitted", ""])
def test_packages_without_a_permissive_licence_are_refused(corpus, monkeypatch, licence):
    monkeypatch.setattr(corpus, "package_licence", lambda name: licence)
    with pytest.raises(ValueError, match="not a permissive one"):
        corpus.read_python(["thing"], 1e3, random.Random(0))


def test_unknown_packages_and_groups_are_named(corpus, config):
    with pytest.raises(ValueError, match="'no-such-package' is not installed"):
        corpus.read_python(["no-such-package"], 1e3, random.Random(0))
    with pytest.raises(ValueError, match="No poems-NN.jsonl.xz.*groups there: story, sums"):
        corpus.build(config(groups=["poems:1"]))
    with pytest.raises(ValueError, match="left no rows"):
        corpus.build(config(groups=["sums:1:3"]))


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_special_tokens_come_first_and_bytes_round_trip(corpus, tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(corpus.SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    text = "  Ünïcode 日本\n\n\tdef f(x):\n        return 1234 \r\n 'll 😀"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone_and_role_names_are_one_token(tokenizer):
    assert tokenizer.tokenize("2024") == list("2024")
    assert len(tokenizer.tokenize("assistant")) == len(tokenizer.tokenize("user")) == 1


def test_the_template_masks_answers_with_their_end_of_turn(tokenizer):
    messages = [{"role": "system", "content": "Add."}, *chat("1 plus 2?", "3")["messages"]]
    messages += chat("And 4?", "7")["messages"]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answers = [token for token, mask in zip(out["input_ids"], out["assistant_masks"]) if mask]
    assert tokenizer.decode(answers) == "3<|im_end|>7<|im_end|>"
    asked = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages[:3], tokenize=False)
    assert asked == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1 plus 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert whole == asked + "3<|im_end|>\n"


def test_documents_are_packed_with_separators(corpus, tokenizer, tmp_path):
    rows = [{"text": "one"}, chat("two?", "2")]
    count = corpus.write_tokens(rows, tokenizer, tmp_path / "x.bin")
    tokens = np.fromfile(tmp_path / "x.bin", dtype=np.uint16)
    assert len(tokens) == count
    assert tokenizer.decode(tokens.tolist()) == (
        "one<|endoftext|><|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|endoftext|>"
    )


def test_sequences_overlap_by_the_token_to_predict(benchmark):
    tokens = np.arange(10, dtype=np.uint16)
    assert benchmark.sequences(tokens, 3, [0, 2]).tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]


# -- loss, rate, model, optimizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_chunked_cross_entropy_is_cross_entropy(benchmark, chunk):
    hidden = torch.randn(7, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    labels = torch.randint(0, 11, (7,))
    expected = F.cross_entropy(hidden @ weight.T, labels)
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = benchmark.ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (hidden, weight)), wanted)


def test_rate_rises_linearly_and_falls_to_zero_as_a_cosine(benchmark):
    assert benchmark.rate(0.0, 0.1) == 0.01
    assert benchmark.rate(0.05, 0.1) == 0.5
    assert benchmark.rate(0.1, 0.1) == 1
    assert benchmark.rate(0.55, 0.1) == pytest.approx(0.5)
    assert benchmark.rate(1.0, 0.1) == benchmark.rate(1.5, 0.1) == 0
    assert benchmark.rate(0.0, 0.0) == 1


def test_the_residual_stream_starts_with_a_variance_free_of_depth(benchmark, config, tokenizer):
    model = benchmark.build_model(config(num_layers=8, hidden_size=64, intermediate_size=128), tokenizer)
    block = model.model.layers[3]
    assert block.self_attn.q_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx((128 * 16) ** -0.5, rel=0.1)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_optimizers_hold_every_parameter_once_and_their_state_round_trips(benchmark, config, tokenizer, optimizer):
    options = config(optimizer=optimizer)
    model, twin = (benchmark.build_model(options, tokenizer) for _ in range(2))
    ours, other = benchmark.build_optimizers(options, model), benchmark.build_optimizers(options, twin)
    held = [id(weight) for group in ours.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in model.parameters())

    def step(model, optimizers, seed):
        inputs = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(seed))
        benchmark.batch_loss(model, inputs, options).backward()
        optimizers.step()
        optimizers.zero_grad()

    step(model, ours, 1)
    content = copy.deepcopy(ours.state_dict())
    indices = [index for group in content["param_groups"] for index in group["params"]]
    assert indices == list(range(len(held))) and set(content["state"]) == set(indices)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(content)
    step(model, ours, 2)
    step(twin, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


# -- runs --------------------------------------------------------------------------------------------------------------


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_learns_and_leaves_a_loadable_target(benchmark, config, tmp_path, optimizer):
    result = benchmark.pretrain(config(tokens=4 * 32 * 60, optimizer=optimizer, dtype="bfloat16"))
    rows = [json.loads(line) for line in (tmp_path / "target/work/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(320), abs=0.3)
    assert result["heldout_loss"] < rows[0]["loss"] - 1.5
    assert result["step"] == 60 and rows[-1]["tokens"] == result["tokens"] == 4 * 32 * 60

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert model.dtype == torch.bfloat16 and model.num_parameters() == result["parameters"]
    assert model.generation_config.eos_token_id == [2, 0] and model.generation_config.pad_token_id == 3
    assert "{% generation %}" in tokenizer.chat_template
    report = json.loads((tmp_path / "target/training.json").read_text())
    assert report["result"] == result and len(report["samples"]) == len(report["corpus"]["prompts"]) > 0
    assert str(tmp_path) not in (tmp_path / "target/training.json").read_text()
    assert str(tmp_path) not in (tmp_path / "target/provenance.json").read_text()


def test_a_killed_run_continues_to_the_same_weights(benchmark, config, tmp_path, monkeypatch, optimizer):
    budget, last = 4 * 32 * 6, 4
    options = config(optimizer=optimizer, tokens=budget, checkpoint_minutes=1e-9)
    benchmark.pretrain(config(optimizer=optimizer, tokens=budget, output=str(tmp_path / "whole")))

    whole_log = MetricsLog.log

    def killed_at(self, step, values):
        whole_log(self, step, values)
        if step == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", killed_at)
        with pytest.raises(KeyboardInterrupt):
            benchmark.pretrain(options)
    assert not (tmp_path / "target/config.json").exists()
    # The newest checkpoint is lost too: the run repeats its last step.
    (tmp_path / f"target/work/step-{last:06}/state.json").unlink()
    benchmark.pretrain(options)
    assert digest(tmp_path / "target") == digest(tmp_path / "whole")
    losses = [
        [(row["step"], row["loss"]) for row in map(json.loads, (tmp_path / name / "work/metrics.jsonl").open())]
        for name in ("target", "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_are_the_same_target(benchmark, config, tmp_path, monkeypatch, backend):
    """The same losses at every step, and a folder that says nothing of how it was trained."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    found = {}
    for compiled in (False, True):
        options = {"tokens": 4 * 32 * 3, "output": str(tmp_path / f"compiled-{compiled}")}
        result = benchmark.pretrain(config(compile_layers=compiled, **options))
        log = (tmp_path / f"compiled-{compiled}/work/metrics.jsonl").read_text().splitlines()
        found[compiled] = [json.loads(row)["loss"] for row in log] + [result["heldout_loss"]]
    assert found[True] == pytest.approx(found[False], rel=1e-4) and len(found[True]) == 4
    names = [AutoModelForCausalLM.from_pretrained(tmp_path / f"compiled-{c}").state_dict() for c in (False, True)]
    assert names[0].keys() == names[1].keys()


def test_a_finished_run_is_not_trained_further(benchmark, config, tmp_path):
    first = benchmark.pretrain(config(tokens=256))
    before = digest(tmp_path / "target")
    assert benchmark.pretrain(config(tokens=256)) == first
    assert digest(tmp_path / "target") == before


def test_a_time_budget_ends_at_rate_zero(benchmark, config, tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    result = benchmark.pretrain(config(tokens=0, minutes=1.0, warmup=0.2))
    rows = [json.loads(line) for line in (tmp_path / "target/work/metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["seconds"] < 60 <= result["seconds"] + 1 and result["seconds"] < 65
    rates = [row["rate"] for row in rows]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) > 0.95 and rates[-1] < 0.02


def test_other_options_do_not_continue_a_run(benchmark, config):
    benchmark.pretrain(config(tokens=128))
    with pytest.raises(ValueError, match=r"other options \(hidden_size 32 -> 64\)"):
        benchmark.pretrain(config(tokens=128, hidden_size=64))


def test_a_corpus_shorter_than_a_sequence_is_refused(benchmark, config):
    with pytest.raises(ValueError, match="not one sequence of 100000"):
        benchmark.pretrain(config(sequence_length=100_000))


def test_data_that_is_not_there_stops_a_run_before_it_leaves_anything(benchmark, config, data, tmp_path):
    with pytest.raises(ValueError, match=r"--data \S*nosuch does not exist; give a folder of GROUP-NN"):
        benchmark.pretrain(config(data=str(tmp_path / "nosuch")))
    with pytest.raises(ValueError, match="sums-00.jsonl.xz is not a folder"):
        benchmark.pretrain(config(data=str(data / "sums-00.jsonl.xz")))
    with pytest.raises(ValueError, match="groups there: story, sums"):
        benchmark.pretrain(config(groups=["sums:2", "poems:1"]))
    assert not (tmp_path / "target").exists()


def test_a_damaged_row_is_named_and_leaves_no_record_of_a_run(benchmark, config, data, tmp_path):
    shutil.copytree(data, tmp_path / "damaged")
    with lzma.open(tmp_path / "damaged" / "sums-02.jsonl.xz", "wt") as file:
        file.write('{"messages": [{"role": "user"\n')
    with pytest.raises(ValueError, match="sums-02.jsonl.xz:1"):
        benchmark.pretrain(config(data=str(tmp_path / "damaged")))
    assert not (tmp_path / "target" / "provenance.json").exists()
    # nothing was made yet, so other options may follow: without the damaged group, say
    assert benchmark.pretrain(config(groups=["story:1"], tokens=128))["step"] == 1


def test_a_run_whose_corpus_is_made_goes_on_without_the_data(benchmark, config, tmp_path):
    benchmark.pretrain(config(tokens=128))
    assert benchmark.pretrain(config(tokens=256, data=str(tmp_path / "nosuch")))["step"] == 2
    (tmp_path / "target" / "work" / "settings.json").unlink()  # as where the corpus alone was brought
    assert benchmark.pretrain(config(tokens=384, data=str(tmp_path / "nosuch")))["step"] == 3


def test_a_diverged_run_stops_and_its_checkpoint_is_sound(benchmark, config, tmp_path):
    with pytest.raises(
        ValueError, match=r"(?s)diverged and stops \(.*Start anew into another --output: lower the learning"
    ):
        benchmark.pretrain(config(optimizer="adamw", learning_rate=1e30, tokens=4 * 32 * 40, checkpoint_minutes=1e-9))
    good = checkpoints.latest(tmp_path / "target" / "work")
    if good:
        assert all(bool(torch.isfinite(w).all()) for w in load_file(good / "model.safetensors").values())
    assert not (tmp_path / "target" / "config.json").exists()


def test_sigterm_saves_and_the_same_command_goes_on(benchmark, config, data, tmp_path, monkeypatch, capsys):
    benchmark.pretrain(config(output=str(tmp_path / "whole")))
    original = benchmark.batch_loss

    def signalling(model, inputs, options):
        if (tmp_path / "target/work/metrics.jsonl").read_text().count("\n") == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(model, inputs, options)

    values = {**config().to_dict(), "groups": "sums:2,story:0.5", "python_packages": None, "compile_layers": None}
    command = [f"--{key}={value}" for key, value in values.items() if value is not None]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *command])
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "batch_loss", signalling)
        assert benchmark.main() == 143
    assert "stopped by SIGTERM after step 4; it is saved in" in capsys.readouterr().err
    assert checkpoints.latest(tmp_path / "target/work").name == "step-000004"
    assert benchmark.main() == 0
    assert digest(tmp_path / "target") == digest(tmp_path / "whole")
    told = capsys.readouterr().out
    assert told.startswith("cpu, ") and "rows to train on" in told and "dropped: none" in told
    assert f"Next: ppow regenerate --target {tmp_path / 'target'} --data" in told.splitlines()[-1]
    record = json.loads((tmp_path / "target/provenance.json").read_text())
    assert record["command"] == "pretrain" and record["earlier"][0]["argv"] == record["argv"]
    assert record["argv"][:4] == ["python", "-m", "benchmarks.pretrain", f"--data={data.name}"]
    assert (tmp_path / "target/training.png").exists() and not list(tmp_path.rglob(".*"))


def test_rows_that_are_dropped_are_counted(benchmark, corpus, config):
    longest = max(sum(map(len, corpus.texts(row))) for row in SUMS)
    record = corpus.build(config(groups=[f"sums:1:{longest - 1}", "story:1"]))[2]
    over = sum(sum(map(len, corpus.texts(row))) == longest for row in SUMS)
    assert record["dropped"] == {"bad rows": 0, "longer than its group's limit": over, "spells a special token": 0}
    told = benchmark.rows_read(record)
    assert f"dropped: {over}: longer than its group's limit" in told and f"story {len(TEXTS)}" in told


def test_missing_hardware_and_optimizers_are_named(benchmark, config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        benchmark.pretrain(config(device="cuda"))
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="no torch.optim.Muon; use --optimizer adamw"):
        benchmark.pretrain(config(optimizer="muon"))
