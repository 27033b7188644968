"""The comparison of objectives: its way of reading acceptance along texts, and the command, small on a CPU."""

import argparse
import copy
import json
import math
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from decoding_helpers import PAD, block_drafter, generate_with, prompt_batches, trained_block
from ppow.training import evaluate
from ppow.training.acceptance import Along, walk
from ppow.training.config import EvaluateConfig, SupervisedConfig
from ppow.training.data import Example
from ppow.training.objectives import objective_of
from ppow.training.target import FrozenTarget
from small_pair import DRAFTER, TARGET
from training_helpers import make_pair

BENCHMARK = "objectives"
PAIR = {"target": str(TARGET), "drafter": str(DRAFTER)}
QUESTIONS = ["What is 12 plus 30?", "Tom has 4 apples and buys 6 more. How many has he?", "Name three colours."]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    path.write_text("".join(json.dumps({"turns": [question]}) + "\n" for question in QUESTIONS))
    return path


def arguments(prompts, *more, kept: bool = True) -> list[str]:
    """``kept``: the target answers once for all tests that say so."""
    options = {**PAIR, "data": str(prompts.parent / "train.jsonl"), "prompts": str(prompts), "dtype": "float32"}
    with open(options["data"], "w") as out:
        for question in QUESTIONS * 2:
            reply = {"role": "assistant", "content": f"Let us see: {question} It is more than nobody would think."}
            out.write(json.dumps({"messages": [{"role": "user", "content": question}, reply]}) + "\n")
    if kept:
        options["texts"] = prompts.parent / "texts.json"
    small = {"steps": 2, "batch-size": 2, "max-new-tokens": 24, "bootstrap": 100, "eval-batch": 2, "tree-nodes": "60,4"}
    return [*(f"--{key}={value}" for key, value in (options | small).items()), *more]


def test_acceptance_read_along_greedy_texts_is_that_of_evaluate(benchmark, prompts, tmp_path):
    report = benchmark.main(arguments(prompts, "--arms", "stage1", "--tree-prompts", "2"))
    found = report["arms"]["stage1/0"]["results"]["questions T=0"]
    length = sum(report["texts"]["questions T=0"]["tokens"]) / sum(found["chain"])
    assert all(count == int(count) for count in found["chain"])
    options = {"temperatures": [0.0], "max_new_tokens": 24, "warmup": 0, "bootstrap": 100, "draft_threshold": 0.0}
    config = EvaluateConfig(**PAIR, prompts=[str(prompts)], output_dir=str(tmp_path), window_size=10, **options)
    evaluate.main(config)
    measured = json.loads((tmp_path / "metrics.json").read_text())["results"]["questions T=0"]
    assert length == pytest.approx(measured["acceptance_length"])
    assert len(found["tree 60"]) == 2 and sum(found["tree 60"]) <= sum(found["chain"][:2])


@pytest.mark.parametrize("anchor", [True, False])
def test_acceptance_of_blocks_along_greedy_texts_is_that_of_decoding(benchmark, anchor):
    target, drafter = trained_block(predict_from_anchor=anchor, markov_rank=4 * anchor)
    frozen, accepted = FrozenTarget(copy.deepcopy(target), drafter.config.target_taps), []
    for ids, _ in prompt_batches(1, 6, seed=7):
        out = generate_with(target, drafter, ids, config={"window_size": 5, "max_new_tokens": 24})
        stands = Along(frozen, out.sequences.tolist(), [ids.shape[1]], PAD).windows(drafter, 5).stands
        found = walk([stands[0]], 5, room=24)
        assert (found.drafted, found.accepted) == (out.acceptance.drafted, out.acceptance.accepted)
        assert benchmark.acceptance.verifications(stands, [23]) == [len(out.acceptance.gained[0])]
        accepted += found.accepted[0]
    assert {0, 1, 2} <= set(accepted)


