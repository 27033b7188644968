"""Text windows against plain computations, and hand-computed losses of the controls."""

import dataclasses
import math
import typing

import pytest
import torch

from ppow.training import objectives, reinforce, supervised
from ppow.training.config import ReinforceConfig
from ppow.training.objectives import OBJECTIVES, Rollouts, TextWindows
from ppow.training.text_windows import read_windows
from ppow.training.unrolled import Unrolled
from test_rollout import make_batch, make_config, make_pair

T, F = True, False


def make_windows(**changes):
    """Two windows of two steps; the second window has one step."""
    values = {
        "mask": [[T, T], [T, F]],
        "kl": [[1.0, 2.0], [3.0, 0.0]],
        "overlap": [[0.5, 0.25], [0.8, 0.0]],
        "best": [[0.6, 0.5], [0.2, 0.0]],
        "accept": [[0.9, 0.4], [0.7, 0.0]],
        "text": [[0.6, 0.2], [0.4, 0.0]],
        "tree": [[0.9, 0.8], [0.7, 0.0]],
        "hit": [[T, F], [F, F]],
        "greedy": [[T, T], [T, F]],
        "sampled": [F, T],
    }
    return TextWindows(**{name: torch.tensor(value) for name, value in (values | changes).items()})


def value_of(name, windows, **options):
    config = make_config(window_size=2, group_size=2, **options)
    return float(OBJECTIVES[name].function(windows, config, torch.tensor([0.0, 1.0, 3.0]))[0])


def by_steps(first, second):
    """Step means weighed 1 and 0.8."""
    return (first + 0.8 * second) / 1.8


def test_cst_by_hand():
    assert value_of("cst", make_windows()) == pytest.approx(by_steps((1 + 3) / 2, 2))


def test_lk_by_hand():
    expected = by_steps(-(math.log(0.5) + math.log(0.8)) / 2, -math.log(0.25))
    assert value_of("lk", make_windows()) == pytest.approx(expected)

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
    windows = make_windows(hit=[[F, T], [F, F]])
    assert value_of("vat", windows) == pytest.approx((1 * 1 + 0.8 * 2 + 1 * 3) / 2 / 2)


def test_exact_tree_by_hand():
    value = value_of("ppow_exact", make_windows(), verification="tree", estimator="exact", kl_coef=0.0)
    assert value == pytest.approx(-((0.9 * 1 + 0.72 * 2) + 0.7 * 1) / 2)


def make_rollouts():
    """One window, two rollouts of two tokens from a vocabulary of two."""
    logits = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]]], requires_grad=True)
    ids = torch.tensor([[[0, 1], [1, 1]]])
    return Rollouts(
        draft_ids=ids,
        draft_logits=logits,
        old_logprobs=logits.detach().log_softmax(-1).gather(-1, ids[..., None])[..., 0] - 0.1,
        target_logits=torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]]]),
        advantages=torch.full((1, 2, 2), 2.0),
        accepted=torch.tensor([[1, 0]]),
        window_mask=torch.tensor([True]),
    )


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def softmax(a, b):
    return [math.exp(a) / (math.exp(a) + math.exp(b)), math.exp(b) / (math.exp(a) + math.exp(b))]


def test_draft_opd_by_hand():
    forward = kl(softmax(1, 0), softmax(0, 0))  # accepted
    rejected = kl(softmax(1, 0), softmax(0, 1)), kl(softmax(0, 0), softmax(1, 0)), kl(softmax(0, 2), softmax(1, 1))
    expected = (forward + rejected[0] + rejected[1] + 0.8 * rejected[2]) / 4
    assert objectives.draft_opd_loss(make_rollouts())[0].item() == pytest.approx(expected)


def test_gto_by_hand():
    logprobs = torch.tensor([[[0.5, 0.5], [0.25, 1.0]]]).log()
    assert float(objectives.gto_reward(logprobs)) == pytest.approx(math.log(math.exp(0.75) + math.exp(0.5)))
    # the longest path is that of the first rollout, both of its tokens reachable, each ratio exp(0.1)
    assert objectives.gto_loss(make_rollouts(), 0.2)[0].item() == pytest.approx(-2 * math.exp(0.1), rel=1e-5)
    loss, metrics = objectives.gto_loss(make_rollouts(), 0.05)
    assert float(loss) == pytest.approx(-2 * 1.05) and float(metrics["clipped"]) == 1


