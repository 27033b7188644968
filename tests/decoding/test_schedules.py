"""When windows end: the rules by hand-computed cases, with costs and clocks of the test's own; what is decoded by them
is the target's, whatever they choose."""

import copy
import itertools

import pytest
import torch
from transformers import GenerationConfig

from decoding_helpers import MODES, generate_with, prompt_batches, trained_pair
from ppow import graphs_ppow, pair_ppow, recording_ppow
from ppow.drafting_ppow import DraftOptions, what_was_drafted
from ppow.schedules_ppow import (
    SCHEDULES,
    Confidence,
    CostAhead,
    CostAware,
    Costs,
    GammaTune,
    Heuristic,
    Positions,
    Rate,
    Schedule,
    best_length,
    costs_of,
    pays,
    rising,
)

NAMED = [name for name in SCHEDULES if name != "auto"]


class Table(Costs):
    """Costs that are known, and that no measurement changes."""

    def __init__(self, verification, step=1.0, first=0.0, rest=0.0):
        super().__init__()
        self.seconds = {"step": step, "first": first, "rest": rest}
        self.price = verification

    def add(self, part, seconds):
        pass

    def enough(self, nodes):
        return True

    def known(self):
        return [1, 2, 3, 4, 100]

    def verification(self, nodes):
        return self.price(nodes)


FLAT = Table(lambda nodes: 10.0, step=0.01)  # a further draft is all but free
STEEP = Table(lambda nodes: 10.0 * nodes)  # a window of n nodes costs what n tokens cost
MIDDLE = Table(lambda nodes: 9.0 + nodes, rest=1.0)


# -- what pays ---------------------------------------------------------------------------------------------------------


def test_further_drafts_pay_when_they_gain_more_than_their_time_brings_elsewhere():
    assert pays([0.5, 0.25], [2.0, 3.0], 0.24)  # 0.5 > 0.48
    assert not pays([0.5, 0.25], [2.0, 3.0], 0.26)  # 0.5 < 0.52 and 0.75 < 0.78
    assert pays([0.5, 0.5], [2.0, 2.5], 0.3)  # one does not (0.5 < 0.6), two together do (1.0 > 0.75)
    assert not pays([], [], 0.0) and pays([0.01], [5.0], 0.0)


def test_the_best_length_of_windows():
    # 1 / 10; 1.5 / 11.5; 1.75 / 13; 1.875 / 14.5 tokens a second
    seconds = {0: 10.0, 1: 11.5, 2: 13.0, 3: 14.5}
    assert best_length([0.5] * 3, seconds) == 2
    assert best_length([0.1] * 3, seconds) == 0
    assert best_length([0.9] * 3, seconds) == 3
    assert best_length([0.5] * 3, {1: 11.5, 3: 14.5}) == 1  # 0.1304 against 0.1293


def test_a_rate_is_of_its_newest_windows():
    rate = Rate()
    assert rate.now() == 0
    rate.learn(3.0, 10.0)
    rate.learn(1.0, 10.0)
    assert rate.now() == pytest.approx((0.95 * 3 + 1) / (0.95 * 10 + 10))


# -- what is known -----------------------------------------------------------------------------------------------------


def test_costs_are_medians_without_the_first_and_move_only_when_they_really_change():
    costs = Costs()
    for seconds in (90.0, 10.0, 30.0, 11.0):  # the first verification of a size also chooses how to multiply
        costs.add(4, seconds)
    assert costs.verification(4) == 11.0
    for seconds in (10.5, 10.5, 10.5):
        costs.add(4, seconds)
    assert costs.verification(4) == 11.0  # the median is 10.5 now: within 10%
    for _ in range(8):
        costs.add(4, 5.0)
    assert costs.verification(4) == 5.0
    assert not costs.enough(5) and costs.enough(4)
    costs.add("step", 2.0)  # nothing is left out here
    assert costs.seconds["step"] == 2.0


