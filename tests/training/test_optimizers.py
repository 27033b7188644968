"""Which parameters which optimizer takes, one step of each by hand, and a state that comes back as it was."""

import copy

import pytest
import torch

from ppow.training.config import ReinforceConfig, SupervisedConfig
from ppow.training.optimizers import BETAS, Optimizers, make_optimizer
from ppow.training.preparation import freeze_embedding
from training_helpers import make_pair

NAMES = {"target": "-", "data": "-", "output_dir": "-"}
MUON = SupervisedConfig(**NAMES, optimizer="muon", learning_rate=1e-2)


def made(config=MUON):
    drafter = freeze_embedding(make_pair(norm_before_fc=True, norm_output=True, qk_norm=True)[1])
    return drafter, make_optimizer(config, drafter)


def with_gradients(drafter, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in drafter.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def test_muon_takes_the_matrices_of_the_layers_and_of_the_fusion():
    drafter, optimizer = made()
    names = {p: name for name, p in drafter.named_parameters()}
    muon, adam = ({names[p] for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    inside = {name for name in names.values() if ".self_attn." in name or ".mlp." in name} | {"fc.weight"}
    assert muon == {name for name in inside if "_norm" not in name}
    assert adam | muon == {name for name, p in drafter.named_parameters() if p.requires_grad} and not adam & muon
    assert {"lm_head.weight", "input_norm.weight", "norm.weight"} <= adam


@pytest.mark.parametrize("config", [SupervisedConfig(**NAMES), ReinforceConfig(**NAMES, drafter="-")])
def test_adamw_alone_is_the_default(config):
    optimizer = made(config)[1]
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["betas"] == BETAS and group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_a_first_step_is_as_long_as_adamw_s():
    """AdamW's first step is the rate times the gradient's signs; Muon's an orthogonal matrix of about that length."""
    drafter, optimizer = made()
    with_gradients(drafter)
    before = {name: p.detach().clone() for name, p in drafter.named_parameters()}
    optimizer.step()
    weights, gradient = dict(drafter.named_parameters()), drafter.lm_head.weight.grad
    expected = before["lm_head.weight"] - 1e-2 * gradient.sign()
    torch.testing.assert_close(weights["lm_head.weight"].detach(), expected, atol=1e-6, rtol=0)
    moved = (weights["fc.weight"] - before["fc.weight"]).detach()
    # 0.2 sqrt(max(rows, columns)) times an orthogonal matrix, whose singular values Newton-Schulz leaves near 1
    singular = torch.linalg.svdvals(moved) / (1e-2 * 0.2 * max(moved.shape) ** 0.5)
    assert 0.6 < float(singular.min()) and float(singular.max()) < 1.3
    assert torch.equal(weights["embed_tokens.weight"], before["embed_tokens.weight"])  # frozen: the target's


def test_the_state_comes_back_as_it_was():
    drafter, optimizer = made()
    with_gradients(drafter)
    optimizer.step()
    other = copy.deepcopy(drafter)
    again = make_optimizer(MUON, other)
    assert isinstance(again, Optimizers)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which torch hands on as it is
    for one, opt in ((drafter, optimizer), (other, again)):
        with_gradients(one, seed=1)
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), other.parameters()))
    numbers = [i for group in optimizer.state_dict()["param_groups"] for i in group["params"]]
    assert numbers == list(range(len(numbers)))


def test_a_torch_without_muon_is_told(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="has no torch.optim.Muon; use --optimizer adamw or torch >= 2.9"):
        made()
