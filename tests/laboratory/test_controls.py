"""The controls of PPOW's comparison by hand, and each trains."""

import math
import typing

import pytest
import torch

from ppow.training import reinforce
from ppow.training.objectives import OBJECTIVES, Rollouts, objective_of
from training_helpers import by_steps, make_batch, make_config, make_pair, make_windows, value_of

BENCHMARK = "controls"
pytestmark = pytest.mark.usefixtures("benchmark")


def test_lk_s_second_form_by_hand():
    def mixed(alpha, kl):
        lam = math.exp(-3 * alpha)
        return lam * kl + (1 - lam) * (1 - alpha)

    expected = by_steps((mixed(0.5, 1.0) + mixed(0.8, 3.0)) / 2, mixed(0.25, 2.0))
    assert value_of("lk_mixed", make_windows()) == pytest.approx(expected)


def test_eal_by_hand():
    assert value_of("eal", make_windows()) == pytest.approx(-((0.6 + 0.6 * 0.5) + 0.2) / 2)
    assert value_of("eal", make_windows(), verification="sampling") == pytest.approx(-((0.5 + 0.125) + 0.8) / 2)


def test_d_pace_by_hand():
    s1, s2, t1 = 0.5 * 0.6 + 0.5, 0.5 * 0.2 + 0.5, 0.5 * 0.4 + 0.5
    expected = ((s1 + s1 * s2) * 1 + s1 * s2 * 2 + t1 * 3) / 2 / 2
    assert value_of("d_pace", make_windows()) == pytest.approx(expected)


def test_vat_by_hand():
    """Window 1 is accepted at step 1 and first rejected at step 2; window 2 is rejected at once."""
    assert value_of("vat", make_windows()) == pytest.approx((1 * 1 + 1 * 2 + 1 * 3) / 2 / 2)
    windows = make_windows(hit=[[False, True], [False, False]])
    assert value_of("vat", windows) == pytest.approx((1 * 1 + 0.8 * 2 + 1 * 3) / 2 / 2)


def make_rollouts():
    """One window, two rollouts of two tokens from a vocabulary of two."""
    logits = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]]], requires_grad=True)
    ids = torch.tensor([[[0, 1], [1, 1]]])
    return Rollouts(
        draft_ids=ids,
        draft_logits=logits,
        old_logprobs=logits.detach().log_softmax(-1).gather(-1, ids[..., None])[..., 0] - 0.1,
        target_logits=torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]]]),
        advantages=torch.full((1, 2), 2.0),
        accepted=torch.tensor([[1, 0]]),
        window_mask=torch.tensor([True]),
    )


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def softmax(a, b):
    return [math.exp(a) / (math.exp(a) + math.exp(b)), math.exp(b) / (math.exp(a) + math.exp(b))]


def test_draft_opd_by_hand(benchmark):
    forward = kl(softmax(1, 0), softmax(0, 0))  # accepted
    rejected = kl(softmax(1, 0), softmax(0, 1)), kl(softmax(0, 0), softmax(1, 0)), kl(softmax(0, 2), softmax(1, 1))
    expected = (forward + rejected[0] + rejected[1] + 0.8 * rejected[2]) / 4
    assert benchmark.draft_opd_loss(make_rollouts())[0].item() == pytest.approx(expected)


def test_gto_by_hand(benchmark):
    logprobs = torch.tensor([[[0.5, 0.5], [0.25, 1.0]]]).log()
    assert float(benchmark.gto_reward(logprobs)) == pytest.approx(math.log(math.exp(0.75) + math.exp(0.5)))
    # the longest path is that of the first rollout, both of its tokens reachable, each ratio exp(0.1)
    assert benchmark.gto_loss(make_rollouts(), 0.2)[0].item() == pytest.approx(-2 * math.exp(0.1), rel=1e-5)
    loss, metrics = benchmark.gto_loss(make_rollouts(), 0.05)
    assert float(loss) == pytest.approx(-2 * 1.05) and float(metrics["clipped"]) == 1


def test_the_configuration_knows_every_objective(benchmark):
    names = set(typing.get_args(typing.get_type_hints(benchmark.ControlConfig)["objective"]))
    assert names == {"ppow"} | set(OBJECTIVES) - {"ppow exact", "ppow rollout"}
    assert names == {values["objective"] for values in benchmark.ControlConfig.presets.values()}


@pytest.mark.parametrize("name", ["lk_mixed", "eal", "d_pace", "vat", "gto", "draft_opd"])
def test_every_control_trains(benchmark, name):
    config = make_config(benchmark.ControlConfig, preset=name)
    target, drafter = make_pair()
    batch = make_batch()
    rollout = None
    if name == "gto":  # its reference is the drafter itself at the start, with chances of its own
        rollout, _ = benchmark.gto_rollout(config, target, drafter, drafter, batch, 1)
        assert torch.equal(rollout.advantages, rollout.advantages[..., :1].expand_as(rollout.advantages))
    elif objective_of(config).batch == "rollouts":
        rollout, _ = reinforce.roll_out(config, target, drafter, batch, 1)
    loss, _ = reinforce.loss(config, target, drafter, batch, rollout)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(drafter.fc.weight.grad).all()
    assert drafter.fc.weight.grad.abs().max() > 0