def test_costs_of_sizes_that_were_not_measured():
    costs = Costs()
    assert costs.verification(3) == 0.0
    for nodes, seconds in ((2, 10.0), (4, 16.0), (6, 18.0), (12, 26.0)):
        for _ in range(4):
            costs.add(nodes, seconds)
    for _ in range(3):
        costs.add(5, 99.0)  # too few to count
    assert costs.verification(1) == 10.0  # below what is known: the least that is
    assert costs.verification(3) == 13.0
    assert costs.verification(5) == 17.0 and costs.verification(6) == 18.0
    assert costs.verification(9) == 22.0
    assert costs.verification(17) == 34.0  # beyond: 16 over 10 nodes
    costs.add("first", 1.0), costs.add("step", 2.0), costs.add("rest", 3.0)
    assert costs.drafting(0) == 0.0 and costs.drafting(1) == 1.0 and costs.drafting(3) == 5.0
    assert costs.cycle(3, 2) == 3.0 + 5.0 + 13.0


def test_more_nodes_count_as_no_cheaper_than_fewer():
    """Two sizes that were measured the other way round, at different moments, have their mean; by hand."""
    assert rising([], []) == [] and rising([3.0, 1.0, 2.0], [1, 1, 1]) == [2.0, 2.0, 2.0]
    assert rising([1.0, 4.0, 2.0, 5.0], [1, 1, 3, 1]) == [1.0, 2.5, 2.5, 5.0]
    assert rising([2.0, 1.0, 0.0, 9.0, 8.0], [1, 1, 2, 1, 1]) == [0.75, 0.75, 0.75, 8.5, 8.5]
    costs = Costs()
    for nodes, seconds in ((1, 60.0), (2, 50.0), (4, 80.0), (5, 60.0), (8, 90.0)):
        for _ in range(5):  # of which the first is left out
            costs.add(nodes, seconds)
    assert [costs.verification(nodes) for nodes in (1, 2, 3, 4, 5, 8)] == [55.0, 55.0, 62.5, 70.0, 70.0, 90.0]
    assert costs.seconds[4] == 80.0  # what was measured stays


def test_a_machine_that_becomes_faster_does_so_for_every_size():
    """Else what was measured while it was busy would never be measured again, and rule its sizes out."""
    costs = Costs()
    for nodes, seconds in ((2, 10.0), (4, 12.0), (8, 20.0)):
        for _ in range(4):
            costs.add(nodes, seconds)
    for _ in range(4):
        costs.add(2, 5.0)  # the median is halved by the last of them
    assert [costs.verification(nodes) for nodes in (2, 4, 8)] == pytest.approx([5.0, 6.0, 10.0])
    for _ in range(5):
        costs.add(4, 9.0)  # what is measured comes before what was reckoned
    assert costs.verification(4) == 9.0


def test_costs_belong_to_a_loaded_pair_and_how_it_runs():
    target, drafter, other = (torch.nn.Linear(1, 1) for _ in range(3))
    assert costs_of(target, drafter, "cpu") is costs_of(target, drafter, "cpu")
    assert costs_of(target, drafter, "cpu") is not costs_of(target, drafter, "cuda")
    assert costs_of(target, drafter, "cpu") is not costs_of(target, other, "cpu")


def test_confidence_is_calibrated_by_what_was_accepted():
    confidence = Confidence()
    assert confidence.rate(0.55) == pytest.approx(0.55) and confidence.rate(1.0) == 1.0
    for accepted in (True, True, True, False):
        confidence.learn(0.51, accepted)
    assert confidence.rate(0.55) == pytest.approx((4 * 0.55 + 3) / 8)
    assert confidence.rate(0.65) == pytest.approx(0.65)  # another interval
    confidence.forget()
    assert confidence.rate(0.55) == pytest.approx((4 * 0.55 + 0.99 * 3) / (4 + 0.99 * 4))


def test_rates_by_position():
    positions = Positions(3)
    assert positions.rates() == pytest.approx([0.7, 0.7, 0.7])
    positions.learn(3, [1, 3, 0], [2, 1, 0])  # the second row stopped behind its first token, the third had ended
    first = (4 * 0.7 + 2) / (4 + 2)
    second = (4 * first + 0) / (4 + 1)
    assert positions.rates() == pytest.approx([first, second, second])


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_gammatune_by_hand():
    schedule, asked = GammaTune(10), []
    for accepted in (3, 5, 7, 9, 10, 2, 0, 0, 4):
        asked.append(schedule.begin([0], 100))
        schedule.learn(asked[-1], [min(accepted, asked[-1])], [1 + min(accepted, asked[-1])])
    # 3 of 3, 5 of 5, 7 of 7, 9 of 9, 10 of 10; then 0.7 * 10 + 0.6 = 7.6, 0.7 * 7.6 = 5.32, 0.7 * 5.32 = 3.724,
    # and 4 of 4 lead to 6
    assert asked == [3, 5, 7, 9, 10, 10, 8, 6, 4]
    assert schedule.begin([0], 100) == 6
    for _ in range(20):
        asked.append(schedule.begin([0], 100))
        schedule.learn(asked[-1], [0], [1])
    assert asked[-1] == 1


