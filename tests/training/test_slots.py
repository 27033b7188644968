"""Answers in rows that are filled anew: each is what the target says when it is asked alone."""

import collections

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ppow.training import slots as slots_module
from ppow.training import writers
from ppow.training.config import RegenerateConfig
from ppow.training.slots import CHECK, Request, Slots, obstacle
from ppow.training.writers import Asked

PROMPTS = [[5], [7, 8, 9], [4, 4, 4, 4, 4, 4, 4], [11, 2], [3, 9, 27, 81], [6] * 12, [1, 2, 3, 4, 5], [90, 91]]


@pytest.fixture(scope="module")
def llama(tiny_config):
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config).eval()


@pytest.fixture(scope="module")
def sliding():
    torch.manual_seed(1)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    layers = ["full_attention", "sliding_attention", "full_attention"]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, **heads, use_sliding_window=True, sliding_window=6, layer_types=layers)
    return Qwen3ForCausalLM(config).eval()


def answer(slots, requests):
    waiting, done = list(requests), {}
    while waiting or slots.free < len(slots.requests):
        slots.fill(waiting[: slots.free])
        taken = {request.key for request in slots.requests if request}
        waiting = [request for request in waiting if request.key not in taken]
        done |= dict(slots.collect())
    return done


def alone(target, ids, room, ends):
    config = GenerationConfig(max_new_tokens=room, do_sample=False, eos_token_id=sorted(ends), pad_token_id=0)
    return target.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("name", ["llama", "sliding"])
def test_greedy_answers_are_those_of_generate(request, name, rows):
    target = request.getfixturevalue(name)
    plain = [alone(target, ids, 40, {0}) for ids in PROMPTS]
    ends = {plain[1][4], plain[5][20]}  # some answers end early, at their second token or so, others run on
    rooms = [40, 1, 33, CHECK, CHECK + 1, 40, 40, 2]
    requests = [Request(key, ids, room, 0) for key, (ids, room) in enumerate(zip(PROMPTS, rooms))]
    done = answer(Slots(target, rows, 64, 0.0, ends), requests)
    assert done == {key: alone(target, ids, room, ends) for key, ids, room, *_ in requests}
    assert len({len(ids) for ids in done.values()}) > 3


def test_drawn_answers_follow_from_their_seed_alone(llama):
    requests = [Request(key, ids, 20, 100 + key) for key, ids in enumerate(PROMPTS)]
    one = answer(Slots(llama, 2, 40, 1.0, {0}), requests)
    other = answer(Slots(llama, 5, 64, 1.0, {0}), requests[::-1])
    assert one == other
    again = answer(Slots(llama, 2, 40, 1.0, {0}), [request._replace(seed=request.seed + 1) for request in requests])
    assert sum(again[key] != one[key] for key in one) >= len(one) - 1


def test_greedy_and_drawn_rows_side_by_side(llama):
    """Each is what it is among its like."""
    requests = [Request(key, ids, 20, 100 + key) for key, ids in enumerate(PROMPTS)]
    drawn = answer(Slots(llama, 2, 40, 1.0, {0}), requests)
    greedy = {key: alone(llama, ids, 20, {0}) for key, ids in enumerate(PROMPTS)}
    assert all(drawn[key] != greedy[key] for key in drawn)
    for chosen in ({0, 3, 4}, {1, 2, 3, 7}):
        mixed = [request._replace(greedy=request.key in chosen) for request in requests]
        done = answer(Slots(llama, 3, 40, 1.0, {0}), mixed)
        assert done == {key: (greedy if key in chosen else drawn)[key] for key in drawn}


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_drawn_tokens_have_the_targets_distribution(llama, temperature):
    count = 4000
    requests = [Request(key, [5, 6, 7], 1, key) for key in range(count)]
    drawn = answer(Slots(llama, 500, 8, temperature, set()), requests)
    with torch.no_grad():
        expected = (llama(torch.tensor([[5, 6, 7]])).logits[0, -1].float() / temperature).softmax(-1)
    seen = torch.zeros_like(expected)
    for token, times in collections.Counter(ids[0] for ids in drawn.values()).items():
        seen[token] = times
    often = expected * count >= 5
    chi = ((seen - expected * count) ** 2 / (expected * count))[often].sum()
    freedom = int(often.sum()) - 1
    assert chi < freedom + 5 * (2 * freedom) ** 0.5


