"""Every family of targets: with a drafter, greedy tokens are the target's own, one by one.

As chains and trees, alone and in left-padded batches of 4, under every attention implementation: on a few random
prompts always, on over 200 per family with ``-m slow``. Besides the tokens the logits behind them are compared, which
also shows a wrong mask that happens not to change the argmax.
"""

import itertools

import pytest
import torch

from decoding_helpers import CHAIN, FAMILIES, MODES, build_target, generate_with, prompt_batches, trained_pair
from ppow import verifier_ppow

NEW_TOKENS = 12
CASES = [(family, attention) for family, spec in FAMILIES.items() for attention in spec[4]]
# prompts on their own and batches of 4, per family and size; the attention implementations share them
SIZES = {"few": (10, 10), "many": (40, 42)}


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


@pytest.mark.parametrize("size", ["few", pytest.param("many", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family, attention", CASES)
def test_greedy_tokens_and_logits_are_the_targets_own(family, attention, size, walked):
    target = build_target(family, attention)
    drafter = trained_pair(family)[1]
    single, batched = (count // len(FAMILIES[family][4]) for count in SIZES[size])
    seed = CASES.index((family, attention))
    batches = itertools.chain(prompt_batches(1, single, seed), prompt_batches(4, batched, seed + 100))
    tolerance = 2e-6 if target.dtype == torch.float64 else 5e-4  # logits are handed out in float32
    gained, verifications, full_windows = dict.fromkeys(MODES, 0), dict.fromkeys(MODES, 0), 0
    for ids, mask in batches:
        expected = target.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
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
    # the test is worth something only where drafts are accepted, whole windows of them, and on branches of the trees
    for mode in MODES:
        assert gained[mode] / verifications[mode] > 1.3, mode
    assert full_windows > 0
    jumps = sum(any(b - a > 1 for a, b in itertools.pairwise(path)) for path in walked)
    assert jumps > 0


def test_enough_prompts_and_families():
    single, batched = SIZES["many"]
    assert single + 4 * batched >= 200 and len(FAMILIES) >= 9
