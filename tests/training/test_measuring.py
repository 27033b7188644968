"""Measuring and showing: figures worked by hand, and the commands on a tiny pair."""

import dataclasses
import json
import shutil
import time
from types import SimpleNamespace

import pytest
from transformers import LlamaForCausalLM

from ppow import PPOWConfig, PPOWDrafter
from ppow.drafting_ppow import DraftOptions, what_was_drafted
from ppow.training import demo, evaluate, figures, smollm2
from ppow.training.config import DemoConfig, EvaluateConfig
from ppow.training.samples import Sample, SampleLog
from ppow.transcript_ppow import Acceptance


@pytest.fixture(scope="module")
def pair(tmp_path_factory, save_target, tiny_config):
    folder = tmp_path_factory.mktemp("pair")
    save_target(folder / "target")
    PPOWDrafter(PPOWConfig.from_target(tiny_config, draft_vocab_size=100)).save_pretrained(folder / "drafter")
    lines = [{"id": "a", "category": "x", "turns": ["Add one and two.", "And three?"]}]
    lines.append({"id": "b", "category": "x", "turns": ["def add(a, b):"], "raw_completion": True})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# -- figures -----------------------------------------------------------------------------------------------------------


def sample(gained, accepted, drafted, prompt=0, tokens=10, seconds=1.0, plain_seconds=2.0, loops=False):
    return Sample(prompt, tokens, plain_seconds, tokens, seconds, gained, accepted, drafted, True, loops)


def test_figures_by_hand():
    samples = [sample([3, 1], [2, 0], [2, 2]), sample([2], [1], [2], 1, plain_seconds=4.0, loops=True)]
    assert figures.acceptance_length(samples) == pytest.approx(6 / 3)  # pooled, not the mean of 2 and 2
    cut = dataclasses.replace(samples[0], verified=[2, 2])  # both drafts of the last window stood, behind the end
    assert figures.engine_acceptance_length([cut, samples[1]]) == pytest.approx(1 + 5 / 3)
    assert figures.engine_acceptance_length(samples) == pytest.approx(1 + 3 / 3)
    # first position: accepted in 2 of 3 windows; second: in 1 of the 2 that got there
    assert figures.summarize(samples, 200, seed=0)["per_position"] == pytest.approx([2 / 3, 1 / 2])
    # plain: mean of 10 / 2 and 10 / 4 tokens per second = 3.75; with the drafter 10
    assert figures.speedup(samples) == pytest.approx(10 / 3.75)
    summary = figures.summarize(samples, 200, seed=0)
    assert summary["loops"] == 1 and summary["acceptance_length_without_loops"] == 2
    low, high = summary["speedup_95"]
    assert low == pytest.approx(2) and high == pytest.approx(4)  # both prompts the first, or both the second
    assert "| 2.00 (2.00-2.00) | 2.00 | 4 | 10 | 2.67x" in figures.table({"x T=0": summary})
    # two samples of one prompt are drawn together: nothing is left to vary
    one = figures.summarize([dataclasses.replace(s, prompt=7) for s in samples], 200, seed=0)
    assert one["prompts"] == 1 and one["samples"] == 2 and one["speedup_95"] == pytest.approx([10 / 3.75] * 2)


def test_loops_are_recognised():
    assert figures.ends_in_a_loop([9, 1, 2, 1, 2, 1, 2])
    assert figures.ends_in_a_loop([5, 5, 5])
    assert not figures.ends_in_a_loop([1, 2, 1, 2, 1, 3])
    assert not figures.ends_in_a_loop([5, 5])


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
    assert metrics["drafting"].items() >= drafting.items() and metrics["drafting"]["cuda_graphs"] is False
    assert greedy["reference"] == greedy["reference_agrees"] == 3 and greedy["near_ties"] == greedy["faults"] == 0
    assert sampled["reference"] == 0
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
    with pytest.raises(ValueError, match="--output-dir .* is a file; name a folder"):
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
    found = figures.gain(better, worse, 200, seed=0)
    assert found == {"acceptance_length": 1.0, "acceptance_length_95": [1.0, 1.0]}  # every prompt gains exactly one


