"""Acceptance, rewards and advantages: hand-computed values, and expectations by exact enumeration."""

import itertools
import math

import pytest
import torch

from ppow.acceptance_ppow import accepted_greedy, accepted_sampling
from ppow.training.rewards import (
    group_advantages,
    proximity_gap,
    proximity_reward,
    reachable,
    speedup_reward,
)

# A world of 3 tokens and windows of 3: both models look at the previous token only (3: before the first).
TARGET = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.4, 0.35, 0.25], [0.2, 0.5, 0.3]], dtype=torch.float64)
DRAFT = torch.tensor([[0.5, 0.1, 0.4], [0.3, 0.3, 0.4], [0.2, 0.6, 0.2], [0.25, 0.45, 0.3]], dtype=torch.float64)
WINDOWS = torch.tensor(list(itertools.product(range(3), repeat=3)))  # (27, 3)
PREVIOUS = torch.cat((torch.full((27, 1), 3), WINDOWS[:, :-1]), dim=1)  # (27, 3)
DRAFTED = DRAFT[PREVIOUS, WINDOWS]  # (27, 3) q of every token of every window
WANTED = TARGET[PREVIOUS, WINDOWS]  # (27, 3) p


def test_accepted_greedy_by_hand():
    drafts = torch.tensor([[4, 5, 6], [4, 5, 9], [4, 9, 6], [9, 5, 6]])
    # a match after a mismatch does not count
    assert accepted_greedy(drafts, torch.tensor([4, 5, 6]).expand(4, -1)).tolist() == [3, 2, 1, 0]


def test_accepted_sampling_by_hand():
    # p / q = 0.5, 2, 0.25: a coin below the ratio accepts, one at the ratio does not, a ratio above 1 always does
    draft = torch.tensor([0.5, 0.25, 0.8]).log().expand(4, -1)
    target = torch.tensor([0.25, 0.5, 0.2]).log().expand(4, -1)
    coins = torch.tensor([[0.4, 0.99, 0.2], [0.4, 0.99, 0.3], [0.6, 0.0, 0.0], [0.5, 0.0, 0.0]])
    assert accepted_sampling(draft, target, coins).tolist() == [3, 2, 0, 0]


def test_accepted_sampling_never_accepts_what_the_target_excludes():
    zero = torch.tensor([[0.0]])
    assert accepted_sampling(zero, torch.tensor([[-torch.inf]]), zero).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_accepted_is_int64(dtype):
    tokens = torch.zeros(2, 3, dtype=dtype)
    logprobs = torch.zeros(2, 3)
    assert accepted_greedy(tokens, tokens).dtype == torch.int64
    assert accepted_sampling(logprobs, logprobs, logprobs).dtype == torch.int64


def test_expected_accepted_length_of_rejection_sampling():
    """E[k] from the function equals sum_j E_P[..]: the accepted mass of every prefix is a product of min(p, q).

    The coins of a window are enumerated too: each lies below or above p / q, so that one representative on each side,
    with its probability, stands for all of them.
    """
    ratio = (WANTED / DRAFTED).clamp(max=1)  # (27, 3) chance that a coin accepts
    expected_k = 0.0
    for sides in itertools.product((True, False), repeat=3):  # each coin accepts, or rejects
        below = torch.tensor(sides)
        chance = torch.where(below, ratio, 1 - ratio).prod(-1) * DRAFTED.prod(-1)  # (27,)
        coins = torch.where(below, ratio / 2, (ratio + 1) / 2)
        k = accepted_sampling(DRAFTED.log(), WANTED.log(), coins)
        possible = chance > 0
        expected_k += float((chance * k)[possible].sum())
    # Pr(k >= j) by the path: sum over x_1..x_j of prod min(p, q)
    least = torch.minimum(TARGET, DRAFT)  # (4, 3)
    reach, lengths = least[3], []
    for _ in range(3):
        lengths.append(float(reach.sum()))
        reach = reach @ least[:3]
    assert lengths[0] == pytest.approx(0.2 + 0.45 + 0.3)  # sum min(P, Q) of the first token
    assert expected_k == pytest.approx(sum(lengths), abs=1e-12)


def test_expected_accepted_length_of_rejection_sampling_without_memory():
    """Where the distributions do not depend on the prefix, E[k] = sum_j prod_{i<=j} sum_v min(P_i, Q_i)."""
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.5, 0.0, 0.5]], dtype=torch.float64)  # (K, V)
    q = torch.tensor([[0.5, 0.25, 0.25], [0.3, 0.3, 0.4], [0.2, 0.6, 0.2]], dtype=torch.float64)
    place = torch.arange(3).expand(27, -1)
    wanted, drafted = p[place, WINDOWS], q[place, WINDOWS]
    # a fine grid of coins, the same for every token, is exact when no p / q falls inside a cell: 1 / 60 divides all
    grid = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    coins = torch.cartesian_prod(grid, grid, grid)  # (60^3, 3)
    expected_k = 0.0
    for window in range(27):
        rows = [t[window].expand(len(coins), -1) for t in (drafted.log(), wanted.log())]
        expected_k += float(drafted[window].prod() * accepted_sampling(*rows, coins).double().mean())
    a = [0.5 + 0.2 + 0.1, 1.0, 0.2 + 0.0 + 0.2]  # sum min(p, q)
    assert expected_k == pytest.approx(a[0] + a[0] * a[1] + a[0] * a[1] * a[2], abs=1e-9)


