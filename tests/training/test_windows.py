"""Criticality and window sampling: hand-computed values, limits, and the frequencies of the draw."""

import math

import pytest
import torch

from ppow.training.windows import (
    adaptive_on,
    confidence,
    criticality,
    divergence,
    sample_windows,
    wanted_windows,
    window_priority,
)


def logs(*probs):
    """Log-probabilities in float64, log 0 = -inf."""
    return torch.tensor(probs, dtype=torch.float64).log()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_confidence_by_hand():
    # H(1/2, 1/4, 1/4) = 1/2 log 2 + 2 * 1/4 log 4 = 1.5 log 2 = 1.0397; log 3 = 1.0986; C = 1 - 0.94639
    assert confidence(logs(0.5, 0.25, 0.25)).item() == pytest.approx(0.05360536964281382)
    # H(1/2, 1/2, 0, 0) = log 2, half of log 4
    assert confidence(logs(0.5, 0.5, 0.0, 0.0)).item() == pytest.approx(0.5)


def test_confidence_is_one_for_one_hot_and_zero_for_uniform():
    both = torch.stack((logs(0.0, 1.0, 0.0, 0.0), logs(0.25, 0.25, 0.25, 0.25)))
    assert confidence(both).tolist() == [1.0, 0.0]


def test_confidence_stays_in_range_in_float32():
    """Rounding alone would take uniform targets of some sizes below 0."""
    found = [confidence(torch.zeros(size).log_softmax(-1)) for size in range(2, 600)]
    found.append(confidence((torch.randn(1000, 50, generator=generator()) * 20).log_softmax(-1)))
    assert all(part.min() >= 0 and part.max() <= 1 for part in found)


def test_divergence_by_hand():
    # KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 log 3/2 + 1/4 log 1/2 = 0.30410 - 0.17329
    assert divergence(logs(0.75, 0.25), logs(0.5, 0.5)).item() == pytest.approx(0.13081203594113697)
    # the other way round: 1/2 log 2/3 + 1/2 log 2 = -0.20273 + 0.34657: the target is the anchor, KL is not symmetric
    assert divergence(logs(0.5, 0.5), logs(0.75, 0.25)).item() == pytest.approx(0.14384103622589042)


def test_divergence_of_equal_distributions_is_zero_and_else_positive():
    p = torch.randn(64, 7, generator=generator(1), dtype=torch.float64).log_softmax(-1)
    q = torch.randn(64, 7, generator=generator(2), dtype=torch.float64).log_softmax(-1)
    assert divergence(p, p).abs().max() == 0
    assert divergence(logs(0.0, 1.0), logs(0.0, 1.0)) == 0
    assert divergence(p, q).min() > 0


def test_divergence_stays_finite_where_the_drafter_excludes_a_token():
    # P puts 1/2 on a token with q = 0, counted as log q = -1e4: 1/2 * 1e4 + log 1/2
    found = divergence(logs(0.5, 0.5), logs(1.0, 0.0))
    assert found.item() == pytest.approx(5000 + math.log(0.5))
    # a token that P excludes costs nothing
    assert divergence(logs(1.0, 0.0), logs(0.5, 0.5)).item() == pytest.approx(math.log(2))


def test_criticality_by_hand():
    # C(3/4, 1/4) = 1 - 0.56234 / 0.69315 = 0.18872; times the KL of 0.13081 above
    assert criticality(logs(0.75, 0.25), logs(0.5, 0.5)).item() == pytest.approx(0.18872187554086717 * 0.13081203594)
    # a uniform target has no confidence, however wrong the drafter; an agreed token no divergence
    assert criticality(logs(0.5, 0.5), logs(0.999, 0.001)).item() == 0
    assert criticality(logs(1.0, 0.0), logs(1.0, 0.0)).item() == 0


def test_window_priority_by_hand():
    critical = torch.tensor([[1.0, 2.0, 6.0, 0.0, 3.0], [5.0, 5.0, 8.0, 4.0, 9.0]])
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]]).bool()
    priority, exists = window_priority(critical, valid, 3)
    # row 0: (1+2+6)/3, (2+6+0)/3, (6+0+3)/3; row 1: pair 1 is not valid, so only the window over pairs 2, 3, 4 is left
    torch.testing.assert_close(priority, torch.tensor([[3, 8 / 3, 3, 0, 0], [0, 0, 7, 0, 0]]))
    assert exists.tolist() == [[True, True, True, False, False], [False, False, True, False, False]]


def test_window_priority_ignores_what_invalid_pairs_hold():
    critical = torch.tensor([[float("nan"), 2.0, 4.0, float("inf")]])
    priority, exists = window_priority(critical, torch.tensor([[False, True, True, False]]), 2)
    assert priority.tolist() == [[0.0, 3.0, 0.0, 0.0]]
    assert exists.tolist() == [[False, True, False, False]]


def test_window_priority_of_a_text_shorter_than_a_window():
    priority, exists = window_priority(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), 4)
    assert not exists.any() and not priority.any()


def test_window_of_one_token_is_the_pair_itself():
    critical = torch.rand(2, 6, generator=generator())
    valid = torch.tensor([[1, 0, 1, 1, 0, 1]] * 2).bool()
    priority, exists = window_priority(critical, valid, 1)
    assert torch.equal(exists, valid) and torch.equal(priority[valid], critical[valid])


def test_all_wanted_windows_and_no_more_rows_than_that():
    wanted = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    starts, mask = wanted_windows(wanted)
    assert starts.shape == (3, 3) and starts.dtype == torch.int64
    assert [row[m].tolist() for row, m in zip(starts, mask)] == [[1, 3, 4], [0], []]
    starts, mask = wanted_windows(torch.zeros(2, 4, dtype=torch.bool))
    assert starts.shape == (2, 1) and not mask.any()