def test_demo_streams_and_checks(pair, tmp_path, capsys, monkeypatch):
    names = {"target": str(pair / "target"), "drafter": str(pair / "drafter")}
    prompts = str(pair / "questions.jsonl")
    file = tmp_path / "figures.json"
    demo.main(DemoConfig(**names, prompts=prompts, max_new_tokens=8, limit=1, window_size=3, output=str(file)))
    answers = json.loads(file.read_text())["answers"]
    assert len(answers) == 1 and answers[0]["identical"] and answers[0]["speedup"] > 0
    shown = capsys.readouterr().out
    assert "> Add one and two." in shown and "identical: yes" in shown and "median speedup" in shown
    monkeypatch.setattr(smollm2, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="holds no drafter"):
        demo.main(DemoConfig())
    monkeypatch.setattr(smollm2, "PROMPTS", tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="name --prompts"):
        demo.main(DemoConfig(**names))


def test_demo_takes_turns_and_tells_the_range_of_its_repetitions(pair, tmp_path, capsys, monkeypatch):
    """By hand: 8 tokens in 8, 8 and 4 s plain, in 4, 2 and 4 s with the drafter: ratios 2, 4 and 1, medians 1 and 2."""
    from ppow.training import evaluate as measuring

    original, order, given = measuring.timed, [], {"plain": [0.1, 8, 8, 4], "ours": [4, 2, 4]}

    def timed(target, seed, ids, **arguments):
        out, _ = original(target, seed, ids, **arguments)
        order.append("ours" if "assistant_model" in arguments else "plain")
        return out, given[order[-1]].pop(0)

    monkeypatch.setattr(measuring, "timed", timed)
    names = {"target": str(pair / "target"), "drafter": str(pair / "drafter"), "prompts": str(pair / "questions.jsonl")}
    demo.main(DemoConfig(**names, max_new_tokens=8, limit=1, output=str(tmp_path / "out.json")))
    warm, *turns = order
    assert warm == "plain" and turns == ["plain", "ours", "ours", "plain", "plain", "ours"]
    (answer,) = json.loads((tmp_path / "out.json").read_text())["answers"]
    assert (answer["plain_tokens_per_second"], answer["tokens_per_second"], answer["speedup"]) == (1, 2, 2)
    assert answer["speedup_range"] == [1, 4]
    assert "speedup 2.00x (1.00 to 4.00): plain 1 tokens/s, with drafter 2;" in capsys.readouterr().out


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
    with pytest.raises(ValueError, match="1 answers differ from the plain target's, and rounding does not explain it"):
        demo.main(DemoConfig(**names, prompts=str(pair / "questions.jsonl"), max_new_tokens=8, limit=1))
    shown = capsys.readouterr().out
    assert "identical: NO, fault at token 8" in shown and "rounding explains" in shown


# -- what ran, what is kept ------------------------------------------------------------------------------------------


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def undeclared(pair, tmp_path):
    """A target without generation_config.json, whose configs transformers derives from config.json."""
    shutil.copytree(pair / "target", tmp_path / "target")
    (tmp_path / "target" / "generation_config.json").unlink()
    return str(tmp_path / "target")