def test_gammatune_plus_learns_nothing_of_longer_windows_from_one_that_ended_early():
    schedule = GammaTune(10)
    schedule.begin([0], 100)
    schedule.learn(2, [2], [3])  # a threshold ended it
    assert schedule.begin([0], 100) == 3
    schedule.learn(2, [0], [1])  # 0.7 * 3
    assert schedule.begin([0], 100) == 3 and schedule.mean == pytest.approx(2.1)


def test_gammatune_takes_the_mean_of_a_batch_and_the_lengths_that_are_recorded():
    schedule = GammaTune(10, step=2)
    assert schedule.begin([0, 1], 100) == 4
    schedule.learn(4, [4, 1, 0], [5, 2, 0])  # 0.7 * 3 + 0.3 * 2.5 = 2.85
    assert schedule.mean == pytest.approx(2.85) and schedule.begin([0, 1], 100) == 4
    schedule.learn(4, [4, 4, 0], [5, 5, 0])
    assert schedule.begin([0], 100) == 6
    assert GammaTune(2).begin([0], 100) == 2 and GammaTune(10).begin([0], 1) == 1


def test_transformers_heuristic():
    schedule, asked = Heuristic(6), []
    for accepted in (2, 1, 4, 0, 6, 6):
        asked.append(schedule.begin([0], 100))
        schedule.learn(asked[-1], [min(accepted, asked[-1])], [1 + accepted])
    assert asked == [6, 5, 4, 6, 5, 6]


def aware(costs, size, rate, confidence=None):
    schedule = CostAware(size, costs, clock=itertools.count().__next__)
    schedule.average.learn(rate, 1.0)
    return schedule


def test_a_draft_joins_where_its_chance_is_worth_a_row():
    """V(n) = 9 + n, a step 1 s, 0.4 tokens a second; one draft more costs 1 s to verify, that is 0.4 tokens."""
    for confidence, joins in ((0.41, True), (0.39, False)):
        schedule = aware(MIDDLE, 1, 0.4)
        assert schedule.begin([0], 100) == 1
        assert schedule.takes([confidence]) is joins
    # with room behind it, at 0.2 tokens a second: 0.19 < 0.2 * 1, and 0.19 * (1 + 0.7) = 0.323 < 0.2 * (1 + 2)
    schedule = aware(MIDDLE, 2, 0.2)
    schedule.begin([0], 100)
    assert not schedule.takes([0.19])
    assert schedule.takes([0.21])


def test_a_step_is_computed_where_the_next_draft_may_pay_it():
    """Chance c * 0.7 against a step and a row: 2 s at 0.3 tokens a second are 0.6 tokens."""
    for confidence, goes_on in ((0.87, True), (0.84, False)):  # 0.609 and 0.588
        schedule = aware(MIDDLE, 2, 0.3)
        schedule.begin([0], 100)
        assert schedule.takes([confidence])
        assert schedule.goes_on() is goes_on
    # two further ones may pay where one does not: the second is nearly free
    stairs = Table(lambda nodes: 10.0 if nodes < 3 else 13.0, step=0.1)
    for size, goes_on in ((2, False), (3, True)):  # 0.63 < 0.25 * 3.1; 0.63 + 0.441 > 0.25 * 3.2
        schedule = aware(stairs, size, 0.25)
        schedule.begin([0], 100)
        assert schedule.takes([0.9])
        assert schedule.goes_on() is goes_on


