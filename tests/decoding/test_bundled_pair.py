"""The bundled pair: loads, is lossless, sells what its cards say."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ppow import PPOWDrafter
from ppow.model_cards import render
from ppow.training.card import card

BUNDLED = Path(__file__).resolve().parents[2] / "bundled"
QUESTIONS = [
    "Tom has 12 apples. He buys 8 more apples. How many apples does he have?",
    "I want to book a table at a restaurant.",
    "A book has 120 pages. Anna reads 15 pages a day. How many days does she need?",
]
DRAFTING = [{"window_size": 10}, {"window_size": 5, "draft_threshold": 0.3}]
DRAFTING += [{"tree_depth": 5, "tree_top_k": 4, "tree_nodes": 20}]


@pytest.fixture(scope="module")
def pair():
    target = AutoModelForCausalLM.from_pretrained(BUNDLED / "target", dtype=torch.float32)
    drafter = PPOWDrafter.from_pretrained(BUNDLED / "drafter", dtype=torch.float32)
    return AutoTokenizer.from_pretrained(BUNDLED / "target", padding_side="left"), target, drafter


def encode(tokenizer, questions):
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


def with_drafting(target, **settings):
    return GenerationConfig(**(target.generation_config.to_diff_dict() | settings))


@pytest.mark.parametrize("drafting", DRAFTING)
@pytest.mark.parametrize("together", [False, True])
def test_greedy_answers_are_the_targets_own(pair, drafting, together):
    tokenizer, target, drafter = pair
    gained = verifications = 0
    for questions in [QUESTIONS] if together else [[question] for question in QUESTIONS]:
        inputs = encode(tokenizer, questions)
        expected = target.generate(**inputs, do_sample=False, max_new_tokens=60)
        config = with_drafting(target, do_sample=False, max_new_tokens=60, return_dict_in_generate=True, **drafting)
        found = target.generate(**inputs, generation_config=config, assistant_model=drafter)
        assert torch.equal(found.sequences, expected)
        gained += sum(map(sum, found.acceptance.gained))
        verifications += found.acceptance.verifications
    assert gained / verifications > 1.5  # it does draft


@pytest.mark.parametrize("draws", [1000, pytest.param(20000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("drafting", [DRAFTING[0], DRAFTING[2]])
def test_sampled_answers_have_the_targets_distribution(pair, drafting, draws):
    """Answers of three tokens, each among the target's three best: chi-square against exact probabilities."""
    tokenizer, target, drafter = pair
    inputs = tokenizer("Tom has 12 apples", return_tensors="pt")  # short, since it is read for every draw
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 3, "top_p": 1.0, "max_new_tokens": 3}
    exact = three_token_distribution(target, inputs["input_ids"], temperature=1.5, top_k=3)
    config = with_drafting(target, **settings, **drafting)
    batch = {name: tensor.expand(500, -1) for name, tensor in inputs.items()}
    torch.manual_seed(0)
    counts = dict.fromkeys(exact, 0)
    for _ in range(draws // 500):
        out = target.generate(**batch, generation_config=config, assistant_model=drafter)
        for answer in out[:, inputs["input_ids"].shape[1] :].tolist():
            counts[tuple(answer)] += 1
    statistic = sum((counts[x] - draws * p) ** 2 / (draws * p) for x, p in exact.items() if draws * p >= 5)
    cells = sum(draws * p >= 5 for p in exact.values())
    assert cells >= 9
    assert statistic < cells - 1 + 4 * (2 * (cells - 1)) ** 0.5  # mean n - 1, standard deviation sqrt(2 (n - 1))


@torch.no_grad()
def three_token_distribution(target, prompt, temperature, top_k):
    """Probability of every answer of three tokens; one that ends early is padded as generate pads it."""
    config = target.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    exact = {(): 1.0}
    for _ in range(3):
        grown = {}
        for answer, probability in exact.items():
            if any(token in ends for token in answer):
                grown[(*answer, config.pad_token_id)] = probability
                continue
            ids = torch.cat((prompt, torch.tensor([answer], dtype=torch.long)), 1)
            best = (target(ids).logits[0, -1].float() / temperature).topk(top_k)
            for token, share in zip(best.indices.tolist(), best.values.softmax(-1).tolist()):
                grown[(*answer, token)] = probability * share
        exact = grown
    return exact


def test_the_pair_is_small_and_safe():
    files = [file for file in BUNDLED.rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert sum(file.stat().st_size for file in weights) < 48e6
    assert max(file.stat().st_size for file in files) < 16e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja", ".md", ".png"}


def test_every_figure_on_a_card_comes_from_the_record():
    """The committed cards are what their templates say of the recorded files; and a missing fact is an error."""
    for name in ("stage1", "drafter"):
        assert (BUNDLED / name / "README.md").read_text() == card(BUNDLED / name, f"bundled/{name}", None, "other")
    facts = {name: json.loads((BUNDLED / "target" / f"{name}.json").read_text()) for name in ("training", "provenance")}
    assert (BUNDLED / "target/README.md").read_text() == render("target", facts)
    with pytest.raises(ValueError, match="did not record"):
        render("target", {"training": facts["training"]})


def test_the_card_measures_the_drafting_that_ships():
    metrics = json.loads((BUNDLED / "drafter" / "metrics.json").read_text())
    for name, measured in (("drafter", "drafting"), ("stage1", "baseline_drafting")):
        shipped = GenerationConfig.from_pretrained(BUNDLED / name).to_diff_dict()
        for option in ("window_size", "draft_threshold"):
            assert metrics[measured][option] == shipped[option]


def test_unknown_card():
    with pytest.raises(ValueError, match="there are drafter, target"):
        render("space", {})


def test_the_readmes_python_example_runs(monkeypatch, capsys):
    root = BUNDLED.parent
    code = re.search(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S).group(1)
    monkeypatch.chdir(root)
    exec(compile(code, "README.md", "exec"), {})
    assert "restaurant" in capsys.readouterr().out


def test_enumeration_is_a_distribution(pair):
    """The yardstick of the sampling test itself."""
    tokenizer, target, _ = pair
    exact = three_token_distribution(target, encode(tokenizer, QUESTIONS[:1])["input_ids"], 1.5, 3)
    assert sum(exact.values()) == pytest.approx(1) and all(len(x) == 3 for x in exact)
    assert len(set(itertools.chain.from_iterable(exact))) > 3
