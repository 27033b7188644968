"""Measuring and showing: figures worked by hand, and the commands on a tiny pair."""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from ppow import PPOWConfig, PPOWDrafter
from ppow.training import demo, evaluate
from ppow.training.config import DemoConfig, EvaluateConfig


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_tokenizer, tiny_config):
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(folder / "target")
    tiny_tokenizer.save_pretrained(folder / "target")
    PPOWDrafter(PPOWConfig.from_target(tiny_config, draft_vocab_size=100)).save_pretrained(folder / "drafter")
    lines = [{"id": "a", "category": "x", "turns": ["Add one and two.", "And three?"]}]
    lines.append({"id": "b", "category": "x", "turns": ["def add(a, b):"], "raw_completion": True})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# -- figures -----------------------------------------------------------------------------------------------------------


def sample(gained, accepted, drafted, prompt=0, tokens=10, seconds=1.0, plain_seconds=2.0, loops=False):
    return evaluate.Sample(prompt, tokens, plain_seconds, tokens, seconds, gained, accepted, drafted, True, loops)


def test_figures_by_hand():
    samples = [sample([3, 1], [2, 0], [2, 2]), sample([2], [1], [2], 1, plain_seconds=4.0, loops=True)]
    assert evaluate.acceptance_length(samples) == pytest.approx(6 / 3)  # pooled, not the mean of 2 and 2
    # first position: accepted in 2 of 3 windows; second: in 1 of the 2 that got there
    assert evaluate.summarize(samples, 200, seed=0)["per_position"] == pytest.approx([2 / 3, 1 / 2])
    # plain: mean of 10 / 2 and 10 / 4 tokens per second = 3.75; with the drafter 10
    assert evaluate.speedup(samples) == pytest.approx(10 / 3.75)
    summary = evaluate.summarize(samples, 200, seed=0)
    assert summary["loops"] == 1 and summary["acceptance_length_without_loops"] == 2
    low, high = summary["speedup_95"]
    assert low == pytest.approx(2) and high == pytest.approx(4)  # both prompts the first, or both the second
    assert "| 2.00 (2.00-2.00) | 2.00 | 4 | 10 | 2.67x" in evaluate.table({"x T=0": summary})
    # two samples of one prompt are drawn together: nothing is left to vary
    one = evaluate.summarize([dataclasses.replace(s, prompt=7) for s in samples], 200, seed=0)
    assert one["prompts"] == 1 and one["samples"] == 2 and one["speedup_95"] == pytest.approx([10 / 3.75] * 2)


def test_loops_are_recognised():
    assert evaluate.ends_in_a_loop([9, 1, 2, 1, 2, 1, 2])
    assert evaluate.ends_in_a_loop([5, 5, 5])
    assert not evaluate.ends_in_a_loop([1, 2, 1, 2, 1, 3])
    assert not evaluate.ends_in_a_loop([5, 5])


# -- evaluate and demo -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafting", [{"window_size": 3}, {"tree_depth": 2, "tree_top_k": 2, "tree_nodes": 4}])
def test_evaluate_writes_true_figures(pair, tmp_path, drafting, capsys):
    config = EvaluateConfig(
        target=str(pair / "target"),
        drafter=str(pair / "drafter"),
        output_dir=str(tmp_path),
        prompts=[str(pair / "questions.jsonl")],
        max_new_tokens=12,
        warmup=1,
        bootstrap=100,
        **drafting,
    )
    evaluate.main(config)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    greedy, sampled = metrics["results"].values()
    assert greedy["prompts"] == 2 and greedy["samples"] == 3  # two turns and one completion
    assert greedy["identical"] == 3
    assert metrics["drafting"].items() >= drafting.items()
    assert 1 <= greedy["acceptance_length"] <= 4 and len(greedy["per_position"]) <= 3
    assert greedy["speedup"] > 0 and sampled["samples"] == 3
    assert (tmp_path / "acceptance.png").stat().st_size > 1000
    assert "speedup (95%)" in capsys.readouterr().out
    assert str(pair) not in (tmp_path / "metrics.json").read_text()