@pytest.mark.parametrize("adaptive", [False, True])
def test_windows_are_drawn_without_replacement_among_those_that_exist(adaptive):
    exists = torch.rand(40, 12, generator=generator(3)) > 0.5
    priority = torch.rand(40, 12, generator=generator(4)) * exists
    starts, mask = sample_windows(priority, exists, 5, generator(5), adaptive)
    assert starts.dtype == torch.int64 and starts.shape == mask.shape == (40, 5)
    for row in range(40):
        drawn = starts[row][mask[row]].tolist()
        assert len(drawn) == len(set(drawn)) == min(5, int(exists[row].sum()))
        assert all(exists[row, s] for s in drawn)
        assert not starts[row][~mask[row]].any()


@pytest.mark.parametrize("adaptive", [False, True])
def test_more_windows_asked_for_than_positions(adaptive):
    exists = torch.tensor([[True, True, False], [False, False, False]])
    starts, mask = sample_windows(torch.ones(2, 3), exists, 5, generator(), adaptive)
    assert mask.tolist() == [[True, True, False, False, False], [False] * 5]
    assert sorted(starts[0, :2].tolist()) == [0, 1] and not starts[1].any()


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_generator_decides_the_draw(adaptive):
    priority, exists = torch.rand(4, 50, generator=generator(1)), torch.ones(4, 50, dtype=torch.bool)
    first, same, other = (sample_windows(priority, exists, 6, generator(seed), adaptive)[0] for seed in (7, 7, 8))
    assert torch.equal(first, same) and not torch.equal(first, other)


def chi_square(observed, expected):
    return float(((observed.double() - expected) ** 2 / expected).sum())


def draw_pairs(priority, adaptive, rows=20000):
    """Two windows of each of many equal texts of four positions, the third of which starts no window."""
    exists = torch.tensor([True, True, False, True]).expand(rows, -1)
    many = None if priority is None else torch.tensor(priority).expand(rows, -1)
    starts, mask = sample_windows(many, exists, 2, generator(11), adaptive)
    assert mask.all()
    return torch.bincount(starts[:, 0] * 4 + starts[:, 1], minlength=16).reshape(4, 4)


@pytest.mark.parametrize(
    ("priority", "adaptive", "weights"),
    [
        (None, False, {0: 1, 1: 1, 3: 1}),
        ([1.0, 2.0, 50.0, 5.0], False, {0: 1, 1: 1, 3: 1}),  # before the switch priorities do not matter
        ([1.0, 2.0, 50.0, 5.0], True, {0: 1, 1: 2, 3: 5}),
        ([0.0, 0.0, 0.0, 0.0], True, {0: 1, 1: 1, 3: 1}),
    ],
)
def test_frequencies_follow_the_priorities(priority, adaptive, weights):
    """Pr(first i, then j) = w_i / sum w * w_j / (sum w - w_i): 6 outcomes, 5 degrees of freedom."""
    counts = draw_pairs(priority, adaptive)
    total = sum(weights.values())
    pairs = [(i, j) for i in weights for j in weights if i != j]
    expected = torch.tensor([20000 * weights[i] / total * weights[j] / (total - weights[i]) for i, j in pairs])
    observed = torch.tensor([int(counts[i, j]) for i, j in pairs])
    assert observed.sum() == 20000
    assert chi_square(observed, expected.double()) < 20.52  # 99.9% quantile


def test_a_window_without_priority_is_hardly_ever_drawn_first():
    counts = draw_pairs([0.0, 1.0, 0.0, 1.0], True)
    assert counts[0].sum() == 0


def test_adaptive_on_after_the_switch():
    # half of 10 steps: steps 1..5 uniform, 6..10 by priority
    assert [adaptive_on(step, 10, 0.5) for step in range(1, 11)] == [False] * 5 + [True] * 5
    assert all(adaptive_on(step, 4, 0.0) for step in range(1, 5))
    assert not any(adaptive_on(step, 4, 1.0) for step in range(1, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confidence(torch.zeros(3, 1)), "at least 2 tokens"),
        (lambda: confidence(torch.tensor(0.0)), "at least 2 tokens"),
        (lambda: divergence(torch.zeros(2, 3), torch.zeros(2, 4)), "restrict the target"),
        (lambda: criticality(torch.zeros(2, 3), torch.zeros(1, 3)), "cannot be compared"),
        (lambda: window_priority(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool), 2), "one shape"),
        (lambda: window_priority(torch.zeros(3), torch.ones(3, dtype=torch.bool), 2), "one shape"),
        (lambda: window_priority(torch.zeros(2, 3), torch.ones(2, 3), 2), "valid of bool"),
        (lambda: window_priority(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 0), "window_size=0"),
    ],
)
def test_bad_distributions_and_windows(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("priority", "exists", "count", "adaptive", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), 1, True, "exists must be bool"),
        (torch.ones(3), torch.ones(3, dtype=torch.bool), 1, True, r"exists must be bool \(B, T\)"),
        (torch.ones(2, 4), torch.ones(2, 3, dtype=torch.bool), 1, True, "needs a priority of shape"),
        (None, torch.ones(2, 3, dtype=torch.bool), 1, True, "got None"),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), 0, True, "count=0"),
    ],
)
def test_bad_draws(priority, exists, count, adaptive, message):
    with pytest.raises(ValueError, match=message):
        sample_windows(priority, exists, count, generator(), adaptive)
