"""Drafters that read tokens off their features with the target's own head: the rows of their draft vocabulary."""

import copy
import functools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from decoding_helpers import (
    MODES,
    PAD,
    VOCAB,
    build_target,
    generate_with,
    prompt_batches,
    sharing_pair,
)
from ppow import PPOWConfig, PPOWDrafter, products_ppow

SHARED = {"share_target_embeddings": True, "share_target_head": True}


@functools.cache
def trained(size: int):
    """A target, a drafter that shares its head, and one that owns a copy of the same rows."""
    target, drafter = sharing_pair(size)
    config = copy.deepcopy(drafter.config)
    config.share_target_head = False
    owning = PPOWDrafter(config).to(target.dtype).eval()
    head = target.get_output_embeddings().weight.detach()[drafter.draft_columns()]
    owning.load_state_dict(drafter.state_dict() | {"lm_head.weight": head})
    owning.generation_config = drafter.generation_config
    return target, drafter, owning


@pytest.mark.parametrize("path", ["plain", "fast"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [VOCAB, VOCAB - 6])
def test_it_drafts_as_one_with_a_copy_of_the_rows(size, mode, path, anywhere):
    target, drafter, owning = trained(size)
    assert not [name for name in drafter.state_dict() if "lm_head" in name or "embed" in name]
    gained = []
    for batch in (1, 3):
        for ids, mask in prompt_batches(batch, 2, seed=batch):
            options = {**MODES[mode], "max_new_tokens": 20, "cuda_graphs": path == "fast"}
            found, copied = (generate_with(target, each, ids, mask, options) for each in (drafter, owning))
            stock = target.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=PAD)
            assert torch.equal(found.sequences, stock)
            assert found.acceptance.accepted == copied.acceptance.accepted
            gained.append(found.acceptance.acceptance_length)
    assert sum(gained) / len(gained) > 1.05, "drafts must be accepted for the test to mean something"


def test_a_saved_drafter_finds_its_targets_head_again(tmp_path):
    target, drafter, _ = trained(VOCAB - 6)
    drafter.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    expected = generate_with(target, drafter, ids, config={"max_new_tokens": 16})
    ours = PPOWDrafter.from_pretrained(tmp_path)
    remote = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    for other in (ours, remote):
        found = generate_with(target, other, ids, config={"max_new_tokens": 16})
        assert torch.equal(found.sequences, expected.sequences)
        assert found.acceptance.accepted == expected.acceptance.accepted


@torch.no_grad()
def test_its_forward_leaves_the_logits_to_the_targets_words():
    target, drafter, owning = trained(VOCAB - 6)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    taps = drafter.read_target(target, input_ids=ids)[1][:, :-1]
    words = drafter.embedding_for(target)
    found, copied = (each(None, taps, inputs_embeds=words(ids[:, 1:])) for each in (drafter, owning))
    assert found.logits is None
    torch.testing.assert_close(drafter.logits(found.hidden_states, words), copied.logits)


@pytest.mark.parametrize("path", ["plain", "fast"])
@pytest.mark.parametrize("change", ["in place", "data", "dtype", "another"])
def test_a_head_that_changes_between_calls_is_read_anew(change, path, anywhere):
    target, drafter, _ = (copy.deepcopy(model) for model in trained(VOCAB - 6))
    ids, head = torch.tensor([[3, 1, 4, 1, 5]]), target.get_output_embeddings()
    options = {"max_new_tokens": 24, "cuda_graphs": path == "fast"}
    generate_with(target, drafter, ids, config=options)
    turned = head.weight.detach().roll(1, 0)
    if change == "in place":
        with torch.no_grad():
            head.weight.copy_(turned)
    elif change == "data":
        head.weight.data = turned
    elif change == "dtype":
        target.float()
        drafter.float()
    else:
        target.set_output_embeddings(nn.Linear(*reversed(head.weight.shape), bias=True, dtype=head.weight.dtype))
    found = generate_with(target, drafter, ids, config=options)
    fresh = generate_with(target, copy.deepcopy(drafter), ids, config=options)
    assert torch.equal(found.sequences, fresh.sequences) and found.acceptance.accepted == fresh.acceptance.accepted


def test_other_calls_and_training_may_follow_one_in_inference_mode(anywhere):
    target, drafter, _ = (copy.deepcopy(model) for model in trained(VOCAB - 6))
    for graphs in (False, True):
        for mode in (True, False):
            with torch.inference_mode(mode):
                options = {"max_new_tokens": 4, "cuda_graphs": graphs}
                generate_with(target, drafter, torch.tensor([[3, 1, 4]]), config=options)
    features = torch.randn(2, 32, dtype=target.dtype, requires_grad=True)
    drafter.logits(features, drafter.embedding_for(target)).sum().backward()
    assert features.grad.any()


def test_on_a_cpu_the_rows_are_multiplied_in_the_faster_order(monkeypatch):
    target, drafter, _ = trained(VOCAB - 6)
    size, seen = drafter.config.draft_vocab_size, []
    for name, value in (("FEWEST_IN_ALL", 0), ("FEWEST_WEIGHTS", 0), ("_CHOSEN", {})):
        monkeypatch.setattr(products_ppow, name, value)
    monkeypatch.setattr(products_ppow, "_fits", lambda layer: type(layer) is nn.Linear and len(layer.weight) == size)
    monkeypatch.setattr(products_ppow, "_measure", lambda weights, count: seen.append(count) or True)
    generate_with(target, drafter, torch.tensor([[3, 1, 4]]), config={"max_new_tokens": 4})
    assert seen == [1]


def test_logits_without_the_words_say_what_is_missing():
    _, drafter, _ = trained(VOCAB - 6)
    with pytest.raises(ValueError, match=r"pass drafter.embedding_for\(target\)"):
        drafter.logits(torch.zeros(1, 32, dtype=drafter.dtype))


def test_what_cannot_share_a_head_is_refused():
    target = build_target()
    with pytest.raises(ValueError, match="share_target_head=True goes with share_target_embeddings=True"):
        PPOWConfig.from_target(target.config, share_target_head=True)
    with pytest.raises(ValueError, match="equal widths"):
        PPOWConfig.from_target(target.config, hidden_size=16, head_dim=8, **SHARED)
