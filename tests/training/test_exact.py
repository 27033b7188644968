"""The closed form of the expected reward: against enumeration, and against the mean of many rollouts."""

import itertools

import pytest
import torch

from ppow.training import objectives
from ppow.training import rollout as stage2
from ppow.training.objectives import Compared, TextWindows, compare, cst_loss, exact_loss
from ppow.training.rewards import speedup_reward
from ppow.training.text_windows import read_windows
from training_helpers import make_batch, make_config, make_pair

K, V = 3, 4


def tables(seed=0, v=V):
    """Target and drafter as logits after every prefix of at most K - 1 tokens from v."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [prefix for size in range(K) for prefix in itertools.product(range(v), repeat=size)]
    target = {p: torch.randn(v, generator=generator, dtype=torch.float64) for p in prefixes}
    draft = {p: torch.randn(v, generator=generator, dtype=torch.float64, requires_grad=True) for p in prefixes}
    return target, draft


def along(texts, target, draft):
    """TextWindows of ``texts`` (tuples of K tokens) under the tables."""
    columns = []
    for i in range(K):
        targets = torch.stack([target[text[:i]] for text in texts])
        drafts = torch.stack([draft[text[:i]] for text in texts])
        tokens = torch.tensor([text[i] for text in texts])
        columns.append(compare(drafts, targets, targets.argmax(-1), tokens))
    states = Compared(*(torch.stack(steps, -1) for steps in zip(*columns)))
    greedy = [[all(text[j] == int(target[text[:j]].argmax()) for j in range(i)) for i in range(K)] for text in texts]
    mask = torch.ones(len(texts), K, dtype=torch.bool)
    return TextWindows(mask, states, torch.tensor(greedy), torch.zeros(len(texts), dtype=torch.bool))


def grads(value, draft):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(draft.values()), materialize_grads=True)])


REWARDS = torch.tensor([0.3, 1.0, 1.5, 4.0], dtype=torch.float64)  # any function of k


def test_greedy_verification_equals_enumeration_of_all_drafts():
    target, draft = tables()
    expected = 0.0
    for window in itertools.product(range(V), repeat=K):
        chance, k, stands = 1.0, 0, True
        for i in range(K):
            chance = chance * draft[window[:i]].softmax(-1)[window[i]]
            stands = stands and window[i] == int(target[window[:i]].argmax())
            k += stands
        expected = expected + chance * REWARDS[k]
    text = ()
    for _ in range(K):
        text += (int(target[text].argmax()),)
    loss, metrics = exact_loss(along([text], target, draft), REWARDS, "greedy", 0.0)
    torch.testing.assert_close(-loss, expected)
    torch.testing.assert_close(metrics["reward"], expected.detach())
    torch.testing.assert_close(grads(-loss, draft), grads(expected, draft))


def test_rejection_sampling_equals_enumeration_of_all_drafts_and_coins():
    """The mean of the closed form over the target's texts is the expectation over drafts and coins."""
    target, draft = tables(1)
    expected = 0.0
    for window in itertools.product(range(V), repeat=K):
        drawn, reached, value = 1.0, 1.0, 0.0
        for i in range(K):
            q, p = draft[window[:i]].softmax(-1)[window[i]], target[window[:i]].softmax(-1)[window[i]]
            drawn = drawn * q
            accept = torch.minimum(p / q, torch.ones_like(p))
            value = value + reached * (1 - accept) * REWARDS[i]
            reached = reached * accept
        expected = expected + drawn * (value + reached * REWARDS[K])
    texts = list(itertools.product(range(V), repeat=K))
    weights = [torch.stack([target[t[:i]].softmax(-1)[t[i]] for i in range(K)]).prod() for t in texts]
    found = sum(-w * exact_loss(along([t], target, draft), REWARDS, "sampling", 0.0)[0] for t, w in zip(texts, weights))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads(found, draft), grads(expected, draft))