def test_drafting_options_reach_a_target_without_a_generation_config(pair, tmp_path, undeclared):
    assert LlamaForCausalLM.from_pretrained(undeclared).generation_config._from_model_config
    evaluate.main(evaluation(pair, tmp_path, target=undeclared, window_size=2, temperatures=[0.0], max_new_tokens=8))
    rows = read(tmp_path / "out" / "samples.jsonl")[1:]
    assert max(length for row in rows for sample in row["samples"] for length in sample["drafted"]) == 2
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["drafting"]["window_size"] == 2 and len(metrics["results"]["questions T=0"]["per_position"]) <= 2


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        ({"tree_depth": 2, "tree_top_k": 2, "tree_nodes": 3}, {"window_size": 10}),  # the target's own config wins
        ({"draft_threshold": 0.2}, {"window_size": 3, "draft_threshold": 0.1}),
    ],
)
def test_what_was_asked_for_and_did_not_run_is_refused(pair, tmp_path, own, asked, monkeypatch):
    honest = evaluate.generation_configs

    def heedless(target, temperature, max_new_tokens, drafting):
        plain, ours = honest(target, temperature, max_new_tokens, drafting)
        for name, value in own.items():
            setattr(ours, name, value)
        return plain, ours

    monkeypatch.setattr(evaluate, "generation_configs", heedless)
    with pytest.raises(ValueError, match="was asked for, but DraftOptions.* is what ran"):
        evaluate.main(evaluation(pair, tmp_path, temperatures=[0.0], max_new_tokens=8, **asked))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_windows_that_are_not_those_of_the_options_are_refused():
    ran = DraftOptions(window_size=4, window_schedule="constant")
    for drafted, gained in (([4, 5], [2, 1]), ([3, 3], [3, 2])):  # too long; cut short where there was room
        output = SimpleNamespace(drafting=ran, acceptance=Acceptance([drafted], [[0, 0]], [gained]))
        with pytest.raises(ValueError, match="tokens were drafted where"):
            what_was_drafted(output, {"window_size": 4})
    short = SimpleNamespace(drafting=ran, acceptance=Acceptance([[3, 1]], [[1, 0]], [[2, 1]]))  # the text had no room
    assert what_was_drafted(short, {"window_size": 4, "tree_nodes": None}) == ran
    ran = DraftOptions(window_size=4, window_schedule="gammatune")  # its windows may be shorter, not longer
    assert what_was_drafted(SimpleNamespace(drafting=ran, acceptance=Acceptance([[3]], [[3]], [[4]])), {}) == ran
    with pytest.raises(ValueError, match="Windows of up to 5 tokens were drafted where chains of up to 4"):
        what_was_drafted(SimpleNamespace(drafting=ran, acceptance=Acceptance([[5]], [[3]], [[4]])), {})


class Stopped(Exception):
    pass


def test_an_evaluation_that_was_stopped_goes_on_behind_the_last_prompt(pair, tmp_path, monkeypatch):
    config = evaluation(pair, tmp_path, max_new_tokens=8, warmup=1, bootstrap=100, repetitions=2)
    honest, done = evaluate.compare, []

    def stopping(*arguments):
        if len(done) == 5:  # one to warm up, four of six at temperature 0
            raise Stopped
        done.append(honest(*arguments))
        return done[-1]

    monkeypatch.setattr(evaluate, "compare", stopping)
    with pytest.raises(Stopped):
        evaluate.main(config)
    log = tmp_path / "out" / "samples.jsonl"
    kept = log.read_bytes()
    assert len(read(log)) == 5 and not (tmp_path / "out" / "metrics.json").exists()
    log.write_bytes(kept + b'{"set": "questions T=0", "ind')  # the kill came while a line was written
    with pytest.raises(ValueError, match="broken off. Pass --resume to go on"):
        evaluate.main(config)
    done.clear()
    monkeypatch.setattr(evaluate, "compare", lambda *arguments: done.append(1) or honest(*arguments))
    evaluate.main(dataclasses.replace(config, resume=True))
    assert len(done) == (1 + 2) + (1 + 6)  # both temperatures warm up
    assert log.read_bytes().startswith(kept)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [result["samples"] for result in metrics["results"].values()] == [6, 6]
    # nothing is left to do: the same figures, and other resamples if they are asked for
    done.clear()
    evaluate.main(dataclasses.replace(config, resume=True, bootstrap=200))
    again = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert not done and again["results"]["questions T=0"]["speedup"] == metrics["results"]["questions T=0"]["speedup"]


