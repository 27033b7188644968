"""What tells a near tie from a fault: precise scores, the rounding of a dtype, and the loop without drafts."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from decoding_helpers import CHAIN, MODES, PAD, build_target, generate_with, prompt_batches, trained_pair
from ppow import graphs_ppow
from ppow.drafting_ppow import DraftOptions, DraftWindow, call_config
from ppow.lossless_ppow import explain, first_difference, in_dtype, without_drafts
from ppow.target_ppow import TargetState
from ppow.verifier_ppow import Verifier

PROMPT = torch.tensor([[5, 9, 7, 3]])


def tied_target(dtype: torch.dtype, apart: float):
    """A target, and its greedy token behind PROMPT and a twin of it whose score is lower by some share."""
    target = build_target().float()
    best = int(target(PROMPT).logits[0, -1].argmax())
    twin = (best + 1) % target.config.vocab_size
    with torch.no_grad():
        target.lm_head.weight[twin] = target.lm_head.weight[best] * (1 - apart)
    return target.to(dtype), best, twin


@pytest.mark.parametrize(
    ("dtype", "apart", "verdict"),
    [
        (torch.bfloat16, 0.0, "near tie"),
        (torch.bfloat16, 1 / 256, "near tie"),  # half of what bfloat16 tells apart
        (torch.bfloat16, 0.3, "fault"),
        (torch.float32, 1e-7, "near tie"),
        (torch.float32, 1 / 256, "fault"),
        (torch.float64, 1e-9, "near tie"),  # generate() compares scores in float32
        (torch.float64, 1 / 256, "fault"),
    ],
)
def test_the_same_gap_is_a_near_tie_or_a_fault_by_the_dtype(dtype, apart, verdict):
    target, best, twin = tied_target(dtype, apart)
    found = first_difference(target, PROMPT, [twin, 3, 4], [best, 1])
    assert (found.position, found.token, found.expected) == (0, twin, best)
    assert found.verdict == verdict and (found.gap <= found.rounding) == (verdict == "near tie")
    assert f"{verdict} at token 1: the scores of {twin} and {best}" in str(found)
    assert first_difference(target, PROMPT, [twin], [best], exact=True).verdict == "fault"


def test_the_rounding_is_no_more_than_the_dtype_explains():
    """eps of the scores, and six deviations of what was measured: here a few times eps of them in all."""
    target, best, twin = tied_target(torch.bfloat16, 0.0)
    largest = float(target.float()(PROMPT).logits[0, -1].detach().abs().max())
    found = first_difference(target.to(torch.bfloat16), PROMPT, [twin], [best])
    eps = torch.finfo(torch.bfloat16).eps
    assert 0 < found.rounding < 12 * eps * largest


def test_the_gap_is_that_of_the_precise_scores():
    target, best, twin = tied_target(torch.bfloat16, 0.3)
    precise = copy.deepcopy(target).float()(torch.cat((PROMPT, torch.tensor([[11, 12]])), 1)).logits[0, -1]
    first, second = precise.topk(2).indices.tolist()
    found = first_difference(target, PROMPT, [11, 12, second], [11, 12, first])
    assert found.position == 2 and found.gap == pytest.approx(float(precise[first] - precise[second]), rel=1e-5)


def test_processors_count_with_the_lengths_of_the_answer():
    target, best, twin = tied_target(torch.float32, 0.0)
    assert first_difference(target, PROMPT, [twin], [best]).verdict == "near tie"
    config = call_config(target.generation_config, repetition_penalty=2.0, max_new_tokens=9)
    ids = torch.cat((PROMPT, torch.tensor([[best]])), 1)
    scores = target.double()(ids).logits[0, -1]
    penalized = torch.where(
        torch.isin(torch.arange(len(scores)), ids), torch.where(scores > 0, scores / 2, scores * 2), scores
    )
    found = first_difference(target.float(), PROMPT, [best, best], [best, twin], config)
    assert found.gap == pytest.approx(abs(float(penalized[best] - penalized[twin])), rel=1e-4)
    # an end that is not allowed before the third new token, though the prefix is read as a prompt
    config = call_config(target.generation_config, min_new_tokens=3, max_new_tokens=9, eos_token_id=best)
    assert first_difference(target, PROMPT, [1, best], [1, 2], config).gap is None


def test_an_answer_that_ends_where_the_other_goes_on_is_a_fault():
    target = build_target()
    for one, other in (([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 2])):
        found = first_difference(target, PROMPT, one, other)
        assert found.verdict == "fault" and found.position == 2 and None in (found.token, found.expected)
    assert first_difference(target, PROMPT, [1, 2], [1, 2]) is None


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt-neox"])
def test_precise_scores_leave_the_target_as_it_was(family):
    target = build_target(family).to(torch.bfloat16)
    expected = copy.deepcopy(target).float()(PROMPT).logits
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in target.state_dict(keep_vars=True).items()}
    with in_dtype(target, torch.float32):
        found = target(PROMPT).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError), in_dtype(target, torch.float32):
        target(PROMPT, inputs_embeds=torch.zeros(1, 4, 7, dtype=torch.float32)[:, :, :3] @ torch.zeros(7, 7))
    after = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in target.state_dict(keep_vars=True).items()}
    assert after == before and target(PROMPT).logits.dtype == torch.bfloat16


# -- the loop without drafts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["plain", "fast"])
@pytest.mark.parametrize("mode", MODES)
def test_without_drafts_every_token_comes_from_a_root(mode, path, monkeypatch, anywhere):
    """The target's tokens, from windows of the very shapes that drafts have, of which nothing is kept."""
    target, drafter = trained_pair()
    kind, shapes = (TargetState if path == "plain" else graphs_ppow.GraphTarget), []
    verify = kind.verify
    monkeypatch.setattr(kind, "verify", lambda self, w: shapes.append(w.tokens.shape) or verify(self, w))
    for batch in (1, 3):
        for ids, mask in prompt_batches(batch, 1, seed=batch):
            expected = target.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
            config = {**MODES[mode], "max_new_tokens": 12, "cuda_graphs": path == "fast"}
            drafted = generate_with(target, drafter, ids, mask, config)
            with_drafts = set(shapes)
            shapes.clear()
            out = generate_with(target, drafter, ids, mask, {**config, "accept_drafts": False})
            assert set(shapes) >= with_drafts - {shape for shape in with_drafts if shape[1] == 1}
            shapes.clear()
            torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
            assert {n for row in out.acceptance.accepted for n in row} == {0}
            assert {n for row in out.acceptance.gained for n in row} <= {0, 1}
            assert max(out.acceptance.drafted[0]) == max(drafted.acceptance.drafted[0])
            assert out.drafting.accept_drafts is False and out.drafting.cuda_graphs is (path == "fast")
            assert drafted.drafting.accept_drafts


