"""Every family of targets: with a drafter, greedy tokens are the target's own, one by one.

Over 200 random prompts per family, as chains and trees, alone and in left-padded batches of 4. Besides the tokens the
logits behind them are compared, which also shows a wrong mask that happens not to change the argmax.
"""

import itertools

import pytest
import torch

from ppow import verifier_ppow

from .decoding_helpers import CHAIN, FAMILIES, MODES, build_target, generate_with, prompt_batches, trained_pair

PROMPTS = 208  # per family
NEW_TOKENS = 12
CASES = [(family, attention) for family, spec in FAMILIES.items() for attention in spec[4]]


@pytest.fixture
def walked(monkeypatch):
    """Records the accepted nodes, root first, of every row and verification."""
    original, seen = verifier_ppow.follow, []

    def follow(window, choices):
        accepted, path, following = original(window, choices)
        seen.extend(nodes[: count + 1] for nodes, count in zip(path.tolist(), accepted.tolist()))
        return accepted, path, following

    monkeypatch.setattr(verifier_ppow, "follow", follow)
    return seen


@pytest.mark.parametrize("family, attention", CASES)
def test_greedy_tokens_and_logits_are_the_targets_own(family, attention, walked):
    target = build_target(family, attention)
    drafter = trained_pair(family)[1]
    share = PROMPTS // len(FAMILIES[family][4])
    seed = CASES.index((family, attention))
    batches = itertools.chain(prompt_batches(1, 8, seed), prompt_batches(4, (share - 8) // 4, seed + 100))
    tolerance = 2e-6 if target.dtype == torch.float64 else 5e-4  # logits are handed out in float32
    gained, verifications, full_windows = dict.fromkeys(MODES, 0), dict.fromkeys(MODES, 0), 0
    prompts = 0
    for ids, mask in batches:
        expected = target.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        prompts += len(ids)
        for mode, options in MODES.items():
            out = generate_with(
                target, drafter, ids, mask, {**options, "max_new_tokens": NEW_TOKENS, "output_logits": True}
            )
            torch.testing.assert_close(out.sequences, expected.sequences, rtol=0, atol=0)
            torch.testing.assert_close(
                torch.stack(out.logits), torch.stack(expected.logits), rtol=tolerance, atol=tolerance
            )
            gained[mode] += sum(map(sum, out.acceptance.gained))
            verifications[mode] += out.acceptance.verifications
            if mode == "chain":
                full_windows += sum(k == CHAIN["window_size"] for row in out.acceptance.accepted for k in row)
    assert prompts == share
    # the test is worth something only where drafts are accepted, whole windows of them, and on branches of the trees
    for mode in MODES:
        assert gained[mode] / verifications[mode] > 1.3, mode
    assert full_windows > 0
    jumps = sum(any(b - a > 1 for a, b in itertools.pairwise(path)) for path in walked)
    assert jumps > 10


def test_enough_prompts_and_families():
    assert sum(PROMPTS // len(FAMILIES[family][4]) for family, _ in CASES) >= 200 * len(FAMILIES)
    assert len(FAMILIES) >= 9
