"""Training block drafters: the losses by hand, what a block may see, both stages through the commands."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from decoding_helpers import block_drafter, build_target
from ppow import PPOWConfig, PPOWDrafter
from ppow.cache_ppow import SlotCache
from ppow.training import blocks, recipes, reinforce, supervised, text_windows
from ppow.training.cli import main as ppow
from ppow.training.config import SupervisedConfig, TrainConfig
from ppow.training.data import Batch, Example, rarest_token
from ppow.training.objectives import TextWindows, block_loss, exact_loss
from ppow.training.plan import DEVICES
from ppow.training.recipes import Choices
from ppow.training.target import FrozenTarget
from ppow.training.text_windows import read_windows
from training_helpers import by_steps, make_config, make_windows

VOCAB, K = 4, 3


def ln(x):
    return -math.log(x)


def test_the_losses_by_hand():
    windows = make_windows()  # text tokens at 0.6, 0.2 and 0.4, overlaps of 0.5, 0.25 and 0.8
    loss, metrics = block_loss(windows, "ce", 0.8)
    assert float(loss) == pytest.approx(by_steps((ln(0.6) + ln(0.4)) / 2, ln(0.2)))
    assert metrics["step_losses"].tolist() == pytest.approx([(ln(0.6) + ln(0.4)) / 2, ln(0.2)])

    assert float(block_loss(windows, "kl", 0.8)[0]) == pytest.approx(by_steps((1 + 3) / 2, 2))

    first, second = 0.5 + 0.3, 0.5 + 0.1  # (1 - a) q + a
    weighted = (first + first * second) * ln(0.6) + first * second * ln(0.2) + (0.5 + 0.2) * ln(0.4)
    assert float(block_loss(windows, "d_pace", 0.8)[0]) == pytest.approx(weighted / 2 / 2)

    def dspark(text, overlap):
        return 0.1 * ln(text) + 0.9 * 2 * (1 - overlap)

    pairs = ((0.6, 0.5), (0.4, 0.8), (0.2, 0.25))
    one, two, three = (dspark(*pair) for pair in pairs)
    assert float(block_loss(windows, "dspark", 0.8)[0]) == pytest.approx(by_steps((one + two) / 2, three))
    unsure = TextWindows(**{**vars(windows), "surprise": torch.tensor([[1.0, 2.0], [3.0, 99.0]])})
    assert float(block_loss(unsure, "dspark", 0.8)[0]) == pytest.approx(by_steps((one + two) / 2, three) + 2)
    with pytest.raises(ValueError, match="'l1'"):
        block_loss(windows, "l1", 0.8)


@pytest.mark.parametrize("anchor", [True, False])
def test_a_block_sees_what_lies_before_its_anchor_and_nothing_behind(anchor):
    target = build_target()
    drafter = block_drafter(target, predict_from_anchor=anchor)
    ids = torch.randint(1, 48, (2, 16), generator=torch.Generator().manual_seed(0))
    taps = FrozenTarget(target, drafter.config.target_taps).read(ids).taps
    starts, words = torch.tensor([[2, 9], [5, 5]]), drafter.embedding_for(target)

    def slots(ids, taps):
        unrolled = blocks.Blocks(drafter, words, ids, taps)
        unrolled.begin(starts)
        return unrolled.slots

    expected = slots(ids, taps)
    assert expected.shape == (2, 2, 6 if anchor else 5, 32)
    for place in range(16):
        noise, other = taps.clone(), ids.clone()
        noise[:, place] += 1.0
        other[:, place] = (other[:, place] + 1) % 48
        moved = (slots(ids, noise) - expected).abs().amax((2, 3)) > 1e-9
        assert torch.equal(moved, place <= starts), "taps strictly before the anchor, which is x_{s+1}"
        moved = (slots(other, taps) - expected).abs().amax((2, 3)) > 1e-9
        assert torch.equal(moved, place == starts + 1), "of the tokens themselves the anchor alone"


def test_parts_of_the_blocks_give_what_all_give_at_once(monkeypatch):
    target = build_target()
    drafter = block_drafter(target, markov_rank=3, confidence_head=True)
    frozen = FrozenTarget(target, drafter.config.target_taps)
    ids = torch.randint(1, 48, (2, 24), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, torch.ones_like(ids).bool(), torch.full((2,), 24), seed=5)
    drafter.requires_grad_(True)
    found = []
    for rows in (1024, 12):
        monkeypatch.setattr(blocks, "ROWS", rows)
        loss, metrics = supervised.block_step(frozen, drafter, batch, 0.8, anchors=7)
        found.append((loss, metrics["step_losses"], *torch.autograd.grad(loss, list(drafter.parameters()))))
    for whole, parts in zip(*found):
        torch.testing.assert_close(whole, parts)


def test_the_head_of_a_block_can_be_trained_alone():
    target = build_target()
    drafter = block_drafter(target, markov_rank=3, confidence_head=True).requires_grad_(False)
    drafter.confidence_head.requires_grad_(True)
    frozen = FrozenTarget(target, drafter.config.target_taps)
    ids = torch.randint(1, 48, (2, 24), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, torch.ones_like(ids).bool(), torch.full((2,), 24), seed=5)
    config = make_config(preset="head", window_size=3)
    loss, metrics = reinforce.loss(config, frozen, drafter, batch)
    loss.backward()
    assert float(loss) == float(metrics["confidence_loss"]) > 0
    assert {name.partition(".")[0] for name, p in drafter.named_parameters() if p.grad is not None} == {
        "confidence_head"
    }


def test_a_step_learns_from_as_many_windows_as_were_asked_for_and_draws_anew(monkeypatch):
    target = build_target()
    drafter = block_drafter(target)
    frozen = FrozenTarget(target, drafter.config.target_taps)
    ids = torch.randint(1, 48, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(24).expand(2, -1) >= 10
    drawn, begin = [], blocks.Blocks.begin
    monkeypatch.setattr(blocks.Blocks, "begin", lambda self, starts: drawn.append(starts) or begin(self, starts))
    for seed in (0, 0, 1):
        supervised.block_step(frozen, drafter, Batch(ids, mask, torch.full((2,), 24), seed), 0.8, anchors=5)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    for starts in drawn:
        assert starts.shape == (2, 5) and int(starts.min()) >= 8  # the first token of a window is an answer's
        assert all(len(set(row)) == 5 for row in starts.tolist())


def test_a_compiled_comparison_is_used_where_it_is_asked_for(monkeypatch):
    """Its few logits are kept for the way back; too many are computed again, and the gradient is the same."""
    target = build_target()
    drafter = block_drafter(target)
    frozen = FrozenTarget(target, drafter.config.target_taps)
    ids = torch.randint(1, 48, (2, 24), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, torch.ones_like(ids).bool(), torch.full((2,), 24), seed=5)
    rows, compare = [], text_windows.compare
    stand_in = lambda *given: rows.append(len(given[0])) or compare(*given)  # noqa: E731
    monkeypatch.setattr(text_windows, "compiled", lambda: stand_in)
    found, calls = [], []
    for fused, kept in ((False, 0), (True, 1728), (True, 1727)):  # 2 texts, 3 windows of 6 slots, 48 tokens
        monkeypatch.setattr(text_windows, "KEPT", kept)
        loss = supervised.block_step(frozen, drafter, batch, 0.8, anchors=3, fused=fused)[0]
        found.append((loss.detach(), *torch.autograd.grad(loss, list(drafter.parameters()))))
        calls.append(len(rows))
    assert calls == [0, 6, 6 + 2 * 6] and max(rows) == 6
    for values in zip(*found):
        torch.testing.assert_close(values[0], values[1])
        torch.testing.assert_close(values[0], values[2])


def test_the_whole_road_chooses_what_suits_a_block_drafter(monkeypatch):
    config = build_target().config
    names = {"target": "-", "output_dir": "-", "architecture": "block"}
    choices = Choices(TrainConfig.from_dict(names | {"supervised": {"block_size": 7}}), config, DEVICES["h200"], True)
    found = choices.all()
    assert found["supervised"]["architecture"] == "block" and "draft_vocab_size" not in found["supervised"]
    assert found["reinforce"]["window_size"] == 7 and found["reinforce"]["cost_ratio"] == 0
    monkeypatch.setattr(recipes, "HAS_TRITON", True)
    for cuda in (False, True):
        found = Choices(TrainConfig.from_dict(names), config, DEVICES["h200"], cuda).all()
        assert all(found[stage].get("compile_loss", False) == cuda for stage in ("supervised", "reinforce"))
    eagle = Choices(TrainConfig.from_dict(names | {"architecture": "eagle3"}), config, DEVICES["h200"], True).all()
    assert "compile_loss" not in eagle["supervised"]
    assert eagle["supervised"]["norm_output"] and "window_size" not in eagle["reinforce"]


@pytest.mark.parametrize(("rank", "size"), [(0, VOCAB), (3, VOCAB), (3, VOCAB - 1)])
def test_the_closed_form_is_the_expected_reward_of_real_blocks(rank, size):
    """Over all texts of the target it equals the expectation over all drafts and coins, Markov head or not.

    So does its gradient, in every weight: a draft's chance depends on the Markov head by the drafts before it.
    """
    target = build_target(vocab_size=VOCAB, initializer_range=0.25)
    drafter = block_drafter(target, block_size=K, markov_rank=rank, initializer_range=0.4, draft_vocab_size=size)
    frozen = FrozenTarget(target, drafter.config.target_taps)
    rewards = torch.tensor([0.3, 1.0, 1.5, 4.0], dtype=torch.float64)
    prompt = [1, 3, 2]
    texts = torch.tensor([prompt + list(tail) for tail in itertools.product(range(VOCAB), repeat=K)])
    mask = torch.arange(texts.shape[1]).expand_as(texts) >= 3
    batch = Batch(texts, mask, torch.full((len(texts),), texts.shape[1]), seed=0)
    with torch.no_grad():
        logprobs = target(texts).logits.log_softmax(-1)
    tails = texts[:, 3:]
    p = logprobs[:, 2:-1].exp()  # (texts, K, V), the target after each prefix of the tail
    weights = p.gather(2, tails[:, :, None])[..., 0].prod(1)
    unrolled = blocks.unroll(drafter, target, texts, frozen.read(texts).taps)
    slots, q = unrolled.begin(torch.full((len(texts), 1), 1)), []
    for i in range(K):
        slots = unrolled.advance(tails[:, i - 1 : i]) if i else slots
        chances = unrolled.logits(slots, unrolled.previous)[:, 0].softmax(-1)
        q.append(chances.new_zeros(len(texts), VOCAB).index_copy(1, drafter.draft_columns(), chances))
    q = torch.stack(q, 1)
    drawn = q.gather(2, tails[:, :, None])[..., 0]
    accept = (p.gather(2, tails[:, :, None])[..., 0] / drawn).clamp(max=1)
    before = torch.cat((torch.ones(len(texts), 1), accept.cumprod(1)), 1)
    reward = (before[:, :K] * (1 - accept) * rewards[:K]).sum(1) + before[:, K] * rewards[K]
    expected = (drawn.prod(1) * reward).sum()
    windows, _ = read_windows(frozen, drafter, batch, K, (torch.full((len(texts), 1), 1), mask[:, 3:4]))
    found = 0.0
    for i, weight in enumerate(weights):
        row = slice(i, i + 1)
        one = TextWindows(
            windows.mask[row],
            type(windows.states)(*(values[row] for values in windows.states)),
            windows.greedy[row],
            windows.sampled[row],
        )
        found = found - weight * exact_loss(one, rewards, "sampling", 0.0)[0]
    torch.testing.assert_close(found, expected)
    learned = [weight for weight in drafter.parameters() if weight.requires_grad]
    for one, other in zip(torch.autograd.grad(found, learned), torch.autograd.grad(expected, learned)):
        assert float(other.abs().max()) > 1e-6
        torch.testing.assert_close(one, other)


def test_along_greedy_text_it_multiplies_what_decoding_would_draft():
    """Each factor is read off the state of a running generation: its own cache, and the text's tokens as its drafts."""
    target = build_target()
    drafter = block_drafter(target, markov_rank=3)
    ids = target.generate(torch.tensor([[3, 1, 4, 1, 5]]), max_new_tokens=12, do_sample=False)
    frozen = FrozenTarget(target, drafter.config.target_taps)
    taps, rewards = frozen.read(ids).taps, torch.tensor([0.0, 1.0, 1.7, 2.1, 2.2, 2.5, 2.6])
    batch = Batch(ids, torch.arange(17)[None] >= 5, torch.tensor([17]), seed=0)
    starts = torch.tensor([[4, 8, 12]])  # anchors are 5, 9 and 13: of the last, drafts 4 to 6 lie behind the text
    windows, _ = read_windows(frozen, drafter, batch, 6, (starts, torch.ones_like(starts).bool()))
    state = drafter.state_kind(
        drafter, drafter.embedding_for(target), SlotCache(len(drafter.layers), 4), torch.zeros(1).long(), None
    )
    done, reward = 0, 0.0
    for number, start in enumerate(starts[0].tolist()):
        rows = torch.arange(done, start + 1)[None]
        state.extend(taps[:, rows[0]], rows, rows, torch.tensor([rows.shape[1]]))
        drafted, reached, done = ids[0, start + 2 : start + 8], 1.0, start + 1
        steps = state._chain_steps(ids[:, start + 1], 6)
        logits = next(steps)
        for i, token in enumerate(drafted):
            logits = steps.send(drafted[i - 1 : i]) if i else logits
            chance = logits[0].softmax(-1)[token]
            torch.testing.assert_close(windows.states.best[number, i], chance)
            reached = reached * chance
            reward = reward + reached * (rewards[i + 1] - rewards[i]) / 3
    assert windows.mask.sum(1).tolist() == [6, 6, 3]
    for rule in ("greedy", "text"):
        torch.testing.assert_close(-exact_loss(windows, rewards, rule, 0.0)[0], reward)


