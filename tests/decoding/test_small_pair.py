"""The tests' own trained pair: it loads, it drafts, it is lossless."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ppow import PPOWDrafter
from small_pair import DRAFTER, TARGET

QUESTIONS = [
    "Tom has 12 apples. He buys 8 more apples. How many apples does he have?",
    "I want to book a table at a restaurant.",
    "A book has 120 pages. Anna reads 15 pages a day. How many days does she need?",
]
DRAFTING = [{"window_size": 10}, {"window_size": 5, "draft_threshold": 0.3}]
DRAFTING += [{"tree_depth": 5, "tree_top_k": 4, "tree_nodes": 20}]


@pytest.fixture(scope="module")
def pair():
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    drafter = PPOWDrafter.from_pretrained(DRAFTER, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(TARGET, padding_side="left"), target, drafter


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


def test_enumeration_is_a_distribution(pair):
    """The yardstick of the sampling test itself."""
    tokenizer, target, _ = pair
    exact = three_token_distribution(target, encode(tokenizer, QUESTIONS[:1])["input_ids"], 1.5, 3)
    assert sum(exact.values()) == pytest.approx(1) and all(len(x) == 3 for x in exact)
    assert len(set(itertools.chain.from_iterable(exact))) > 3