@pytest.mark.parametrize("kind", ["eagle3", "block"])
def test_acceptance_read_along_sampled_texts_is_that_of_sampled_decoding(benchmark, kind):
    """The mean over texts of the expected verifications equals the mean of really counted ones."""
    target, drafter = make_pair(draft_vocab_size=20)
    rows, new, prompt = 1500, 8, [3, 9, 4, 7, 1]
    if kind == "block":
        drafter = block_drafter(target.model, markov_rank=4)
        target.taps = drafter.config.target_taps
    else:
        with torch.no_grad():  # a drafter that knows something, and misses twelve tokens altogether
            drafter.lm_head.weight.copy_(3 * target.model.get_output_embeddings().weight[drafter.draft_columns()])
    inputs = torch.tensor([prompt] * rows)
    mask = torch.ones_like(inputs)
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": new, "pad_token_id": 0}
    config = GenerationConfig(**sampling, window_size=3, return_dict_in_generate=True, cuda_graphs=False)
    out = target.model.generate(inputs, attention_mask=mask, generation_config=config, assistant_model=drafter)
    counted = torch.tensor([len(gained) for gained in out.acceptance.gained], dtype=torch.float64)
    texts = target.model.generate(inputs, attention_mask=mask, generation_config=GenerationConfig(**sampling)).tolist()
    windows = benchmark.acceptance.Along(target, texts, [len(prompt)] * rows, 0).windows(drafter, 3)
    read = torch.tensor(benchmark.acceptance.verifications(windows.chances, [new - 1] * rows), dtype=torch.float64)
    error = math.sqrt(float(counted.var() + read.var()) / rows)
    assert float(counted.mean()) < new - 1.2  # something was accepted
    assert float(read.mean()) == pytest.approx(float(counted.mean()), abs=4 * error)
    assert read.var() < counted.var()  # the coins' noise is gone