def test_the_mask_is_the_last_token_that_no_text_holds():
    texts = [Example([4, 1, 1], [0, 1, 1]), Example([0, 2], [0, 1])]
    assert rarest_token(texts, 6) == 5 and rarest_token(texts, 5) == 3
    assert rarest_token([*texts, Example([3, 4], [0, 1])], 5) == 3


def test_options_of_the_other_architecture_are_refused():
    names = dict.fromkeys(("target", "data", "output_dir"), "-")
    for wrong in ({"markov_rank": 8}, {"architecture": "block", "norm_output": True}):
        with pytest.raises(ValueError, match="architecture"):
            SupervisedConfig.from_dict(names | wrong)
    with pytest.raises(ValueError, match="block_size, architecture|architecture, block_size"):
        SupervisedConfig.from_dict(names | {"drafter": "-", "architecture": "block", "block_size": 4})
    train = dict.fromkeys(("target", "output_dir"), "-") | {"supervised": {"block_size": 4}}
    TrainConfig.from_dict(train | {"architecture": "block"})
    with pytest.raises(ValueError, match="block_size"):
        TrainConfig.from_dict(train)


def test_both_stages_and_the_figures_through_the_commands(tmp_path, save_target, capsys):
    save_target(tmp_path / "target")
    with open(tmp_path / "chats.jsonl", "w") as out:
        for i in range(6):
            answer = f"{i} and {i + 1} make {2 * i + 1}. A target verifies what the drafter has drafted, dog {i}."
            messages = [{"role": "user", "content": f"Add {i}."}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")

    def run(command, out, *more):
        flags = [f"--{name.replace('_', '-')}={tmp_path / name}" for name in ("target",)]
        flags += [] if command == "evaluate" else [f"--data={tmp_path / 'chats.jsonl'}", "--batch-size=2"]
        ppow([command, *flags, f"--output-dir={tmp_path / out}", *more])

    shape = ["--architecture=block", "--block-size=4", "--num-layers=1", "--markov-rank=4", "--confidence-head"]
    shape += ["--draft-vocab-size=60"]
    run("supervised", "stage1", *shape, "--steps=4", "--anchors=6", "--save-every=2", "--optimizer=muon")
    run("supervised", "again", *shape, "--steps=4", "--anchors=6", "--save-every=9", "--optimizer=muon")
    assert "--window-size 4 --cost-ratio 0 --output-dir" in capsys.readouterr().out
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("stage1", "again"))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    config = PPOWConfig.from_pretrained(tmp_path / "stage1")
    assert config.is_block and config.longest_window == 4 and config.mask_token_id is not None
    drafter = PPOWDrafter.from_pretrained(tmp_path / "stage1")
    assert float(drafter.markov_out.weight.abs().max()) > 0 and drafter.markov_out.out_features == 60
    assert drafter.t2d.sum() == 60 and drafter.d2t.max() > 0
    begun = [f"--drafter={tmp_path / 'stage1'}", "--window-size=4"]
    run("reinforce", "stage2", *begun, "--steps=2", "--anchors=6")
    assert ppow(["reinforce", f"--target={tmp_path / 'target'}", f"--data={tmp_path / 'chats.jsonl'}", begun[0]]
                + [f"--output-dir={tmp_path / 'long'}", "--window-size=5"])  # fmt: skip
    assert "drafts 4 tokens at once: choose --window-size 4" in capsys.readouterr().err
    run("reinforce", "rolled", *begun, "--steps=1", "--preset=published", "--group-size=2")
    for name, same in (("stage2", False), ("rolled", True)):  # along rollouts the head does not learn
        second = load_file(tmp_path / name / "model.safetensors")
        assert not torch.equal(second["layers.0.mlp.up_proj.weight"], first["layers.0.mlp.up_proj.weight"])
        assert torch.equal(second["confidence_head.weight"], first["confidence_head.weight"]) == same
    prompts = [f"--prompts={tmp_path / 'chats.jsonl'}", "--limit=1", "--max-new-tokens=8", "--temperatures=0"]
    run("evaluate", "figures", f"--drafter={tmp_path / 'stage2'}", *prompts)
    result = json.loads((tmp_path / "figures" / "metrics.json").read_text())["results"]["chats T=0"]
    assert result["faults"] == 0 and result["acceptance_length"] >= 1
