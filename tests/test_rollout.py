"""Unrolled drafting, forest verification and stage 2's rollout against the plain way of computing the same."""

import dataclasses

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from ppow import PPOWConfig, PPOWDrafter
from ppow.cache_ppow import SlotCache
from ppow.drafting_ppow import DrafterState
from ppow.training import reinforce
from ppow.training import rollout as stage2
from ppow.training.config import ReinforceConfig
from ppow.training.loop import Batch
from ppow.training.objectives import Rollouts
from ppow.training.rewards import reachable
from ppow.training.target import FrozenTarget
from ppow.training.unrolled import Unrolled

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def make_pair(sliding: bool = False, **drafter_options):
    torch.manual_seed(0)
    if sliding:
        config = Gemma3TextConfig(
            **SHAPE,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
        model = Gemma3ForCausalLM(config).double()
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).double()
    drafter = PPOWDrafter(PPOWConfig.from_target(model.config, **{"draft_vocab_size": 20, **drafter_options})).double()
    if drafter.pruned:
        chosen = torch.arange(5, 25)  # the draft vocabulary is not a prefix of the target's
        member = torch.zeros(32, dtype=torch.bool)
        member[chosen] = True
        drafter.set_draft_vocabulary(chosen - torch.arange(20), member)
    return FrozenTarget(model, drafter.config.target_taps), drafter.eval()


def make_config(**options) -> ReinforceConfig:
    values = {"window_size": 4, "group_size": 3, "windows_per_sequence": 2, "proximity_margin": 50.0}
    values |= {"estimator": "rollout", "rollout_temperature": 1.0, "kl_coef": 0.1, "supervised_coef": 0.0}
    values |= {"verification": "greedy", "all_windows": False} | options
    return ReinforceConfig(target="-", drafter="-", data="-", output_dir="-", **values)


def make_batch(rows: int = 2, length: int = 20) -> Batch:
    ids = torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :4] = False
    return Batch(ids, mask, torch.full((rows,), length), seed=11)


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
    argmax, chosen, logits = stage2.verify(config, target, reading, starts, tokens, columns)
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
    assert torch.allclose(rollout.advantages.sum(2), torch.zeros(2, 2, 4), atol=1e-4)
    by_token, _ = stage2.roll_out(dataclasses.replace(config, credit="token"), target, drafter, batch, step=1)
    assert torch.equal(by_token.draft_ids, rollout.draft_ids)
    # every rollout reaches its first token, where leaving oneself out of the mean is all that differs
    torch.testing.assert_close(by_token.advantages[..., 0], rollout.advantages[..., 0] * 3 / 2)
    assert not by_token.advantages[~reachable(rollout.accepted, 4)].any()
    assert metrics["acceptance_length"] == pytest.approx(1 + rollout.accepted.float().mean().item())
    assert int(rollout.starts.min()) >= 2  # pair s predicts x_{s+2}, the first answer token being x_4
    reading = target.read(batch.input_ids)
    unrolled = Unrolled(drafter, drafter.embedding_for(target.model), batch.input_ids, reading.taps)
    with torch.no_grad():
        critical, _ = stage2.text_criticality(drafter, unrolled, reading, batch, drafter.draft_columns())
    chosen = [critical[text, start] for text in range(2) for start in rollout.starts[text]]
    assert metrics["window_criticality"] == pytest.approx(float(sum(chosen)) / len(chosen), rel=1e-4)


def test_the_proximity_reward_goes_to_a_share_of_the_rejected_rollouts():
    """The nearest of them, whatever Delta is in nats: a quantile of the batch is the margin."""
    target, drafter = make_pair()
    drafted = {}
    for share in (0.25, 0.5, None):
        options = {"group_size": 8, "windows_per_sequence": 6, "verification": "sampling", "proximity_margin": 7.0}
        config = make_config(proximity_share=share, **options)
        _, drafted[share] = stage2.roll_out(config, target, drafter, make_batch(), step=1)
    rejected = float(drafted[None]["rejected_at_once"]) * 6 * 8 * 2
    assert 40 < rejected < 70  # of 96: the others have a Delta too, which must not count
    for share in (0.25, 0.5):
        paid = float(drafted[share]["proximity_reward"]) / 0.5 * 6 * 8 * 2
        assert abs(paid - share * rejected) <= 1.5, (share, paid, rejected)
    assert drafted[0.25]["proximity_margin"] < drafted[0.5]["proximity_margin"]
    assert "proximity_margin" not in drafted[None]


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
        loss, _ = reinforce.loss(config, target, drafter, 1, batch, rollout)
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
        zeros(1, 2, 3),
        zeros(1, 2, dtype=torch.long),
        torch.ones(1, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match="must both be"):
        ppow_loss(bad, 0.2, 0.1)
