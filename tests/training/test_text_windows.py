"""Text windows against plain computations, and hand-computed losses along them."""

import math

import pytest
import torch

from ppow.training import objectives, reinforce, supervised
from ppow.training.config import PRESETS
from ppow.training.text_windows import read_windows
from ppow.training.unrolled import Unrolled
from training_helpers import by_steps, make_batch, make_config, make_pair, make_windows, value_of


def test_cst_by_hand():
    assert value_of("cst", make_windows()) == pytest.approx(by_steps((1 + 3) / 2, 2))


def test_lk_by_hand():
    expected = by_steps(-(math.log(0.5) + math.log(0.8)) / 2, -math.log(0.25))
    assert value_of("lk", make_windows()) == pytest.approx(expected)


def test_every_window_of_a_text_gives_the_loss_of_stage_1():
    """``cst`` over all windows is stage 1's loss less the labels' entropy: the same gradient."""
    target, drafter = make_pair()
    batch = make_batch()
    batch.loss_mask[:] = True  # stage 1 also unrolls from the prompt into the answer
    batch.loss_mask[0, 15:] = False
    config = make_config(preset="cst")
    loss, _ = reinforce.loss(config, target, drafter, batch)
    found = torch.autograd.grad(loss, drafter.fc.weight)[0]
    other, _ = supervised.loss(target, drafter, batch, 4, 0.8)
    torch.testing.assert_close(found, torch.autograd.grad(other, drafter.fc.weight)[0])
    assert float(other) > float(loss)


@pytest.mark.parametrize("preset", [None, "ppow"])
def test_either_stage_may_draw_some_windows_of_a_text(preset, monkeypatch):
    """As many as there are: the loss of all of them. Fewer: that many of each text, others for another seed."""
    target, drafter = make_pair()
    batch = make_batch()
    config = {"preset": preset} if preset else None

    def loss(anchors):
        if config is None:
            return supervised.loss(target, drafter, batch, 4, 0.8, anchors)[0]
        return reinforce.loss(make_config(**config, anchors=anchors), target, drafter, batch)[0]

    drawn, begin = [], Unrolled.begin
    monkeypatch.setattr(Unrolled, "begin", lambda self, starts: drawn.append(starts) or begin(self, starts))
    torch.testing.assert_close(loss(1000), loss(None))
    wanted = [set(row.tolist()) for row in drawn[-1]]
    losses = {float(loss(2).detach())}
    assert drawn[-1].shape == (2, 2) and all(set(r.tolist()) <= every for r, every in zip(drawn[-1], wanted))
    batch.seed += 1
    assert float(loss(2).detach()) not in losses


def test_stage_1_drafts_the_windows_that_meet_an_answer_and_no_others(monkeypatch):
    target, drafter = make_pair()
    batch, steps = make_batch(), 4
    batch.loss_mask[:] = False
    batch.loss_mask[0, 9:12] = batch.loss_mask[0, 17:] = batch.loss_mask[1, 15:] = True
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(40):  # so that some first choices are the target's
        optimizer.zero_grad()
        supervised.loss(target, drafter, batch, steps, 0.8)[0].backward()
        optimizer.step()
    reading, pairs, losses, agree, ends = target.read(batch.input_ids), 19, [], [], torch.zeros(2, 19).bool()
    unbroken, lengths = {(t, s): True for t in range(2) for s in range(pairs)}, 1.0
    unrolled = Unrolled(drafter, drafter.embed_tokens, batch.input_ids, reading.taps)
    features = unrolled.begin(torch.arange(pairs).expand(2, -1))  # here from every pair
    for i in range(steps):
        if i:
            features = unrolled.advance(torch.nn.functional.pad(batch.input_ids, (0, steps))[:, 1 + i : 1 + i + pairs])
        logits, wanted = drafter.logits(features), reading.logits[:, :, drafter.draft_columns()].softmax(-1)
        entropies, hits = [], []
        for text in range(2):
            for s in range(pairs):
                if s + 2 + i < 20 and batch.loss_mask[text, s + 2 + i]:
                    entropies.append(-(wanted[text, s + 1 + i] * logits[text, s].log_softmax(-1)).sum())
                    first = drafter.to_target_ids(logits[text, s].argmax())
                    hits.append(bool(first == reading.logits[text, s + 1 + i].argmax()))
                    ends[text, s] = True
                    unbroken[text, s] &= hits[-1]
                else:
                    unbroken[text, s] = False
        reaching = [(t, s) for t, s in unbroken if s + 2 + i < 20 and batch.loss_mask[t, s + 2]]
        lengths += sum(unbroken.values()) / len(reaching)
        losses.append(torch.stack(entropies).mean())
        agree.append(sum(hits) / len(hits))
    drafted = []
    begin = Unrolled.begin
    monkeypatch.setattr(Unrolled, "begin", lambda self, starts: drafted.append(starts.shape) or begin(self, starts))
    loss, metrics = supervised.loss(target, drafter, batch, steps, 0.8)
    torch.testing.assert_close(metrics["step_losses"], torch.stack(losses).detach())
    assert metrics["agreement"].tolist() == pytest.approx(agree) and agree[-1] > 0
    assert float(metrics["acceptance_length"]) == pytest.approx(lengths) and lengths > 1.3
    weights = torch.tensor([0.8**i for i in range(steps)])
    torch.testing.assert_close(loss, (weights * torch.stack(losses)).sum() / weights.sum())
    assert drafted == [(2, int(ends.sum(1).max()))] and drafted[0][1] < pairs