def test_every_window_of_a_text_gives_the_loss_of_stage_1():
    """``cst`` over all windows is stage 1's loss less the labels' entropy: the same gradient."""
    target, drafter = make_pair()
    batch = make_batch()
    batch.loss_mask[:] = True  # stage 1 also unrolls from the prompt into the answer
    batch.loss_mask[0, 15:] = False
    config = make_config(objective="cst", all_windows=True)
    loss, _ = reinforce.loss(config, target, drafter, 1, batch)
    found = torch.autograd.grad(loss, drafter.fc.weight)[0]
    other, _ = supervised.loss(target, drafter, batch, 4, 0.8)
    torch.testing.assert_close(found, torch.autograd.grad(other, drafter.fc.weight)[0])
    assert float(other) > float(loss)


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
    config = make_config(estimator="exact", windows_per_sequence=3, rollout_temperature=0.8, tree_branches=2)
    windows, metrics = read_windows(config, target, drafter, batch, 400)
    assert float(metrics["adaptive"]) == 1 and windows.mask.all() and windows.kl.shape == (3, 4)
    # the windows' starts follow from the seed, as for a rollout
    from ppow.training.rollout import roll_out

    rollout, _ = roll_out(make_config(windows_per_sequence=3), target, drafter, batch, 400)
    reading = target.read(batch.input_ids)
    unrolled = Unrolled(drafter, drafter.embed_tokens, batch.input_ids, reading.taps)
    columns = drafter.draft_columns().tolist()
    for w, start in enumerate(rollout.starts[0].tolist()):
        hidden = unrolled.begin(torch.tensor([[start]]))
        for i in range(4):
            if i:
                hidden = unrolled.advance(batch.input_ids[:, start + 1 + i : start + 2 + i])
            logits = drafter.logits(hidden)[0, 0]
            q, sharp = logits.softmax(-1), (logits / 0.8).softmax(-1)
            p = reading.logits[0, start + 1 + i].softmax(-1)
            token, best = int(batch.input_ids[0, start + 2 + i]), int(p.argmax())
            part = p[columns]
            torch.testing.assert_close(windows.overlap[w, i], torch.minimum(part, q).sum())
            part = part / part.sum()
            torch.testing.assert_close(windows.kl[w, i], (part * (part / q).log()).sum())
            assert bool(windows.hit[w, i]) == (columns[int(q.argmax())] == best)
            expected = sharp[columns.index(best)] if best in columns else torch.zeros(()).double()
            torch.testing.assert_close(windows.best[w, i], expected)
            if token in columns:
                torch.testing.assert_close(windows.text[w, i], sharp[columns.index(token)])
                torch.testing.assert_close(windows.accept[w, i], (q[columns.index(token)] / p[token]).clamp(max=1))
            else:
                assert float(windows.text[w, i]) == float(windows.accept[w, i]) == 0


@pytest.mark.parametrize("supervised_loss", ["cst", "lk"])
def test_gradients_flow_through_the_recomputation(supervised_loss, monkeypatch):
    """Finite differences of the closed form, and of the supervised term beside it, on one weight."""
    monkeypatch.setattr(objectives, "_worth_of_acceptance", lambda stands, *_: torch.zeros_like(stands))
    target, drafter = make_pair()
    batch = make_batch()
    options = {"supervised_coef": 0.3, "supervised_loss": supervised_loss, "kl_coef": 0.0}
    config = make_config(estimator="exact", verification="sampling", **options)

    def value():
        return reinforce.loss(config, target, drafter, 1, batch)[0]

    weight = drafter.fc.weight
    found = torch.autograd.grad(value(), weight)[0]
    place = divmod(int(found.abs().argmax()), weight.shape[1])
    with torch.no_grad():
        ends = []
        for change in (1e-5, -2e-5):
            weight[place] += change
            ends.append(value())
    assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float(found[place]), rel=1e-4)


def test_the_configuration_knows_every_objective():
    names = set(typing.get_args(typing.get_type_hints(ReinforceConfig)["objective"]))
    assert names == set(OBJECTIVES) - {"ppow_exact"}


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_every_objective_trains(name):
    options = {"objective": name}
    if name == "ppow_exact":
        options = {"estimator": "exact", "verification": "text"}
    elif name == "draft_opd":
        options["supervised_coef"] = 0.5
    config = make_config(**options)
    target, drafter = make_pair()
    batch = make_batch()
    reference = reinforce.frozen_reference(config, drafter)
    rollout = None
    if objectives.objective_of(config).batch == "rollouts":
        rollout, _ = reinforce.roll_out(config, target, drafter, batch, 1, reference)
    loss, _ = reinforce.loss(config, target, drafter, 1, batch, rollout)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(drafter.fc.weight.grad).all()
    assert drafter.fc.weight.grad.abs().max() > 0  # GTO's too, whose reference is the drafter itself at the start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verification": "tree"}, "with estimator=exact"),
        ({"all_windows": True}, "roll out from every position"),
        ({"supervised_loss": "lk", "supervised_coef": 1.0}, "learns from texts"),
        ({"credit": "token", "estimator": "exact"}, "credit='token'.*got objective=ppow with estimator=exact"),
        ({"credit": "token", "objective": "gto"}, "got objective=gto"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_config(), **options)
