"""The confidence head: what it says before and after training, what it leaves alone, and that windows end by it."""

import copy

import pytest
import torch
from transformers import GenerationConfig

import formats_helpers
from decoding_helpers import generate_with, prompt_batches, trained_pair
from ppow import PPOWDrafter, pair_ppow
from ppow.schedules_ppow import CostAware, Costs
from ppow.training import reinforce
from ppow.training.objectives import confidence_loss
from ppow.training.text_windows import read_windows
from training_helpers import make_batch, make_config, make_pair

OPTIONS = {"preset": "ppow", "confidence_head": True}


def test_the_loss_by_hand():
    """Log odds 0 and ln 3 are chances 1/2 and 3/4."""
    predicted = torch.tensor([[0.0, 3.0], [3.0, 3.0]]).clamp(max=3.0).log1p()  # ln 1 and ln 4
    predicted = torch.where(predicted > 0, torch.tensor(3.0).log(), predicted)
    found = confidence_loss(predicted, torch.tensor([True, False]), torch.tensor([0.5, 1.0]))
    first = torch.tensor(2.0).log() - 0.5 * torch.tensor(0.75).log() - 0.5 * torch.tensor(0.25).log()
    second = -torch.tensor(0.25).log() - torch.tensor(0.75).log()
    torch.testing.assert_close(found, torch.stack((first, second)))


def test_a_fresh_head_says_what_the_drafter_says():
    _, drafter = make_pair()
    drafter.add_confidence_head()
    assert drafter.config.confidence_head and drafter.confidence_head.weight.dtype == torch.float64
    hidden = torch.randn(3, 32, dtype=torch.float64)
    logits = drafter.logits(hidden)
    best = logits.softmax(-1).amax(-1).float()
    found = drafter.acceptance_logits(hidden, logits).sigmoid()
    torch.testing.assert_close(found, best[:, None].expand(-1, 2), rtol=1e-4, atol=1e-5)
    head = drafter.confidence_head
    drafter.add_confidence_head()  # one that it has stays
    assert drafter.confidence_head is head


def test_training_moves_the_head_and_takes_nothing_from_the_drafter():
    target, drafter = make_pair()
    plain, batch = copy.deepcopy(drafter), make_batch()
    drafter.add_confidence_head()
    expected, _ = reinforce.loss(make_config(preset="ppow"), target, plain, batch)
    expected.backward()
    value, metrics = reinforce.loss(make_config(**OPTIONS), target, drafter, batch)
    value.backward()
    torch.testing.assert_close(value - metrics["confidence_loss"], expected)
    for (name, parameter), (_, other) in zip(plain.named_parameters(), drafter.named_parameters()):
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, msg=name)
    assert float(drafter.confidence_head.weight.grad.abs().sum()) > 0

    def off() -> torch.Tensor:
        windows, _ = read_windows(target, drafter, batch, 4)
        return (windows.surprise * windows.mask).sum() / windows.mask.sum()

    before, optimizer = float(off().detach()), torch.optim.Adam(drafter.confidence_head.parameters(), lr=0.05)
    for _ in range(25):
        optimizer.zero_grad()
        off().backward()
        optimizer.step()
    assert float(off().detach()) < 0.8 * before


def test_windows_end_by_the_head(monkeypatch, tmp_path):
    """A head that is certain of all, or of nothing, in the place of the draft's probability; loaded from a folder."""
    target, drafter = (copy.deepcopy(model) for model in trained_pair())
    drafter.add_confidence_head()
    costs = Costs()
    for part, seconds in {"step": 1.0, "first": 0.0, "rest": 0.0, **{n: 9.0 + n for n in range(1, 8)}}.items():
        for _ in range(4):
            costs.add(part, seconds)
    monkeypatch.setattr(costs, "add", lambda part, seconds: None)
    monkeypatch.setattr(pair_ppow, "costs_of", lambda *args: costs)
    asked = []
    takes = CostAware.takes
    monkeypatch.setattr(CostAware, "takes", lambda self, given: asked.extend(given) or takes(self, given))
    for do_sample in (False, True):
        for odds, expected in ((20.0, 1.0), (-20.0, 0.0)):
            with torch.no_grad():
                drafter.confidence_head.weight.zero_()
                drafter.confidence_head.bias.copy_(torch.tensor([-odds, odds] if do_sample else [odds, -odds]))
            drafter.save_pretrained(tmp_path)
            loaded = PPOWDrafter.from_pretrained(tmp_path, dtype=torch.float64).eval()
            config = {"window_size": 6, "window_schedule": "cost", "max_new_tokens": 12, "do_sample": do_sample}
            for ids, mask in prompt_batches(2, 1, seed=4):
                out = generate_with(target, loaded, ids, mask, config)
                if not do_sample:
                    plain = target.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
                    assert torch.equal(out.sequences, plain)
                drafted = max(max(row, default=0) for row in out.acceptance.drafted)
                assert drafted == (6 if expected else 0)
            assert asked and all(abs(given - expected) < 1e-6 for given in asked)
            asked.clear()


def test_a_fresh_drafter_with_a_head_is_saved_and_loaded(tmp_path):
    _, drafter = make_pair(confidence_head=True)
    drafter.confidence_head.bias.data.fill_(0.25)
    drafter.save_pretrained(tmp_path)
    loaded = PPOWDrafter.from_pretrained(tmp_path)
    assert loaded.config.confidence_head and loaded.confidence_head.bias.tolist() == [0.25, 0.25]
    assert isinstance(loaded.generation_config, GenerationConfig)


@pytest.mark.parametrize("form", ["vllm", "specforge"])
def test_engines_get_no_head(form):
    drafter = formats_helpers.build(confidence_head=True)
    config, tensors = formats_helpers.export(drafter, form)
    plain = formats_helpers.export(formats_helpers.build(), form)
    assert set(tensors) == set(plain[1]) and "confidence_head" not in str(config)


def test_rollouts_have_no_texts_to_learn_it_from():
    with pytest.raises(ValueError, match="confidence_head learns along texts"):
        make_config(confidence_head=True)