def test_verifications_by_hand(benchmark):
    stands = torch.tensor(
        [[[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], [[0.5, 1.0], [0.0, 0.0], [0.0] * 2, [0.0] * 2]]
    )
    # text 1: 4 tokens to gain, 2 + 1 from the first window, then a window at 3 that gains the last
    # text 2: 2 tokens to gain, at once with probability 0.5, else with a second window
    assert benchmark.acceptance.verifications(stands, [4, 2]) == [2.0, 1.5]


def test_the_command_resumes_and_compares(benchmark, prompts, tmp_path, capsys, monkeypatch):
    output = tmp_path / "objectives.json"
    given = arguments(prompts, "--seeds", "1", "--tree-prompts", "1", "--output", str(output), "--arms")
    benchmark.main([*given, "stage1,cst 3e-4"])
    raw = tmp_path / "raw" / "objectives.json"
    before = json.loads(raw.read_text())["arms"]
    report = benchmark.main([*given, "stage1,cst 3e-4,exact text-rule alternated,exact text-rule + 3 lk averaged,gto"])
    assert {key: report["arms"][key] for key in before} == before and len(report["arms"]) == 5
    row = report["arms"]["exact text-rule alternated/0"]
    assert row["steps"] == 2 and len(row["curve"]) == 2
    assert row["curve"][0]["reward"] >= 0 and "reward" not in row["curve"][1]  # the second step is CST's
    summary = json.loads(output.read_text())
    for part in ("T=0", "T=1", "tree 60, T=0", "tree 4, T=0"):
        assert benchmark.comparison.best_cst(summary["parts"][part]) == "cst 3e-4"
        assert all(1 <= length <= 11 for length in summary["parts"][part]["lengths"].values())
    assert summary["hardware"] and summary["versions"]["torch"] and summary["arms"]["gto"]["steps"] == [2, 2]
    assert "--arms" in summary["command"] and json.loads(raw.read_text()) == report
    assert "| exact text-rule alternated | 2 |" in capsys.readouterr().out
    benchmark.comparison.main([str(output), "--control", "cst 3e-4"])
    found = capsys.readouterr().out
    parts = (summary["parts"][part]["differences"]["cst 3e-4"]["gto"] for part in ("T=0", "T=1"))
    shown = (f"{difference:+.3f} [" for difference, _, _ in parts)
    (row,) = (line for line in found.splitlines() if line.startswith("| gto |"))
    assert all(cell.startswith(figure) for cell, figure in zip(row.split(" | ")[1:], shown))
    with pytest.raises(SystemExit):
        benchmark.comparison.main([str(output), "--control", "nobody"])
    assert "no summary has an arm 'nobody'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="other settings"):
        benchmark.main([*given, "stage1", "--batch-size", "3"])
    monkeypatch.setitem(benchmark.ARMS, "cst 3e-4", ({"preset": "cst", "learning_rate": 1e-3}, 3))
    with pytest.raises(ValueError, match="cst 3e-4/0 was trained with another recipe"):
        benchmark.main([*given, "cst 3e-4"])


def made_report(path, arms: dict, **settings) -> dict:
    """A raw report of two prompts with 6 and 4 tokens at each temperature, the second looping; its summary in ``path``.

    ``arms``: "ARM/SEED" or an arm of seed 0 -> verifications of the two prompts, with a tree of 4 as well.
    """
    texts = {f"chats T={t}": {"tokens": [6, 4], "loops": [False, True]} for t in (0, 1)}
    rows = {
        arm if "/" in arm else f"{arm}/0": {
            "steps": 3,
            "results": {name: {"chain": c, "tree 4": c[:1]} for name in texts},
        }
        for arm, c in arms.items()
    }
    report = {"settings": {"tree_prompts": 0, "tree_nodes": "4", **settings}, "texts": texts, "arms": rows}
    report["bootstrap"] = 50
    from benchmarks.report import summarize, write  # found only while the fixture of this module is

    write(summarize(report), path)
    return report


def test_a_summary_by_hand(benchmark, tmp_path):
    """Seeds are means of verifications; texts that loop are left out apart; trees are of the first seed and prompts."""
    arms = {"cst 3e-4": [3, 2], "cst 3e-4/1": [5, 4], "lk": [2, 2], "lk/1": [1, 1], "lk/2": [3, 1]}
    report = made_report(tmp_path / "objectives.json", arms, tree_prompts=1)
    report["arms"]["lk/1"]["steps"] = 5
    summary = benchmark.comparison.figures(report)
    lengths = {name: part["lengths"] for name, part in summary["parts"].items()}
    assert lengths["T=0"] == lengths["T=1"] == pytest.approx({"cst 3e-4": 10 / 7, "lk": 10 / (2 + 4 / 3)})
    assert lengths["T=0, not looping"] == pytest.approx({"cst 3e-4": 6 / 4, "lk": 6 / 2})
    assert lengths["tree 4, T=0"] == pytest.approx({"cst 3e-4": 6 / 3, "lk": 6 / 2})
    part = summary["parts"]["T=0"]
    difference, low, high = gained = benchmark.comparison.gain(part, "lk", "cst 3e-4")
    assert difference == pytest.approx(3 - 10 / 7) and low <= difference <= high
    assert benchmark.comparison.gain(part, "cst 3e-4", "lk") == (-difference, -high, -low)
    assert summary["seeds"]["T=1"]["lk"] == pytest.approx([10 / 4, 10 / 2, 10 / 4])
    assert summary["domains"]["chats T=0"]["lk"] == pytest.approx(3)
    assert summary["looping"] == {"chats T=0": 0.5, "chats T=1": 0.5}
    assert summary["arms"]["lk"] == {"changes": None, "seeds": 3, "steps": [3, 5]}
    assert f"| lk | 3 to 5 | 3.000 {benchmark.comparison.shown(gained)} |" in benchmark.comparison.table(summary)


def test_reports_are_compared_with_their_best_cst_in_one_picture(benchmark, tmp_path, capsys, monkeypatch):
    """By hand: 10 tokens in 5, 4 and 2 verifications are 2, 2.5 and 5 a verification: +0.5 over CST is 25%."""
    drawn = []
    overview = benchmark.comparison.overview
    monkeypatch.setattr(benchmark.comparison, "overview", lambda *given: (drawn.append(given), overview(*given)))
    paths = [tmp_path / f"objectives-{name}.json" for name in "abc"]
    made_report(paths[0], {"cst slow": [6, 4], "cst 3e-4": [3, 2], "lk": [2, 2], "eal": [1, 1]})
    made_report(paths[1], {"cst 3e-4": [1, 1], "lk": [3, 2]})
    made_report(paths[2], {"cst 3e-4": [1, 1]})
    given = ["--arms", "eal,lk", "--plot", str(tmp_path / "all.png")]
    benchmark.comparison.main([*map(str, paths), *given])
    printed = capsys.readouterr().out
    assert "| objectives-a | T=0, over cst 3e-4 | T=1, over cst 3e-4 |" in printed and "| lk | +0.500 [" in printed
    assert "objectives-c: left out" in printed and "cst slow |" not in printed
    ((found, arms, path),) = drawn
    assert list(found) == ["a", "b"] and arms == ["eal", "lk"] and path.stat().st_size > 5000
    assert list(found["a"]["T=1"]) == ["eal", "lk"] and list(found["b"]["T=0"]) == ["lk"]
    assert [rows["T=0"]["lk"][0] for rows in found.values()] == pytest.approx([25, -60])
    gain, low, high = found["a"]["T=0"]["lk"]
    assert low <= gain <= high
    with pytest.raises(SystemExit):
        benchmark.comparison.main([str(paths[0]), str(paths[0])])
    assert "two summaries have one name" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU cannot be shared")
def test_processes_share_the_arms_and_a_later_call_goes_on(benchmark, prompts, tmp_path, monkeypatch):
    """Shared or alone, in one call or two, also after a call that was cut off: the same arms, the same figures."""
    given = arguments(prompts, "--seeds", "1", "--tree-prompts", "0")
    output, part = tmp_path / "objectives.json", tmp_path / "raw" / ".objectives-1.json"
    sharing = ["--gpus", "2", "--output", str(output), "--arms"]
    shared = [*given, *sharing]
    benchmark.main(
        [*given, "--part", "stage1/0", "--output", str(tmp_path / part.name)]
    )  # as a call that was cut off leaves it
    anew = arguments(prompts, "--seeds", "1", "--tree-prompts", "0", kept=False)
    report = benchmark.main([*anew, *sharing, "stage1,cst 3e-4,exact text-rule"])
    assert list(report["arms"]) == ["stage1/0", "cst 3e-4/0", "exact text-rule/0"]
    alone = benchmark.main([*given, "--arms", "exact text-rule"])["arms"]
    assert report["arms"]["exact text-rule/0"]["results"] == alone["exact text-rule/0"]["results"]
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["objectives.json"] * 2  # summary and raw
    part.write_text(json.dumps({**report, "texts_crc32": 0}))
    with pytest.raises(ValueError, match="objectives-1.json holds arms measured with other settings or on other texts"):
        benchmark.main([*shared, "stage1"])
    part.unlink()
    benchmark.main([*shared, "stage1,cst 3e-4"])  # nothing is left to do
    monkeypatch.setattr(benchmark.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="Of 1 processes some failed"):
        benchmark.main([*shared, "lk"])


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU cannot be shared")
def test_a_terminated_parent_takes_its_children_along(benchmark, prompts, tmp_path, monkeypatch):
    ended = []

    class Child:
        def __init__(self, command, env):
            pass

        def wait(self):
            signal.raise_signal(signal.SIGTERM)

        def terminate(self):
            ended.append(self)

    monkeypatch.setattr(benchmark.subprocess, "Popen", Child)
    monkeypatch.setattr("ppow.training.provenance.git_revision", lambda folder: None)  # it starts processes too
    texts = tmp_path / "texts.json"
    given = arguments(prompts, "--tree-prompts", "0", "--texts", str(texts), "--output", str(tmp_path / "out.json"))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        benchmark.main([*given, "--gpus", "2", "--arms", "stage1,lk"])
    assert len(ended) == 2 and signal.getsignal(signal.SIGTERM) is before and texts.exists()


def test_every_arm_can_be_named(benchmark):
    assert not [name for name in benchmark.ARMS if "," in name]


def test_averaged_weights_are_the_mean_of_the_second_half(benchmark, monkeypatch):
    target, drafter = make_pair()
    given = argparse.Namespace(
        target="t", drafter="d", data="x", batch_size=1, max_length=64, train_limit=None, dtype="float32"
    )
    given.window_size, given.steps, given.cost_ratio, given.compile_loss = 3, 4, None, False
    seen, step = [], torch.optim.AdamW.step

    def watched(self, *a, **k):
        step(self, *a, **k)
        seen.append(drafter.fc.weight.detach().clone())

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    examples = [Example([3, 9, 4, 7, 1, 8, 5, 11, 2, 6], [0, 0, 0] + [1] * 7)]
    changes = {"average_from": 0.5, "learning_rate": 0.01}
    benchmark.train(benchmark.make_config(given, changes, 0), given, target, drafter, examples, 0)
    assert len(seen) == 4 and not torch.equal(seen[2], seen[3])
    torch.testing.assert_close(drafter.fc.weight.detach(), (seen[2] + seen[3]) / 2)


def test_fresh_drafters_are_compared_as_well(benchmark, prompts, tmp_path):
    """Stage 1 in the same time: from nothing, so that nothing of the given drafter is left."""
    given = arguments(prompts, "--tree-prompts", "0", "--output", str(tmp_path / "fresh.json"))
    more = ["--draft-vocab-size=100", f"--mixed={prompts.parent / 'train.jsonl'}", "--seeds=1"]
    names = ["fresh", "fresh mixed", "fresh 100 windows", "fresh shared head", "fresh block"]
    report = benchmark.main([*given, *more, "--arms", ",".join(["stage1", *names])])
    chains = {name: report["arms"][f"{name}/0"]["results"]["questions T=0"]["chain"] for name in names}
    assert chains["fresh"] == chains["fresh mixed"]  # the same texts here
    losses = {name: [row["loss"] for row in report["arms"][f"{name}/0"]["curve"]] for name in names}
    assert losses["fresh"] == losses["fresh mixed"] and len({*map(tuple, losses.values())}) >= 3
    with pytest.raises(ValueError, match="name it with --mixed"):
        benchmark.main(arguments(prompts, "--draft-vocab-size=100", "--arms", "fresh mixed"))


def test_a_block_drafter_is_compared_as_well(benchmark, prompts, tmp_path):
    """Every kind of arm trains and measures it; what it drafts is free, so rewards charge nothing."""
    target = AutoModelForCausalLM.from_pretrained(TARGET)
    drafter = block_drafter(target, block_size=5, num_hidden_layers=1, markov_rank=4, initializer_range=0.02)
    drafter.float().save_pretrained(tmp_path / "block")
    names = ["stage1", "cst 3e-4", "lk", "exact text-rule + 3 lk", "exact text-rule", "exact sampling + 3 lk"]
    names += ["ppow", "gto", "cst dspark muon", "fresh block of 8"]
    more = ["--tree-prompts=1", "--seeds=1", "--window-size=5", f"--drafter={tmp_path / 'block'}"]
    arms = benchmark.main(arguments(prompts, *more, "--arms", ",".join(names)))["arms"]
    configs = {name: arms[f"{name}/0"]["config"] for name in names[1:]}
    assert {configs[name]["cost_ratio"] for name in names[1:-2]} == {0.0}
    assert configs["cst dspark muon"]["block_loss"] == "dspark"
    for row in arms.values():
        found = row["results"]["questions T=0"]
        assert len(found["chain"]) == 3 and len(found["tree 60"]) == 1 and not any(map(math.isnan, found["chain"]))
    for row in arms["exact text-rule/0"]["curve"]:
        assert row["reward"] == pytest.approx(row["acceptance_length"] - 1, abs=1e-4) and row["gradient_norm"] > 0


def test_a_spent_budget_stops_before_the_next_arm(benchmark, prompts, capsys):
    report = benchmark.main(arguments(prompts, "--budget-seconds", "0", "--arms", "stage1", "--tree-prompts", "0"))
    assert report["arms"] == {} and "stopped before stage1/0" in capsys.readouterr().out


def test_every_arm_is_a_valid_configuration(benchmark, prompts):
    given = benchmark.parse(arguments(prompts))
    for name, (changes, _) in benchmark.ARMS.items():
        if changes is not None:
            config = benchmark.make_config(argparse.Namespace(**vars(given) | {"mixed": "half.jsonl"}), changes, 0)
            assert config.data == ("half.jsonl" if "mixed" in changes else given.data)
            if isinstance(config, SupervisedConfig):
                continue
            rolls = objective_of(config).batch == "rollouts"  # then every arm rolls out 64 times from a text
            assert not rolls or config.group_size * config.windows_per_sequence == 64, name
    keys = [key for key, _, _ in benchmark.arm_list(given)]
    assert len(set(keys)) == len(keys) and keys.index("ppow/1") > keys.index("exact text-rule + 3 lk 1e-4/0")
    assert not any("averaged mixed" in key for key in keys)  # which the data for is not given
    with_mixed = benchmark.arm_list(benchmark.parse(arguments(prompts, "--mixed", "half.jsonl")))
    assert "cst averaged mixed/0" in [key for key, _, _ in with_mixed]
    with pytest.raises(SystemExit):
        benchmark.parse(arguments(prompts, "--arms", "no such arm"))
