"""The decoding loop and the training stages on a CUDA device: run with ``pytest -m gpu``."""

import copy

import pytest
import torch

from decoding_helpers import MODES, generate_with, prompt_batches, random_drafter, trained_pair
from ppow.probe_ppow import check_target
from test_fast_path import SHAPES, attention_cases
from tiny_targets import build

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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "qwen3", "gemma3", "phi3", "gpt-neox"])
def test_the_fast_path_makes_the_same_tokens(family, mode):
    target, drafter = (copy.deepcopy(model).to("cuda", torch.float32) for model in trained_pair(family))
    for batch in (1, 4):
        for ids, mask in prompt_batches(batch, 4, seed=batch):
            ids, mask = ids.cuda(), mask.cuda()
            expected = target.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
            config = {**MODES[mode], "max_new_tokens": 24, "cuda_graphs": True}
            config["compile_layers"] = batch == 4 and family == "qwen2-sliding"
            out = generate_with(target, drafter, ids, mask, config)
            torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    assert out.acceptance.acceptance_length > 1.3


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("kind", ["stablelm", "deepseek_v3", "granite", "gpt2", "olmoe", "glm"])
def test_targets_that_nobody_walked_are_right_on_a_gpu(kind, mode):
    target = build(kind).cuda()
    drafter = random_drafter(target).cuda()
    for ids, mask in prompt_batches(2, 2, seed=0):
        ids, mask = ids.cuda(), mask.cuda()
        expected = target.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
        out = generate_with(target, drafter, ids, mask, {**mode, "max_new_tokens": 24})
        torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_local_windows_by_slot_are_refused_on_a_gpu(dtype):
    with pytest.raises(ValueError, match="GPTNeoForCausalLM is not served"):
        check_target(build("gpt_neo").to("cuda", dtype))


@pytest.mark.parametrize("mode", MODES)
def test_the_fast_path_samples_from_the_targets_distribution(mode):
    target, drafter = (copy.deepcopy(model).to("cuda", torch.float32) for model in trained_pair())
    rows, length = 512, 2
    ids = torch.arange(1, 9, device="cuda")[None].expand(rows, -1)
    counts = torch.zeros(2, target.config.vocab_size**length, device="cuda")
    for round_ in range(24):
        for which, assistant in enumerate((None, drafter)):
            torch.manual_seed(round_ + 1000 * which)
            config = {"max_new_tokens": length + 1, "do_sample": True, "temperature": 0.8, "cuda_graphs": True}
            out = generate_with(target, assistant, ids, config={**config, **MODES[mode]}).sequences[:, 8:]
            pair = out[:, 1] * target.config.vocab_size + out[:, 2]  # behind the prompt's own token
            counts[which].index_add_(0, pair, torch.ones(rows, device="cuda"))
    seen = counts.sum(0) >= 20
    expected = counts.sum(0)[seen] / 2
    statistic = ((counts[:, seen] - expected) ** 2 / expected).sum()
    freedom = int(seen.sum()) - 1
    assert freedom > 20
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations of chi-square


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (8, 32, 8, 11, 128, 1500, [1200] * 8), (1, 32, 8, 61, 128, 9000, [8500])])
def test_the_attention_kernel(shape, dtype):
    out, expected = attention_cases(shape, "cuda", dtype)
    torch.testing.assert_close(out, expected, **({"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}))


def test_what_does_not_fit_into_memory_takes_the_plain_path_or_is_refused():
    target, drafter = (copy.deepcopy(model).to("cuda", torch.float32) for model in trained_pair())
    ids = torch.arange(1, 9, device="cuda")[None]
    config = {"max_new_tokens": 10**9, "window_size": 4, "max_time": 0.2}
    assert generate_with(target, drafter, ids, config=config).sequences.shape[1] > 8
    with pytest.raises(ValueError, match="GiB are free"):
        generate_with(target, drafter, ids, config={**config, "cuda_graphs": True})