def test_chances_multiply_along_the_chain_and_rows_count_by_their_mean():
    schedule = aware(MIDDLE, 3, 0.3)
    schedule.begin([0, 2], 100)  # row 1 has ended
    assert schedule.takes([0.9, 0.0, 0.5])
    assert schedule.chances == pytest.approx([0.9, 0.5])
    assert schedule.takes([0.8, 0.0, 0.4])  # 0.46 tokens for a row of 0.3
    assert schedule.chances == pytest.approx([0.72, 0.2])
    assert not schedule.takes([0.3, 1.0, 0.3])  # 0.138
    schedule.learn(2, [2, 0, 0], [3, 0, 1])
    # 0.9 and 0.8 were accepted, 0.5 was not, 0.4 was not tried
    assert [schedule.confidence.tried[i] for i in (4, 5, 8, 9)] == [0, 1, 1, 1]
    assert [schedule.confidence.accepted[i] for i in (5, 8, 9)] == [0, 1, 1]


def test_the_average_starts_from_the_best_window_of_usual_drafts_and_follows_the_text():
    schedule = CostAware(3, MIDDLE, clock=itertools.count().__next__)
    schedule.begin([0], 100)
    # cycles of 0..3 drafts: 11, 12, 14, 16 s for 1, 1.7, 2.19, 2.533 tokens: 0.0909, 0.1417, 0.1564, 0.1583
    assert schedule.average.now() == pytest.approx(2.533 / 16)
    assert schedule.takes([0.9]) and not schedule.takes([0.01])
    schedule.learn(1, [1], [2])
    # two steps were computed and one draft verified: 1 + 1 + 11 s
    assert schedule.average.now() == pytest.approx((0.95 * 4 * 2.533 + 2) / (0.95 * 4 * 16 + 13))


def test_the_first_windows_of_a_pair_have_lengths_that_tell_what_verifications_cost():
    costs, now = Costs(), itertools.count(0.0, 0.5)
    schedule, lengths = CostAware(8, costs, clock=now.__next__), []
    for _ in range(16):
        lengths.append(schedule.begin([0], 100))
        for j in range(lengths[-1]):
            assert schedule.takes([0.0])  # however unlikely
            assert j + 1 == lengths[-1] or schedule.goes_on()
        schedule.drafted()
        schedule.learn(lengths[-1], [0], [1])
    assert lengths == [8] * 4 + [0] * 4 + [4] * 4 + [1] * 4
    assert all(costs.enough(nodes) for nodes in (1, 2, 5, 9)) and not costs.enough(3)
    assert costs.seconds == dict.fromkeys(("first", "step", "rest", 1, 2, 5, 9), 0.5)
    assert schedule.begin([0], 100) == 8 and not schedule.takes([0.0])
    again = CostAware(8, costs, clock=now.__next__)  # another text knows them
    assert again.begin([0], 100) == 8 and not again.tries
    assert CostAware(6, costs, clock=now.__next__).trial(100) is None  # those tell the others
    assert CostAware(9, costs, clock=now.__next__).trial(100) == 9
    small = CostAware(8, Costs(), clock=now.__next__)
    assert small.begin([0], 3) == 0  # a length that has no room is not tried
    for _ in range(CostAware.AGAIN - 12):
        costs.add(3, 0.5)  # windows of two drafts for a long time
    assert again.trial(100) is None
    costs.add(3, 0.5)
    assert again.trial(100) == 8 and again.trial(7) is None  # the length whose newest measurement is oldest


def test_lengths_are_chosen_ahead_from_cycles_and_acceptance():
    costs, now = Costs(), iter([])
    schedule = CostAhead(7, 2, costs, clock=lambda: next(now))
    assert schedule.lengths == [2, 4, 6, 7]
    seconds = {7: 20.0, 2: 10.0}

    def cycle(accepted):
        nonlocal now
        length = schedule.begin([0], 100)
        now = iter([cycle.at + seconds[length] if length in seconds else cycle.at + 6 + 2 * length])
        cycle.at += seconds.get(length, 6 + 2 * length)
        schedule.learn(length, [min(accepted, length)], [1 + min(accepted, length)])
        return length

    cycle.at = 0.0
    # the first has no verdict before it to count from, the next of each length is not counted
    assert [cycle(1) for _ in range(9)] == [7] * 5 + [2] * 4
    assert costs.seconds == {8: 20.0, 3: 10.0}
    assert schedule.begin([0], 100) == 2  # of windows that break at their second draft
    for _ in range(40):
        cycle(7)
    assert cycle(7) == 7  # all is accepted: 8 tokens in 20 s against 3 in 10


