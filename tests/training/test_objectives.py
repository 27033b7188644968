"""Gradients of the objectives against independent derivations, in float64: REINFORCE, clipping, finite differences."""

import dataclasses
import math

import pytest
import torch

from ppow.training.objectives import Rollouts, ppow_loss, supervised_step_loss

W, G, K, D = 3, 4, 5, 6
ACCEPTED = torch.tensor([[0, 1, 5, 3], [2, 4, 0, 5], [1, 1, 2, 0]])
CLIP = 0.2


def make(temperature=1.0, drift=0.0, seed=0, **changes):
    """Random rollouts in float64; ``drift`` moves the drafter away from the one that drew them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, target, moved, advantages = normal(W, G, K, D), 2 * normal(W, G, K, D), normal(W, G, K, D), normal(W, G)
    ids = torch.randint(0, D, (W, G, K), generator=generator)
    values = {
        "draft_ids": ids,
        "draft_logits": (logits + drift * moved).requires_grad_(),
        "old_logprobs": chosen_logprobs(logits, ids, temperature),
        "target_logits": target,
        "advantages": advantages,
        "accepted": ACCEPTED,
        "window_mask": torch.ones(W, dtype=torch.bool),
        "temperature": temperature,
    }
    return Rollouts(**(values | changes))


def chosen_logprobs(logits, ids, temperature=1.0):
    return (logits / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def gradient(rollouts, clip_range=CLIP, kl_coef=0.0):
    loss, _ = ppow_loss(rollouts, kl_coef, clip_range)
    return torch.autograd.grad(loss, rollouts.draft_logits)[0]


def tokens_reached(accepted):
    """How many tokens were verified after a prefix that stands, spelled out: the accepted ones and the next."""
    return accepted if accepted == K else accepted + 1


def by_loops(rollouts, per_token, per_state=None):
    """Mean over rollouts of the sum over reachable tokens of ``per_token(w, g, i)`` plus the mean of ``per_state``."""
    found = []
    for w in range(W):
        for g in range(G):
            n = tokens_reached(int(rollouts.accepted[w, g]))
            found.append(sum(per_token(w, g, i) for i in range(n)))
            if per_state is not None:
                found[-1] = found[-1] + sum(per_state(w, g, i) for i in range(n)) / n
    return sum(found) / len(found)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_on_policy_gradient_equals_reinforce_written_out(temperature):
    """At ratio 1: d loss / d z = -A * (onehot(x) - pi) / temperature, averaged; no autograd on the expected side."""
    rollouts = make(temperature)
    policy = (rollouts.draft_logits.detach() / temperature).softmax(-1)
    expected = torch.zeros(W, G, K, D, dtype=torch.float64)
    for w in range(W):
        for g in range(G):
            n = tokens_reached(int(ACCEPTED[w, g]))
            for i in range(n):
                score = -policy[w, g, i] / temperature
                score[rollouts.draft_ids[w, g, i]] += 1 / temperature
                expected[w, g, i] = -rollouts.advantages[w, g] * score / (W * G)
    torch.testing.assert_close(gradient(rollouts), expected, atol=1e-14, rtol=1e-12)


def test_expected_gradient_is_that_of_the_expected_reward():
    """Over every pair of windows of 2 tokens from 3, E[d loss] = -(G - 1) / G * d E[R] / d logits, G = 2.

    The drafter is a table of logits per prefix, the target accepts token 1, then token 2 after it. No step of the
    objective is written out: the expected reward is a polynomial of the drafter's probabilities.
    """
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()  # row 3: the empty prefix
    windows = torch.tensor([(a, b) for a in range(3) for b in range(3)])  # (9, 2)
    rewards = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)  # of k = 0, 1, 2: deeper acceptance pays most
    k = (windows == torch.tensor([1, 2])).long().cumprod(-1).sum(-1)
    probs = table.softmax(-1)
    chance = probs[3, windows[:, 0]] * probs[windows[:, 0], windows[:, 1]]  # (9,)
    expected = torch.autograd.grad((chance * rewards[k]).sum(), table)[0]

    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    members = torch.stack((first, second), 1)  # (81, 2)
    logits = torch.stack((table[3].expand(9, -1), table[windows[:, 0]]), 1)  # (9, 2, 3)
    mean = torch.zeros_like(table)
    for pair, likely in zip(members, (chance[first] * chance[second]).detach()):
        rollouts = Rollouts(
            draft_ids=windows[pair][None],
            draft_logits=logits[pair][None],
            old_logprobs=chosen_logprobs(logits[pair].detach(), windows[pair])[None],
            target_logits=torch.zeros(1, 2, 2, 3, dtype=torch.float64),
            advantages=(rewards[k[pair]] - rewards[k[pair]].mean())[None],
            accepted=k[pair][None],
            window_mask=torch.ones(1, dtype=torch.bool),
        )
        mean += likely * torch.autograd.grad(ppow_loss(rollouts, 0.0, CLIP)[0], table, retain_graph=True)[0]
    torch.testing.assert_close(mean, -0.5 * expected, atol=1e-12, rtol=1e-10)


def test_reinforce_with_autograd_agrees_too():
    rollouts = make()
    logits = rollouts.draft_logits.detach().clone().requires_grad_()
    logprobs = chosen_logprobs(logits, rollouts.draft_ids)
    reinforce = -by_loops(rollouts, lambda w, g, i: rollouts.advantages[w, g] * logprobs[w, g, i])
    expected = torch.autograd.grad(reinforce, logits)[0]
    torch.testing.assert_close(gradient(rollouts), expected, atol=1e-14, rtol=1e-12)


def test_on_policy_loss_counts_the_advantage_once_per_token_and_nothing_is_clipped():
    rollouts = make()
    loss, metrics = ppow_loss(rollouts, 0.0, CLIP)
    assert loss.item() == pytest.approx(by_loops(rollouts, lambda w, g, i: -rollouts.advantages[w, g]).item())
    assert metrics["clipped"] == 0


def test_off_policy_value_and_gradient_by_loops():
    """The clipped surrogate, plus the anchor, term by term."""
    rollouts = make(temperature=0.8, drift=0.3)
    logits = rollouts.draft_logits.detach().clone().requires_grad_()
    ratio = (chosen_logprobs(logits, rollouts.draft_ids, 0.8) - rollouts.old_logprobs).exp()
    draft, target = logits.log_softmax(-1), rollouts.target_logits.log_softmax(-1)

    def per_token(w, g, i):
        a, r = rollouts.advantages[w, g], ratio[w, g, i]
        held = 1 - CLIP if r < 1 - CLIP else 1 + CLIP if r > 1 + CLIP else r
        return -min(r * a, held * a, key=lambda value: value.item())

    def per_state(w, g, i):
        return 0.7 * sum(target[w, g, i, v].exp() * (target[w, g, i, v] - draft[w, g, i, v]) for v in range(D))

    expected = by_loops(rollouts, per_token, per_state)
    loss, metrics = ppow_loss(rollouts, 0.7, CLIP)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert 0 < metrics["clipped"] < 1
    wanted = torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(gradient(rollouts, CLIP, 0.7), wanted, atol=1e-14, rtol=1e-11)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.19, 1.0, True),
        (1.21, 1.0, False),  # a good token already likelier by more than the range
        (0.79, 1.0, True),  # a good token that became unlikelier is pulled back, however far it is
        (0.01, 1.0, True),
        (0.81, -1.0, True),
        (0.79, -1.0, False),  # a bad token already unlikelier by more than the range
        (1.21, -1.0, True),
        (50.0, -1.0, True),
        (1.0, 0.0, False),  # no advantage, nothing to learn
    ],
)
def test_clipping_stops_the_gradient_exactly_there(ratio, advantage, moves):
    rollouts = make(accepted=torch.zeros(W, G, dtype=torch.int64), advantages=torch.full((W, G), advantage).double())
    rollouts = dataclasses.replace(rollouts, old_logprobs=rollouts.old_logprobs - math.log(ratio))
    found = gradient(rollouts)
    assert found[:, :, 1:].abs().max() == 0  # only the first token is reachable
    if not moves:
        assert found.abs().max() == 0
        return
    logprobs = chosen_logprobs(rollouts.draft_logits, rollouts.draft_ids)
    plain = -(ratio * advantage * logprobs[:, :, 0]).mean()  # d ratio = ratio * d log pi
    expected = torch.autograd.grad(plain, rollouts.draft_logits)[0]
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-11)


@pytest.mark.parametrize(("shift", "advantage", "clipped"), [(0.5, 1.0, 1.0), (0.5, -1.0, 0.0), (-0.5, -1.0, 1.0)])
def test_clipped_counts_the_tokens_whose_gradient_stops(shift, advantage, clipped):
    rollouts = make(advantages=torch.full((W, G), advantage).double())
    rollouts = dataclasses.replace(rollouts, old_logprobs=rollouts.old_logprobs - shift)
    _, metrics = ppow_loss(rollouts, 0.0, CLIP)
    assert metrics["clipped"] == clipped


def test_anchor_gradient_is_draft_minus_target():
    """d KL(P || softmax(z)) / d z = Q - P, whatever the rollouts' temperature."""
    rollouts = make(temperature=0.5, advantages=torch.zeros(W, G).double())
    gap = rollouts.draft_logits.detach().softmax(-1) - rollouts.target_logits.softmax(-1)
    expected = torch.zeros_like(gap)
    for w in range(W):
        for g in range(G):
            n = tokens_reached(int(ACCEPTED[w, g]))
            expected[w, g, :n] = 0.3 * gap[w, g, :n] / n / (W * G)
    torch.testing.assert_close(gradient(rollouts, CLIP, 0.3), expected, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("kl_coef", [0.0, 1.0])
def test_gradient_equals_central_differences(kl_coef):
    rollouts = make(temperature=0.9, drift=0.05)  # near the old policy: no ratio sits on a kink
    found = gradient(rollouts, CLIP, kl_coef)
    step, base = 1e-5, rollouts.draft_logits.detach()
    for place in [(0, 0, 0, 1), (0, 2, 4, 3), (1, 1, 2, 0), (1, 3, 4, 5), (2, 0, 1, 2), (2, 0, 2, 2), (0, 0, 1, 0)]:
        values = []
        for sign in (1, -1):
            logits = base.clone()
            logits[place] += sign * step
            values.append(ppow_loss(dataclasses.replace(rollouts, draft_logits=logits), kl_coef, CLIP)[0].item())
        assert found[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-9)


def test_anchor_vanishes_on_the_target_and_accepts_a_one_hot_one():
    rollouts = make()
    same = dataclasses.replace(rollouts, target_logits=rollouts.draft_logits.detach())
    assert abs(ppow_loss(same, 1.0, CLIP)[1]["kl"].item()) < 1e-15
    one_hot = torch.full((W, G, K, D), -torch.inf, dtype=torch.float64)
    one_hot[..., 2] = 0.0
    sure = dataclasses.replace(rollouts, target_logits=one_hot)
    # KL(one-hot || Q) = -log q of that token
    logprobs = rollouts.draft_logits.detach().log_softmax(-1)
    expected = by_loops(rollouts, lambda w, g, i: 0.0, lambda w, g, i: -logprobs[w, g, i, 2])
    assert ppow_loss(sure, 1.0, CLIP)[1]["kl"].item() == pytest.approx(expected.item())
    assert torch.isfinite(gradient(sure, CLIP, 1.0)).all()


def test_what_cannot_be_reached_leaks_nothing():
    """NaN and overflow after the first rejection, and in windows that do not exist, stay where they are."""
    mask = torch.tensor([True, False, True])
    clean = make(window_mask=mask)
    unreached = torch.arange(K) >= torch.where(ACCEPTED == K, K, ACCEPTED + 1)[..., None]
    unreached |= ~mask[:, None, None]
    logits = clean.draft_logits.detach().masked_fill(unreached[..., None], torch.nan).requires_grad_()
    old = clean.old_logprobs.masked_fill(unreached, -1e6)
    target = clean.target_logits.masked_fill(unreached[..., None], torch.nan)
    advantages = clean.advantages.masked_fill(~mask[:, None], torch.nan)
    dirty = dataclasses.replace(
        clean, draft_logits=logits, old_logprobs=old, target_logits=target, advantages=advantages
    )
    for first, second in zip(ppow_loss(clean, 0.5, CLIP)[1].values(), ppow_loss(dirty, 0.5, CLIP)[1].values()):
        assert torch.equal(first, second)
    assert torch.equal(gradient(clean, CLIP, 0.5), gradient(dirty, CLIP, 0.5))


def test_no_window_at_all_is_a_loss_of_zero():
    rollouts = make(window_mask=torch.zeros(W, dtype=torch.bool))
    loss, metrics = ppow_loss(rollouts, 1.0, CLIP)
    assert loss == 0 and not any(metrics.values())
    assert not gradient(rollouts, CLIP, 1.0).any()


def test_metrics_carry_no_gradient():
    _, metrics = ppow_loss(make(), 1.0, CLIP)
    assert not any(value.requires_grad for value in metrics.values())


def test_half_precision_logits_are_computed_in_float32():
    rollouts = make()
    half = rollouts.draft_logits.detach().bfloat16()
    low = dataclasses.replace(rollouts, draft_logits=half, target_logits=rollouts.target_logits.bfloat16())
    same = dataclasses.replace(low, draft_logits=half.float(), target_logits=low.target_logits.float())
    first, second = ppow_loss(low, 0.5, CLIP)[0], ppow_loss(same, 0.5, CLIP)[0]
    assert torch.equal(first, second)
    loss = supervised_step_loss(half[0, 0], low.target_logits[0, 0])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, supervised_step_loss(half[0, 0].float(), low.target_logits[0, 0].float()))


