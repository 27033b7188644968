"""Unrolled drafting, forest verification and stage 2's rollout against the plain way of computing the same."""

import pytest
import torch

from ppow.cache_ppow import SlotCache
from ppow.drafting_ppow import DrafterState
from ppow.training import reinforce
from ppow.training import rollout as stage2
from ppow.training.data import Batch
from ppow.training.objectives import Rollouts
from ppow.training.unrolled import Unrolled
from ppow.training.window_choice import text_criticality
from training_helpers import make_batch, make_config, make_pair


@pytest.mark.parametrize("options", [{}, {"num_hidden_layers": 2}, {"norm_output": True}, {"draft_vocab_size": 32}])
def test_unrolled_drafting_equals_drafting_while_decoding(options):
    """The same text, start and tokens: training sees the logits that a running generation would see."""
    target, drafter = make_pair(**options)
    batch = make_batch(rows=1)
    reading = target.read(batch.input_ids)
    unrolled = Unrolled(drafter, drafter.embed_tokens, batch.input_ids, reading.taps)
    for start in (0, 5, 12):
        cache = SlotCache(len(drafter.layers))
        state = DrafterState(drafter, drafter.embed_tokens, cache, torch.zeros(1, dtype=torch.long), None)
        count = start + 1
        positions = torch.arange(count)[None]
        state.extend(reading.taps[:, :count], batch.input_ids[:, 1 : count + 1], positions, torch.tensor([count]))
        window = state.chain(batch.input_ids[:, count], 5)
        hidden = unrolled.begin(torch.tensor([[start]]))
        drafted = []
        for i in range(5):
            if i:
                hidden = unrolled.advance(window.tokens[:, i : i + 1])
            drafted.append(drafter.to_target_ids(drafter.logits(hidden).argmax(-1)))
        torch.testing.assert_close(torch.cat(drafted, 1), window.tokens[:, 1:])
        step = drafter.logits(state.hidden)
        torch.testing.assert_close(step, drafter.logits(unrolled.features[:, start : start + 1]))


def test_a_step_of_training_time_test_equals_the_shifted_rewrite():
    """Window s at step j attends to pairs 0..s and its own steps only: check against one window at a time."""
    target, drafter = make_pair()
    batch = make_batch(rows=2)
    reading = target.read(batch.input_ids)
    together = Unrolled(drafter, drafter.embed_tokens, batch.input_ids, reading.taps)
    pairs, padded = batch.input_ids.shape[1] - 1, torch.nn.functional.pad(batch.input_ids, (0, 4))
    together.begin(torch.arange(pairs).expand(2, -1))
    alone = Unrolled(drafter, drafter.embed_tokens, batch.input_ids, reading.taps)
    for step in range(1, 4):
        rows = pairs - step
        features = together.advance(padded[:, 1 + step : 1 + step + pairs])
        for start in (0, 7, rows - 1):
            alone.begin(torch.full((2, 1), start))
            for i in range(1, step + 1):
                single = alone.advance(batch.input_ids[:, start + 1 + i : start + 2 + i])
            torch.testing.assert_close(features[:, start : start + 1], single)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("max_forest_nodes", [12, 4096])