def test_the_control_variate_changes_the_noise_of_the_gradient_but_not_its_mean(monkeypatch):
    """Over all pairs of texts: the same loss, the same mean gradient, less variance."""
    target, draft = tables(6, v=2)
    texts = list(itertools.product(range(2), repeat=K))
    chances = [torch.stack([target[t[:i]].softmax(-1)[t[i]] for i in range(K)]).prod() for t in texts]
    pairs = list(itertools.product(range(len(texts)), repeat=2))
    weights = torch.stack([chances[a] * chances[b] for a, b in pairs])

    def all_pairs():
        losses = [exact_loss(along([texts[a], texts[b]], target, draft), REWARDS, "sampling", 0.0)[0] for a, b in pairs]
        return torch.stack(losses).detach(), torch.stack([grads(loss, draft) for loss in losses])

    losses, with_credit = all_pairs()
    monkeypatch.setattr(objectives, "_worth_of_acceptance", lambda stands, *_: torch.zeros_like(stands))
    plain_losses, plain = all_pairs()
    torch.testing.assert_close(losses, plain_losses)
    mean = weights @ with_credit
    torch.testing.assert_close(mean, weights @ plain)
    noise, plain_noise = (weights @ (values - mean).square().sum(-1) for values in (with_credit, plain))
    assert float(noise) < 0.9 * float(plain_noise)


def test_a_greedy_window_ends_where_the_text_leaves_the_targets_argmax():
    target, draft = tables(2)
    first = int(target[()].argmax())
    other = (int(target[(first,)].argmax()) + 1) % V
    loss, _ = exact_loss(along([(first, other, 0)], target, draft), REWARDS, "greedy", 0.0)
    q1 = draft[()].softmax(-1)[first]
    q2 = draft[(first,)].softmax(-1).gather(0, target[(first,)].argmax())
    torch.testing.assert_close(-loss, REWARDS[0] + q1 * 0.7 + q1 * q2 * 0.5)


def test_text_takes_the_rule_that_wrote_each_text():
    target, draft = tables(3)
    windows = along([(0, 1, 2), (3, 2, 1)], target, draft)
    mixed = TextWindows(**{**vars(windows), "sampled": torch.tensor([True, False])})
    one, two = along([(0, 1, 2)], target, draft), along([(3, 2, 1)], target, draft)
    expected = (exact_loss(one, REWARDS, "sampling", 0.0)[0] + exact_loss(two, REWARDS, "greedy", 0.0)[0]) / 2
    torch.testing.assert_close(exact_loss(mixed, REWARDS, "text", 0.0)[0], expected)


def test_the_anchor_weighs_states_by_the_chance_of_reaching_them():
    target, draft = tables(4)
    windows = along([(0, 1, 2)], target, draft)
    a = windows.states.accept[0]  # what the anchor weighs by are the tokens before a state
    reach = torch.stack((torch.ones(()).double(), a[0], a[0] * a[1])).detach()
    expected = (reach * windows.states.kl[0]).sum() / reach.sum()
    with_kl, without = (exact_loss(windows, REWARDS, "sampling", beta)[0] for beta in (2.0, 0.0))
    torch.testing.assert_close(with_kl - without, 2 * expected)


def test_bad_arguments_are_named():
    windows = along([(0, 1, 2)], *tables())
    with pytest.raises(ValueError, match=r"Expected rewards \(4,\)"):
        exact_loss(windows, REWARDS[:3], "greedy", 0.0)
    with pytest.raises(ValueError, match="verification must be"):
        exact_loss(windows, REWARDS, "both", 0.0)


def test_the_mean_over_many_rollouts_is_the_closed_form():
    """The same windows of the target's greedy text, drafted 600 times by the trainer's own rollout."""
    target, drafter = make_pair(draft_vocab_size=32)
    batch = make_batch(rows=2, length=6)
    for _ in range(12):
        best = target.read(batch.input_ids).logits[:, -1:].argmax(-1)
        batch.input_ids = torch.cat((batch.input_ids, best), 1)
    batch.loss_mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    batch.loss_mask[:, 8:] = True
    batch.lengths += 12
    options = {"window_size": 3, "windows_per_sequence": 8, "adaptive_switch": 1.0, "proximity_bonus": 0.0}
    config = make_config(group_size=600, max_forest_nodes=4500, **options)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    for _ in range(60):  # a drafter that agrees with its target now and then
        optimizer.zero_grad()
        cst_loss(read_windows(target, drafter, batch, 3)[0], 1.0)[0].backward()
        optimizer.step()
    with torch.no_grad():
        rollout, metrics = stage2.roll_out(config, target, drafter, batch, 1)
        windows, _ = read_windows(target, drafter, batch, 3, (rollout.starts, rollout.window_mask))
        _, found = exact_loss(windows, speedup_reward(torch.arange(4), 0.12), "greedy", 0.0)
    assert windows.greedy.all() and len(windows.mask) == 16
    assert 0.2 < float(found["reward"]) < 2
    assert float(metrics["reward"]) == pytest.approx(float(found["reward"]), abs=0.02)
    assert float(metrics["acceptance_length"]) == pytest.approx(float(found["acceptance_length"]), abs=0.02)