def test_what_does_not_fit_is_refused(llama):
    slots = Slots(llama, 2, 16, 0.0, {0})
    with pytest.raises(ValueError, match="3 prompts for 2 free rows"):
        slots.fill([Request(key, [5], 4, 0) for key in range(3)])
    with pytest.raises(ValueError, match="the longest of 17 tokens with its answer; the rows hold 16"):
        slots.fill([Request(0, [5] * 9, 8, 0)])
    assert slots.free == 2 and slots.collect() == []


def test_targets_that_need_batches_are_told_from_those_that_do_not(llama):
    assert obstacle(llama) is None
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    capped = Gemma2Config(**sizes, **heads, attn_logit_softcapping=20.0)
    assert "caps its attention" in obstacle(Gemma2ForCausalLM(capped).eval())
    torch.manual_seed(0)
    wordy = LlamaForCausalLM(llama.config).eval()
    wordy.generation_config.repetition_penalty, wordy.generation_config.num_beams = 1.0, 1
    assert obstacle(wordy) is None
    wordy.generation_config.repetition_penalty = 1.1
    assert obstacle(wordy) == "its generation config asks for repetition_penalty"


def test_longer_prompts_are_given_longer_rows(tmp_path, save_target, monkeypatch):
    """Rows are laid out anew only where a prompt does not fit, and each answer is the target's own."""
    save_target(tmp_path)
    monkeypatch.setattr(writers, "ROOM", 48)
    laid = []
    new = writers.LocalWriter._new_slots
    monkeypatch.setattr(
        writers.LocalWriter,
        "_new_slots",
        lambda self: laid.append(made := new(self)) or made,  # type: ignore[func-returns-value]
    )
    given = {"target": str(tmp_path), "data": "-", "output": "-", "max_new_tokens": 8, "batch_size": 3}
    prompts = [Asked([{"role": "user", "content": "two " * count}], {}) for count in range(1, 40)]
    texts = []
    for reason in (None, "asked for"):
        writer = writers.LocalWriter(RegenerateConfig(**given))
        writer.obstacle = reason
        waiting = collections.deque((number, prompt, 0) for number, prompt in enumerate(prompts))
        found = dict(writers.answers(writer, waiting))
        texts.append([found[number].message["content"] for number in range(len(prompts))])
    assert texts[0] == texts[1]
    capacities = [slots.capacity for slots in laid]
    assert capacities == sorted(set(capacities)) and 1 < len(capacities) <= 4


def test_rows_that_cannot_be_laid_out_are_batches(tmp_path, save_target, monkeypatch, capsys):
    save_target(tmp_path)
    monkeypatch.setattr(slots_module, "target_twin", lambda *given: (_ for _ in ()).throw(RuntimeError("no room")))
    writer = writers.LocalWriter(
        RegenerateConfig(target=str(tmp_path), data="-", output="-", max_new_tokens=4, batch_size=2)
    )
    for key in range(3):
        writer.ask(key, Asked([{"role": "user", "content": "Add one."}], {}), seed=0)
    assert set(writer.collect()) == {0, 1} and set(writer.collect()) == {2}
    assert "rows for it cannot be laid out (no room)" in capsys.readouterr().err


def test_a_row_without_a_request_stays_where_it_is(llama):
    """However long the others go on, it needs no slot more."""
    slots = Slots(llama, 2, 24, 0.0, set())
    slots.fill([Request(0, [5, 6], 1, 0), Request(1, [7], 1, 0)])
    assert len(slots.collect()) == 2
    for key in range(2, 8):  # more steps than a row has slots
        slots.fill([Request(key, [9, 8], 20, 0)])
        ((found, ids),) = slots.collect()
        assert found == key and ids == alone(llama, [9, 8], 20, {0})
    assert slots.state.lengths.max() <= 24 + CHECK