def test_without_drafts_processors_and_samples_are_as_with_them():
    target, drafter = trained_pair()
    config = {**CHAIN, "max_new_tokens": 12, "repetition_penalty": 1.5, "accept_drafts": False}
    expected = target.generate(PROMPT, do_sample=False, max_new_tokens=12, repetition_penalty=1.5, pad_token_id=PAD)
    assert torch.equal(generate_with(target, drafter, PROMPT, config=config).sequences, expected)
    config = {**CHAIN, "max_new_tokens": 12, "do_sample": True, "accept_drafts": False}
    out = generate_with(target, drafter, PROMPT, config=config)
    assert out.sequences.shape == (1, 16) and sum(out.acceptance.accepted[0]) == 0


def test_a_blank_window_has_the_shape_of_a_tree():
    window = DraftWindow.blank(torch.tensor([4, 6]), nodes=3, depth=2)
    assert window.tokens.tolist() == [[4] * 4, [6] * 4] and window.max_depth == 2
    assert window.parents.tolist() == [[0] * 4] * 2 and window.depth.tolist() == [[0, 1, 1, 1]] * 2
    assert window.ancestors[1].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]


@pytest.mark.parametrize("value", ["no", 0, None])
def test_accept_drafts_is_a_switch(value):
    with pytest.raises(ValueError, match="accept_drafts="):
        DraftOptions(accept_drafts=value)


# -- planted faults ----------------------------------------------------------------------------------------------------


class RunnerUp(Verifier):
    """Emits the second best token behind every window of which three drafts or more were accepted."""

    def __call__(self, window, logits):
        verdict = super().__call__(window, logits)
        if self.accept_drafts and int(verdict.accepted[0]) >= 3:
            last = int(verdict.path[0, int(verdict.accepted[0])])
            verdict.tokens[0, int(verdict.accepted[0])] = logits[0, last].topk(2).indices[1]
        return verdict


class OneMore(Verifier):
    """Accepts one draft more than the target agrees with."""

    def __call__(self, window, logits):
        verdict = super().__call__(window, logits)
        count = int(verdict.accepted[0])
        if self.accept_drafts and count + 1 < verdict.path.shape[1] and window.max_depth > 1:
            verdict.path[0, count + 1] = count + 1
            verdict.tokens[0, count] = window.tokens[0, count + 1]
            verdict.tokens[0, count + 1] = logits[0, count + 1].argmax()
            verdict.accepted = verdict.accepted + 1
        return verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fault", [RunnerUp, OneMore])
def test_a_loop_that_emits_other_tokens_is_called_a_fault(fault, dtype, monkeypatch):
    from ppow import generation_ppow

    target, drafter = (copy.deepcopy(model).to(dtype) for model in trained_pair())
    config = GenerationConfig(**CHAIN, max_new_tokens=40, do_sample=False, pad_token_id=PAD)
    stock = target.generate(PROMPT, generation_config=config)[0, 4:].tolist()
    found = []
    monkeypatch.setattr(generation_ppow, "Verifier", fault)
    out = generate_with(target, drafter, PROMPT, config={**CHAIN, "max_new_tokens": 40})
    found = explain(target, drafter, PROMPT, out.sequences[0, 4:].tolist(), stock, config)
    assert found and {difference.verdict for difference in found} == {"fault"}


@pytest.mark.parametrize("mode", MODES)
def test_in_bfloat16_whatever_differs_is_a_near_tie(mode):
    target, drafter = (copy.deepcopy(model).to(torch.bfloat16) for model in trained_pair())
    for ids, _ in prompt_batches(1, 3, seed=3):
        config = GenerationConfig(**MODES[mode], max_new_tokens=24, do_sample=False, pad_token_id=PAD)
        stock = target.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist()
        out = generate_with(target, drafter, ids, config={**MODES[mode], "max_new_tokens": 24})
        answer = out.sequences[0, ids.shape[1] :].tolist()
        reference, ran = without_drafts(target, drafter, ids, config)
        assert ran.cuda_graphs is False
        for other in (stock, reference):
            difference = first_difference(target, ids, answer, other, config)
            assert difference is None or difference.verdict == "near tie", difference