# -- decoding by them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("costs", [FLAT, STEEP, MIDDLE], ids=["flat", "steep", "middle"])
def test_greedy_tokens_are_the_targets_own_whatever_windows_cost(costs, monkeypatch):
    target, drafter = trained_pair()
    monkeypatch.setattr(pair_ppow, "costs_of", lambda *args: costs)
    lengths = set()
    for batch in (1, 3):
        for ids, mask in prompt_batches(batch, 2, seed=batch):
            expected = target.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
            config = {"window_size": 6, "max_new_tokens": 24, "window_schedule": "cost"}
            out = generate_with(target, drafter, ids, mask, config)
            assert torch.equal(out.sequences, expected)
            assert out.drafting.window_schedule == "cost" and out.drafting.cuda_graphs is False
            lengths |= set(itertools.chain(*out.acceptance.drafted))
    if costs is STEEP:  # a draft would have to be certain
        assert lengths == {0}
    elif costs is FLAT:  # but for the ends of texts, where less room is left
        assert 6 in lengths
    else:
        assert len(lengths) > 3


@pytest.mark.parametrize("schedule", NAMED)
def test_greedy_tokens_are_the_targets_own_by_every_schedule_on_the_fast_path(schedule, anywhere, monkeypatch):
    target, drafter = (copy.deepcopy(model) for model in trained_pair())
    monkeypatch.setattr(pair_ppow, "costs_of", lambda *args: MIDDLE)
    recorded = set()
    replay = recording_ppow.Replay.__call__

    def recording(self, name, function, *tensors):
        recorded.add(name[:2])
        return replay(self, name, function, *tensors)

    monkeypatch.setattr(recording_ppow.Replay, "__call__", recording)
    for batch in (1, 3):
        for (ids, mask), eos in zip(prompt_batches(batch, 2, seed=batch), (None, [5, 7, 11])):
            ends = {"max_new_tokens": 40, "eos_token_id": eos, "pad_token_id": 0}
            expected = target.generate(ids, attention_mask=mask, do_sample=False, **ends)
            config = {"window_size": 7, "window_schedule": schedule, "cuda_graphs": True, **ends}
            out = generate_with(target, drafter, ids, mask, config)
            assert torch.equal(out.sequences, expected)
            assert out.drafting.window_schedule == schedule
    chains = {size for kind, size in recorded if kind == "chain"}
    assert chains <= {2, 4, 6, 7}
    verified = {shape[1] - 1 for kind, shape in recorded if kind == "verify"} - {graphs_ppow.PREFILL - 1}
    assert chains == verified  # each length has graphs of its own
    assert chains == {7} if schedule == "constant" else len(chains) > 1


@pytest.mark.parametrize("schedule", ["heuristic", "gammatune"])
def test_a_schedule_without_clocks_follows_the_seed(schedule):
    target, drafter = trained_pair()
    ids, outputs = torch.arange(1, 9)[None], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        config = {"window_size": 6, "window_schedule": schedule, "max_new_tokens": 40, "do_sample": True}
        outputs.append(generate_with(target, drafter, ids, config=config).sequences.tolist())
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_threshold_ends_the_windows_of_gammatune_plus():
    target, drafter = trained_pair()
    ids = torch.arange(1, 9)[None]
    config = {"window_size": 10, "window_schedule": "gammatune", "max_new_tokens": 40}
    plain = generate_with(target, drafter, ids, config=config)
    plus = generate_with(target, drafter, ids, config={**config, "draft_threshold": 0.9})
    assert torch.equal(plus.sequences, plain.sequences) and plus.drafting.draft_threshold == 0.9
    assert sum(plus.acceptance.drafted[0]) < sum(plain.acceptance.drafted[0])


def test_trees_know_no_schedule():
    target, drafter = trained_pair()
    ids = torch.arange(1, 9)[None]
    out = generate_with(target, drafter, ids, config={**MODES["tree"], "max_new_tokens": 8, "window_schedule": "cost"})
    assert out.drafting.window_schedule == "constant" and out.drafting.is_tree
    with pytest.raises(ValueError, match="window_schedule='cost' was asked for"):
        what_was_drafted(out, {"window_schedule": "cost"})