def test_figures_along_the_text_equal_the_plain_ones():
    target, drafter = make_pair()
    batch = make_batch(rows=1)
    starts = torch.tensor([[3, 9, 14]])
    windows, _ = read_windows(target, drafter, batch, 4, (starts, torch.ones_like(starts, dtype=torch.bool)))
    states = windows.states
    assert windows.mask.all() and states.kl.shape == (3, 4)
    reading = target.read(batch.input_ids)
    unrolled = Unrolled(drafter, drafter.embed_tokens, batch.input_ids, reading.taps)
    columns = drafter.draft_columns().tolist()
    for w, start in enumerate(starts[0].tolist()):
        hidden = unrolled.begin(torch.tensor([[start]]))
        for i in range(4):
            if i:
                hidden = unrolled.advance(batch.input_ids[:, start + 1 + i : start + 2 + i])
            logits = drafter.logits(hidden)[0, 0]
            q = logits.softmax(-1)
            p = reading.logits[0, start + 1 + i].softmax(-1)
            token, best = int(batch.input_ids[0, start + 2 + i]), int(p.argmax())
            part = p[columns]
            torch.testing.assert_close(states.overlap[w, i], torch.minimum(part, q).sum())
            part = part / part.sum()
            torch.testing.assert_close(states.kl[w, i], (part * (part / q).log()).sum())
            assert bool(states.hit[w, i]) == (columns[int(q.argmax())] == best)
            expected = q[columns.index(best)] if best in columns else torch.zeros(()).double()
            torch.testing.assert_close(states.best[w, i], expected)
            if token in columns:
                torch.testing.assert_close(states.text[w, i], q[columns.index(token)])
                torch.testing.assert_close(states.accept[w, i], (q[columns.index(token)] / p[token]).clamp(max=1))
            else:
                assert float(states.text[w, i]) == float(states.accept[w, i]) == 0


def test_gradients_flow_through_the_recomputation(monkeypatch):
    """Finite differences of the closed form, and of the supervised term beside it, on one weight."""
    monkeypatch.setattr(objectives, "_worth_of_acceptance", lambda stands, *_: torch.zeros_like(stands))
    target, drafter = make_pair()
    batch = make_batch()
    config = make_config(preset="ppow", verification="sampling", supervised_coef=0.3)

    def value():
        return reinforce.loss(config, target, drafter, batch)[0]

    weight = drafter.fc.weight
    found = torch.autograd.grad(value(), weight)[0]
    place = divmod(int(found.abs().argmax()), weight.shape[1])
    with torch.no_grad():
        ends = []
        for change in (1e-5, -2e-5):
            weight[place] += change
            ends.append(value())
    assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float(found[place]), rel=1e-4)


def test_a_supervised_loss_stands_beside_rollouts():
    target, drafter = make_pair()
    batch, values = make_batch(), {}
    for weight in (0.0, 0.5):
        config = make_config(supervised_coef=weight)
        rollout, _ = reinforce.roll_out(config, target, drafter, batch, 1)
        loss, _ = reinforce.loss(config, target, drafter, batch, rollout)
        values[weight] = torch.autograd.grad(loss, drafter.fc.weight)[0]
    taught = supervised.loss(target, drafter, batch, config.window_size, 0.8)[0]
    expected = values[0.0] + 0.5 * torch.autograd.grad(taught, drafter.fc.weight)[0]
    torch.testing.assert_close(values[0.5], expected)


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"head"}))  # which leaves the drafter as it is
def test_every_preset_trains(preset):
    config = make_config(preset=preset)
    target, drafter = make_pair()
    batch = make_batch()
    rollout = None
    if objectives.objective_of(config).batch == "rollouts":
        rollout, _ = reinforce.roll_out(config, target, drafter, batch, 1)
    loss, _ = reinforce.loss(config, target, drafter, batch, rollout)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(drafter.fc.weight.grad).all()
    assert drafter.fc.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verification": "text"}, "--preset published sets all"),
        ({"preset": "cst", "supervised_coef": 1.0}, "objective=cst is one already"),
        ({"preset": "fast"}, "preset must be one of ppow, published, cst, lk, head, got 'fast'"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)