def test_a_baseline_is_measured_on_the_same_prompts(pair, tmp_path, capsys):
    config = EvaluateConfig(
        target=str(pair / "target"),
        drafter=str(pair / "drafter"),
        baseline=str(pair / "drafter"),
        output_dir=str(tmp_path),
        prompts=[str(pair / "questions.jsonl")],
        temperatures=[0.0],
        max_new_tokens=12,
        bootstrap=100,
    )
    evaluate.main(config)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (ours,), (other,) = metrics["results"].values(), metrics["baseline"].values()
    assert ours["acceptance_length"] == other["acceptance_length"]
    assert ours["gain"] == {"acceptance_length": 0.0, "acceptance_length_95": [0.0, 0.0]}
    assert metrics["baseline_drafting"] == metrics["drafting"]
    assert "acceptance length +0.00" in capsys.readouterr().out


def evaluation(pair, tmp_path, **changes) -> EvaluateConfig:
    names = {"target": str(pair / "target"), "drafter": str(pair / "drafter"), "output_dir": str(tmp_path / "out")}
    return EvaluateConfig(**{**names, "prompts": [str(pair / "questions.jsonl")], **changes})


def test_what_cannot_be_written_or_told_apart_is_refused_before_measuring(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", None)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        evaluate.main(evaluation(pair, tmp_path, output_dir=str(tmp_path / "file")))
    (tmp_path / "questions.jsonl").write_text(json.dumps({"prompt": "Hello?"}))
    two = [str(pair / "questions.jsonl"), str(tmp_path / "questions.jsonl")]
    with pytest.raises(ValueError, match="Two sets of prompts are called 'questions'"):
        evaluate.main(evaluation(pair, tmp_path, prompts=two))
    with pytest.raises(ValueError, match="is a folder; name a .json file"):
        demo.main(DemoConfig(output=str(tmp_path)))


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("target", "nowhere", "--target nowhere is no folder here, and as a Hub id: "),
        ("baseline", "nowhere", "--baseline nowhere is no folder here, and as a Hub id: "),
        ("target", "EMPTY", "--target .*: this folder holds no config.json"),
        ("target", "DRAFTER", "--target .*: this is a drafter; name the target that it drafts for"),
        ("drafter", "CUT", "--drafter .*: .*model.safetensors is damaged or truncated"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named_with_its_option(pair, tmp_path, option, given, message):
    (tmp_path / "empty").mkdir()
    shutil.copytree(pair / "drafter", tmp_path / "cut")
    (weights,) = (tmp_path / "cut").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:3000])
    places = {"EMPTY": tmp_path / "empty", "DRAFTER": pair / "drafter", "CUT": tmp_path / "cut"}
    with pytest.raises(ValueError, match=message):
        evaluate.main(evaluation(pair, tmp_path, **{option: str(places.get(given, given))}))


def test_the_gain_is_a_paired_difference():
    better = [sample([4], [3], [3], prompt=0), sample([2], [1], [3], prompt=1)]
    worse = [sample([3], [2], [3], prompt=0), sample([1], [0], [3], prompt=1)]
    found = evaluate.gain(better, worse, 200, seed=0)
    assert found == {"acceptance_length": 1.0, "acceptance_length_95": [1.0, 1.0]}  # every prompt gains exactly one


def test_demo_streams_and_checks(pair, tmp_path, capsys, monkeypatch):
    names = {"target": str(pair / "target"), "drafter": str(pair / "drafter")}
    prompts = str(pair / "questions.jsonl")
    figures = tmp_path / "figures.json"
    demo.main(DemoConfig(**names, prompts=prompts, max_new_tokens=8, limit=1, window_size=3, output=str(figures)))
    answers = json.loads(figures.read_text())["answers"]
    assert len(answers) == 1 and answers[0]["identical"] and answers[0]["speedup"] > 0
    shown = capsys.readouterr().out
    assert "> Add one and two." in shown and "identical: yes" in shown and "median speedup" in shown
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="holds no model"):
        demo.main(DemoConfig())


def test_demo_fails_when_an_answer_differs(pair, monkeypatch, capsys):
    from ppow.training import evaluate as measuring

    original = measuring.timed

    def tampered(target, seed, ids, **arguments):
        out, seconds = original(target, seed, ids, **arguments)
        if "assistant_model" in arguments:
            out.sequences[0, -1] += 1
        return out, seconds

    monkeypatch.setattr(measuring, "timed", tampered)
    names = {"target": str(pair / "target"), "drafter": str(pair / "drafter")}
    with pytest.raises(ValueError, match="differ from the plain"):
        demo.main(DemoConfig(**names, prompts=str(pair / "questions.jsonl"), max_new_tokens=8, limit=1))
    assert "identical: NO" in capsys.readouterr().out