def test_expected_accepted_length_of_greedy_verification():
    """E[k] = sum_j prod_{i<=j} q(argmax P_i) along the target's own greedy text."""
    k = accepted_greedy(WINDOWS, TARGET[PREVIOUS].argmax(-1))
    expected_k = float((DRAFTED.prod(-1) * k).sum())
    # the greedy text: 1 (0.5 of row "start"), then 2 (0.7 after 1), then 0 (0.4 after 2)
    chances = [0.45, 0.4, 0.2]  # the drafter's q of 1, of 2 after 1, of 0 after 2
    assert expected_k == pytest.approx(0.45 + 0.45 * 0.4 + math.prod(chances), abs=1e-12)


def test_speedup_reward_by_hand():
    # gamma = 0.12: 0, 1 / 1.12, 5 / 1.6, 10 / 2.2
    found = speedup_reward(torch.tensor([0, 1, 5, 10]), 0.12)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.8928571, 3.125, 4.5454545]))


def test_speedup_reward_is_concave():
    assert (speedup_reward(torch.arange(11), 0.12).diff().diff() < 0).all()


def test_speedup_reward_is_k_when_drafting_is_free():
    assert speedup_reward(torch.arange(4), 0.0).tolist() == [0, 1, 2, 3]


def test_proximity_reward_by_hand():
    best = torch.tensor([[-0.1, -0.2], [-0.1, -0.2], [-0.1, -0.2]])
    drafted = torch.tensor([[-1.0, -0.8], [-2.0, -1.0], [-1.0, -0.8]])
    gap = proximity_gap(best, drafted)  # (-0.1 - 0.2) - (-1.0 - 0.8) = 1.5, and (-0.1 - 0.2) - (-2.0 - 1.0) = 2.7
    torch.testing.assert_close(gap, torch.tensor([1.5, 2.7, 1.5]))
    # the third is as near as the first, but one of its tokens was accepted
    assert proximity_reward(torch.tensor([0, 0, 1]), gap, 0.5, 2.0).tolist() == [0.5, 0.0, 0.0]


def test_proximity_margin_is_strict():
    gap = torch.tensor([2.0])
    assert proximity_reward(torch.tensor([0]), gap, 1.0, 2.0).item() == 0
    assert proximity_reward(torch.tensor([0]), gap, 1.0, 2.001).item() == 1


def test_proximity_reward_only_where_nothing_was_accepted():
    assert proximity_reward(torch.arange(5), torch.zeros(5), 1.0, 1.0).tolist() == [1, 0, 0, 0, 0]


def test_group_advantages_by_hand():
    # mean 2, deviations -2, 0, 2: population variance 8 / 3, std 1.63299
    rewards = torch.tensor([[0.0, 2.0, 4.0]])
    torch.testing.assert_close(group_advantages(rewards), torch.tensor([[-1.2247449, 0.0, 1.2247449]]))


def test_advantages_sum_to_zero_in_each_group():
    rewards = torch.rand(50, 4, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 51)[:, None, None]
    assert group_advantages(rewards).sum(-1).abs().max() < 1e-4


def test_normalised_advantages_do_not_depend_on_the_scale_of_the_reward():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    torch.testing.assert_close(group_advantages(rewards), group_advantages(100 * rewards + 7), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [2, 3, 5, 7, 8, 13, 31])
def test_groups_of_equal_rewards_teach_exactly_nothing(size):
    """Also where the float32 mean of equal rewards is off by a rounding, which a tiny std would blow up to 1."""
    rewards = speedup_reward(torch.arange(11), 0.12)[:, None].repeat(1, size)
    assert not group_advantages(rewards).any()


def test_reachable_by_hand():
    # the accepted ones and the first rejected one; all of them when none was rejected
    found = reachable(torch.tensor([[0, 1], [2, 3]]), 3).int()
    assert found.tolist() == [[[1, 0, 0], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]]]


def zeros(*shape):
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accepted_greedy(zeros(2, 3), zeros(2, 4)), "one shape"),
        (lambda: accepted_greedy(zeros(2, 3), zeros(3)), "one shape"),
        (lambda: accepted_greedy(torch.tensor(1), torch.tensor(1)), "one shape"),
        (lambda: accepted_sampling(zeros(2, 3), zeros(2, 3), zeros(2, 1)), "coins"),
        (lambda: proximity_gap(zeros(2, 3), zeros(2, 4)), "one shape"),
        (lambda: proximity_reward(zeros(3), zeros(2), 1.0, 1.0), "accepted"),
        (lambda: group_advantages(zeros(4, 1)), "at least 2 rollouts"),
        (lambda: group_advantages(torch.tensor(1.0)), "at least 2 rollouts"),
        (lambda: speedup_reward(zeros(2), -0.1), "cost_ratio"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