def test_supervised_gradient_is_draft_minus_target_and_least_at_the_target():
    rollouts = make()
    draft, target = rollouts.draft_logits[0, 0], rollouts.target_logits[0, 0]  # (K, D)
    found = torch.autograd.grad(supervised_step_loss(draft, target).sum(), draft)[0]
    torch.testing.assert_close(found, draft.softmax(-1) - target.softmax(-1), atol=1e-15, rtol=1e-12)
    # cross-entropy = entropy of the target + KL, so the target itself is the minimum
    entropy = -(target.softmax(-1) * target.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(supervised_step_loss(target, target), entropy)
    assert (supervised_step_loss(draft, target) > entropy).all()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("draft_ids", (W, G, K - 1), "draft_ids must be"),
        ("old_logprobs", (W, G), "old_logprobs must be"),
        ("target_logits", (W, G, K, D + 1), r"must both be \(W, G, K, D\)"),
        ("draft_logits", (W, G, K), r"must both be \(W, G, K, D\)"),
        ("advantages", (W, G, K), "advantages must be"),
        ("accepted", (W,), "accepted must be"),
        ("window_mask", (W, G), "window_mask must be"),
    ],
)
def test_bad_shapes(name, shape, message):
    good = make()
    bad = dataclasses.replace(good, **{name: torch.zeros(shape, dtype=getattr(good, name).dtype)})
    with pytest.raises(ValueError, match=message):
        ppow_loss(bad, 0.1)


@pytest.mark.parametrize(
    ("changes", "clip_range", "kl_coef", "message"),
    [
        ({"window_mask": torch.ones(W)}, 0.2, 0.1, "window_mask of bool"),
        ({"draft_ids": torch.zeros(W, G, K)}, 0.2, 0.1, "draft_ids of int64"),
        ({"temperature": 0.0}, 0.2, 0.1, "temperature above 0"),
        ({}, 0.0, 0.1, "clip_range > 0"),
        ({}, 0.2, -0.1, "kl_coef >= 0"),
    ],
)
def test_bad_values(changes, clip_range, kl_coef, message):
    rollouts = dataclasses.replace(make(), **changes)
    with pytest.raises(ValueError, match=message):
        ppow_loss(rollouts, kl_coef, clip_range)


def test_supervised_loss_refuses_unfit_shapes():
    for draft, target in [((2, 3), (2, 4)), ((1, 2, 3), (1, 2, 3)), ((2, 3), (3, 3))]:
        with pytest.raises(ValueError, match=r"must both be \(n, D\)"):
            supervised_step_loss(torch.zeros(draft), torch.zeros(target))