def test_forest_verification_equals_one_forward_per_window(sliding, max_forest_nodes):
    target, drafter = make_pair(sliding)
    config = make_config(max_forest_nodes=max_forest_nodes)
    batch = make_batch()
    reading = target.read(batch.input_ids, room=64)
    starts = torch.tensor([[0, 14], [2, 9]])
    rows = starts.repeat_interleave(config.group_size, dim=1)
    tokens = torch.randint(1, 32, (*rows.shape, 4), generator=torch.Generator().manual_seed(5))
    columns = drafter.draft_columns()
    argmax, chosen, logits = stage2.target_words(config, target, reading, starts, tokens, columns)
    for text in range(2):
        for row in range(rows.shape[1]):
            start = int(rows[text, row])
            whole = torch.cat((batch.input_ids[text, : start + 2], tokens[text, row]))[None]
            plain = target.model(whole).logits[0, start + 1 : start + 5]
            assert torch.equal(argmax[text, row], plain.argmax(-1))
            torch.testing.assert_close(logits[text, row], plain[:, columns], atol=1e-5, rtol=1e-5)
            expected = plain.log_softmax(-1).gather(1, tokens[text, row][:, None])[:, 0]
            torch.testing.assert_close(chosen[text, row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sliding", [False, True])
def test_argmax_window_equals_greedy_generation(sliding):
    target, _ = make_pair(sliding)
    batch = make_batch()
    reading = target.read(batch.input_ids, room=64)
    starts, size = torch.tensor([[1, 6], [4, 13]]), 10  # longer than the sliding window
    needed = torch.ones_like(starts, dtype=torch.bool)
    found = stage2.argmax_window_logprobs(target, reading, batch, starts, needed, size)
    for text in range(2):
        for window in range(2):
            prefix = batch.input_ids[text : text + 1, : int(starts[text, window]) + 2]
            out = target.model.generate(
                prefix, max_new_tokens=size, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            expected = torch.stack([step[0].log_softmax(-1).max() for step in out.logits])
            torch.testing.assert_close(found[text, window], expected.float(), atol=1e-5, rtol=1e-5)


def test_argmax_window_is_read_off_a_greedy_text():
    """On the target's own greedy text no extra forward is needed, and the value is the same."""
    target, _ = make_pair()
    ids = target.model.generate(torch.tensor([[7, 3, 9]]), max_new_tokens=20, do_sample=False)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([ids.shape[1]]), seed=0)
    reading = target.read(ids, room=64)
    starts = torch.tensor([[3, 8]])
    calls = []
    forward = target.continue_windows
    target.continue_windows = lambda *a: calls.append(1) or forward(*a)
    quick = stage2.argmax_window_logprobs(target, reading, batch, starts, torch.ones_like(starts, dtype=torch.bool), 4)
    assert not calls
    other = Batch(ids.clone(), batch.loss_mask, batch.lengths, seed=0)
    other.input_ids[0, 6] = (ids[0, 6] + 1) % 32  # only the comparison sees the change: the reading is the same
    slow = stage2.argmax_window_logprobs(target, reading, other, starts, torch.ones_like(starts, dtype=torch.bool), 4)
    assert calls
    torch.testing.assert_close(quick, slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("verification", ["greedy", "sampling"])
def test_rollout_is_consistent(verification):
    """Recomputed logits reproduce the old log-probabilities, and acceptance follows from tokens and target."""
    target, drafter = make_pair()
    config = make_config(verification=verification, rollout_temperature=0.7)
    batch = make_batch()
    rollout, metrics = stage2.roll_out(config, target, drafter, batch, step=1)
    logits = stage2.policy_logits(config, target, drafter, rollout)
    again = (logits / 0.7).log_softmax(-1).gather(-1, rollout.draft_ids[..., None])[..., 0]
    torch.testing.assert_close(again.float(), rollout.old_logprobs, atol=1e-5, rtol=1e-4)
    if verification == "greedy":
        for text, window, member in [(0, 0, 0), (1, 1, 2), (0, 1, 1)]:
            start = int(rollout.starts[text, window])
            tokens = drafter.to_target_ids(rollout.draft_ids[text, window, member])
            prefix, accepted = batch.input_ids[text, : start + 2], 0
            for token in tokens:
                if target.model(prefix[None]).logits[0, -1].argmax() != token:
                    break
                prefix, accepted = torch.cat((prefix, token[None])), accepted + 1
            assert accepted == int(rollout.accepted[text, window, member])
    assert torch.allclose(rollout.advantages.sum(2), torch.zeros(2, 2), atol=1e-4)
    assert metrics["acceptance_length"] == pytest.approx(1 + rollout.accepted.float().mean().item())
    assert int(rollout.starts.min()) >= 2  # pair s predicts x_{s+2}, the first answer token being x_4
    reading = target.read(batch.input_ids)
    unrolled = Unrolled(drafter, drafter.embedding_for(target.model), batch.input_ids, reading.taps)
    with torch.no_grad():
        critical, _ = text_criticality(drafter, unrolled, reading, batch, drafter.draft_columns())
    chosen = [critical[text, start] for text in range(2) for start in rollout.starts[text]]
    assert metrics["window_criticality"] == pytest.approx(float(sum(chosen)) / len(chosen), rel=1e-4)


def test_rollout_repeats_with_its_seed_and_changes_with_it():
    target, drafter = make_pair()
    config = make_config()
    first, _ = stage2.roll_out(config, target, drafter, make_batch(), step=1)
    same, _ = stage2.roll_out(config, target, drafter, make_batch(), step=1)
    other = make_batch()
    other.seed = 12
    different, _ = stage2.roll_out(config, target, drafter, other, step=1)
    assert torch.equal(first.draft_ids, same.draft_ids) and torch.equal(first.starts, same.starts)
    assert not torch.equal(first.draft_ids, different.draft_ids)


def test_drafts_follow_the_drafters_distribution():
    """Tokens drawn by inversion have the frequencies of the drafter's softmax (chi-square, fixed seed)."""
    target, drafter = make_pair()
    config = make_config(window_size=1, group_size=2)
    batch = make_batch(rows=1)
    reading = target.read(batch.input_ids)
    unrolled = Unrolled(drafter, drafter.embed_tokens, batch.input_ids, reading.taps)
    rows = torch.full((1, 20000), 6)
    uniforms = torch.rand(1, 20000, 1, generator=torch.Generator().manual_seed(1))
    ids, _ = stage2.draft(config, drafter, unrolled, rows, uniforms)
    probs = drafter.logits(unrolled.features[0, 6]).softmax(-1)
    counts = torch.bincount(ids.flatten(), minlength=20).double()
    expected = probs * 20000
    big = expected > 5
    statistic = ((counts - expected)[big] ** 2 / expected[big]).sum()
    assert statistic < 2 * int(big.sum()) + 20  # mean n - 1, far above the 99.9% quantile only if the draw is wrong


def test_reinforcement_raises_the_reward():
    """On one batch of texts the policy term alone lifts the reward of sampled drafts well above its start."""
    target, drafter = make_pair()
    config = make_config(kl_coef=0.0, proximity_bonus=0.0, window_size=3, group_size=8, windows_per_sequence=4)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    rewards = []
    for step in range(60):
        batch = make_batch()
        batch.seed = step
        rollout, metrics = stage2.roll_out(config, target, drafter, batch, step=1)
        rewards.append(float(metrics["reward"]))
        loss, _ = reinforce.loss(config, target, drafter, batch, rollout)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(rewards[-10:]) > 3 * sum(rewards[:10]), rewards


def test_rollouts_reject_mismatched_shapes():
    from ppow.training.objectives import ppow_loss

    zeros = torch.zeros
    bad = Rollouts(
        zeros(1, 2, 3, dtype=torch.long),
        zeros(1, 2, 3, 5),
        zeros(1, 2, 3),
        zeros(1, 2, 3, 6),
        zeros(1, 2),
        zeros(1, 2, dtype=torch.long),
        torch.ones(1, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match="must both be"):
        ppow_loss(bad, 0.1)