def test_a_folder_of_another_kind_is_refused_untouched(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", None)
    out, config = tmp_path / "out", evaluation(pair, tmp_path)
    out.mkdir()
    (out / "metrics.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds an earlier result; move it away, or give another folder"):
            evaluate.main(dataclasses.replace(config, resume=resume))
    (out / "model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something else \(model.safetensors\)"):
        evaluate.main(config)
    assert sorted(file.name for file in out.iterdir()) == ["metrics.json", "model.safetensors"]


def test_samples_of_two_evaluations_do_not_mix(tmp_path):
    log = SampleLog(tmp_path, {"seed": 0, "weights": {"target": "a"}}, resume=False)
    log.add("x T=0", 0, [sample([1], [0], [2])])
    log.close()
    kept = log.path.read_bytes()
    with pytest.raises(ValueError, match="with other seed, weights, and figures of two runs do not mix"):
        SampleLog(tmp_path, {"seed": 1, "weights": {"target": "b"}}, resume=True)
    log = SampleLog(tmp_path, {"seed": 0, "weights": {"target": "a"}}, resume=True)
    assert log.get("x T=0", 0) == [sample([1], [0], [2])] and log.get("x T=0", 1) is None
    log.close()
    assert log.path.read_bytes() == kept
    log.path.write_text('{"prompt": "mine"}\n')
    with pytest.raises(ValueError, match="was not written by `ppow evaluate`"):
        SampleLog(tmp_path, {}, resume=True)
    assert log.path.read_text() == '{"prompt": "mine"}\n'


def test_a_fault_is_said_and_saved_and_ends_the_command(pair, tmp_path, monkeypatch, capsys):
    honest = evaluate.timed

    def tampered(target, seed, ids, **arguments):
        out, seconds = honest(target, seed, ids, **arguments)
        if "assistant_model" in arguments:
            out.sequences[0, -1] = (out.sequences[0, -1] + 1) % 300
        return out, seconds

    monkeypatch.setattr(evaluate, "timed", tampered)
    config = evaluation(pair, tmp_path, max_new_tokens=8, warmup=0, temperatures=[0.0])
    with pytest.raises(ValueError, match="3 of these answers are NOT the target's own"):
        evaluate.main(config)
    assert "0 of 3, **3 FAULTS** | 0 of 3 |" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]["questions T=0"]
    assert (result["faults"], result["near_ties"], result["reference_agrees"]) == (3, 0, 0)
    with pytest.raises(ValueError, match="NOT the target's own"):  # also of one that only reads what is kept
        evaluate.main(dataclasses.replace(config, resume=True))


def test_figures_tell_near_ties_and_faults_apart():
    tie = {"position": 1, "token": 2, "expected": 3, "gap": 0.1, "rounding": 0.2, "verdict": "near tie"}
    fault = {**tie, "gap": 0.5, "verdict": "fault"}
    base = dataclasses.replace(sample([1], [0], [1]), reference={})
    samples = [base] + [
        dataclasses.replace(base, identical=False, difference=difference, reference=reference)
        for difference, reference in ((tie, {}), (tie, tie), (fault, {}), (tie, fault))
    ]
    summary = figures.summarize(samples, 100, seed=0)
    assert (summary["identical"], summary["near_ties"], summary["faults"]) == (1, 2, 2)
    assert (summary["reference"], summary["reference_agrees"]) == (5, 3)
    assert "| 1 of 5, 2 near ties, **2 FAULTS** | 3 of 5 |" in figures.table({"x T=0": summary})
    lines = figures.faults("x T=0", samples)
    assert len(lines) == 2 and "sample 4" in lines[0] and "stock generate" in lines[0] and "without drafts" in lines[1]


def test_what_measuring_took_is_told_without_loading_and_warming_up(pair, tmp_path, monkeypatch):
    answers, compare = [], evaluate.compare

    def slow(*given):
        answers.append(1)
        return compare(*given)

    monkeypatch.setattr(evaluate, "compare", slow)  # every answer takes 1,000 s more
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 1000.0 * len(answers))
    monkeypatch.setattr(evaluate, "time", clock)
    seconds = evaluate.main(evaluation(pair, tmp_path, temperatures=[0.0], max_new_tokens=4, warmup=2))
    measured = len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) - 1  # the first says what they are of
    assert round(seconds / 1000) == measured == len(answers) - 2