# -- who chooses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "own", "plain", "fast"),
    [
        ({}, {"window_size": 7}, "cost", "constant"),  # nobody asks for a size: what fits the machine
        ({"window_size": 3}, {"window_size": 7}, "constant", "constant"),  # whoever asks for one gets it
        ({"num_assistant_tokens": 3}, {"window_size": 7}, "constant", "constant"),
        ({}, {"window_size": 7, "draft_threshold": 0.4}, "constant", "constant"),
        ({"draft_threshold": 0.0}, {"window_size": 7}, "constant", "constant"),
        ({"window_size": 3}, {"window_size": 7, "window_schedule": "cost"}, "cost", "cost"),
        ({"window_schedule": "gammatune"}, {"window_size": 7, "window_schedule": "cost"}, "gammatune", "gammatune"),
        ({"window_size": 3, "window_schedule": "auto"}, {}, "cost", "constant"),
        ({"num_assistant_tokens_schedule": "heuristic"}, {"window_size": 7}, "heuristic", "heuristic"),
        ({}, {"window_size": 7, "num_assistant_tokens_schedule": "heuristic_transient"}, "heuristic", "heuristic"),
        (
            {"window_schedule": "cost", "num_assistant_tokens_schedule": "heuristic"},
            {"window_size": 7},
            "cost",
            "cost",
        ),
        ({"tree_nodes": 9}, {"window_size": 7, "window_schedule": "cost"}, "constant", "constant"),
    ],
)
def test_who_names_a_schedule_or_a_size_is_taken_at_his_word(call, own, plain, fast):
    options = DraftOptions.resolve(GenerationConfig(**call), GenerationConfig(**own))
    assert (options.on_path(False).window_schedule, options.on_path(True).window_schedule) == (plain, fast)
    assert options.on_path(True).repeats_exactly is (fast == "constant" and not options.is_tree)


def test_sampling_on_a_cpu_ends_windows_by_their_probability_unless_somebody_says_otherwise():
    target, drafter = trained_pair()
    drafter = copy.deepcopy(drafter)
    drafter.generation_config = GenerationConfig(window_size=6)
    ids = torch.arange(1, 9)[None]
    for asked, found in (({}, 0.4), ({"window_schedule": "gammatune"}, 0.0), ({"draft_threshold": 0.2}, 0.2)):
        out = generate_with(target, drafter, ids, config={"max_new_tokens": 9, "do_sample": True, **asked})
        assert out.drafting.draft_threshold == found
        assert out.drafting.window_schedule == ("constant" if "draft_threshold" in asked else "gammatune")
    for options in ({"steady": True}, {"on_cpu": True}):  # a GPU would wait at every step; time is followed instead
        assert DraftOptions.resolve(GenerationConfig(window_size=6)).on_path(False, **options).draft_threshold == 0.0


def test_cost_takes_no_threshold_and_says_so():
    options = DraftOptions(window_size=3, draft_threshold=0.4, window_schedule="cost")
    assert options.on_path(False).draft_threshold == 0.0
    assert DraftOptions(draft_threshold=0.4, window_schedule="gammatune").on_path(False).draft_threshold == 0.4
    target, drafter = trained_pair()
    config = {"window_size": 3, "draft_threshold": 0.4, "window_schedule": "cost", "max_new_tokens": 4}
    out = generate_with(target, drafter, torch.arange(1, 9)[None], config=config)
    with pytest.raises(ValueError, match="draft_threshold=0.4 was asked for"):
        what_was_drafted(out, {"draft_threshold": 0.4})
    assert what_was_drafted(out, {"window_size": 3, "window_schedule": "auto"}).window_schedule == "cost"


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="window_schedule='often': expected one of auto, constant, heuristic"):
        DraftOptions(window_schedule="often")


def test_the_rule_itself_never_leaves_its_bounds():
    for schedule in (Schedule(5), Heuristic(5), GammaTune(5), CostAhead(5, 2, MIDDLE), CostAware(5, MIDDLE)):
        for room in (100, 3, 0):
            assert 0 <= schedule.begin([0], room) <= min(5, room)
