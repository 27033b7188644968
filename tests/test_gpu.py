"""The decoding loop and the training stages on a CUDA device: run with ``pytest -m gpu``."""

import copy

import pytest
import torch

from decoding_helpers import MODES, generate_with, prompt_batches, trained_pair

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gemma2", "mixtral", "gpt-oss"])
def test_greedy_tokens_are_the_targets_own(family, mode):
    target, drafter = (copy.deepcopy(model).to("cuda") for model in trained_pair(family))
    gained = verifications = 0
    for batch in (1, 4):
        for ids, mask in prompt_batches(batch, 4, seed=batch):
            ids, mask = ids.cuda(), mask.cuda()
            expected = target.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
            out = generate_with(target, drafter, ids, mask, {**MODES[mode], "max_new_tokens": 24})
            torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
            gained += sum(map(sum, out.acceptance.gained))
            verifications += out.acceptance.verifications
    assert gained / verifications > 1.3


@pytest.mark.parametrize("mode", MODES)
def test_sampling_follows_the_seed(mode):
    target, drafter = (copy.deepcopy(model).to("cuda") for model in trained_pair())
    ids = torch.arange(1, 9, device="cuda")[None]
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        config = {**MODES[mode], "max_new_tokens": 40, "do_sample": True}
        outputs.append(generate_with(target, drafter, ids, config=config).sequences.tolist())
    assert outputs[0] == outputs[1] != outputs[2]
