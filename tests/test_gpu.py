"""The decoding loop and the training stages on a CUDA device: run with ``pytest -m gpu``."""

import copy

import pytest
import torch

from decoding_helpers import (
    MODES,
    PAD,
    build_target,
    generate_with,
    prompt_batches,
    random_drafter,
    train,
    trained_pair,
)
from ppow import generation_ppow
from ppow.drafting_ppow import DraftWindow, call_config
from ppow.lossless_ppow import first_difference, without_drafts
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


@pytest.fixture(scope="module")
def low_precision_pair():
    """A wider pair in bfloat16, so that rounding shows, which drafts well."""
    target = build_target(hidden_size=256, intermediate_size=512, num_hidden_layers=8, vocab_size=512)
    drafter = train(random_drafter(target), target)
    return tuple(model.to("cuda", torch.bfloat16) for model in (target, drafter))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_in_bfloat16_what_differs_is_a_near_tie_and_the_reference_agrees_token_for_token(
    mode, compiled, low_precision_pair
):
    target, drafter = low_precision_pair
    options = {**MODES[mode], "cuda_graphs": True, "compile_layers": compiled}
    config = call_config(target.generation_config, do_sample=False, max_new_tokens=400, pad_token_id=PAD, **options)
    lengths = []
    for ids, _ in prompt_batches(1, 8, seed=5, vocab_size=512):
        ids = ids.cuda()
        stock = target.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist()
        out = generate_with(target, drafter, ids, config={**options, "max_new_tokens": 400})
        answer = out.sequences[0, ids.shape[1] :].tolist()
        reference, ran = without_drafts(target, drafter, ids, config)
        assert ran.cuda_graphs and reference == answer
        difference = first_difference(target, ids, answer, stock, config)
        assert difference is None or difference.verdict == "near tie", difference
        lengths.append(out.acceptance.acceptance_length)
    assert max(lengths) > 1.5


class Told:
    """Drafts what is known to follow: windows of ten tokens, every one of which is right."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.place = torch.tensor(tokens + [1] * 24, device="cuda"), 0

    def __call__(self, state, root, *_) -> DraftWindow:
        window = DraftWindow.chain(self.tokens[self.place : self.place + 11][None].clone())
        assert int(window.tokens[0, 0]) == int(root)
        self.place += 11
        return window


def test_at_the_shape_of_a_large_target_the_reference_agrees_wherever_a_token_stands(monkeypatch):
    """Layers of Llama-3.1-8B's shape, texts beyond the kernel's first round of keys, and drafts that are the
    reference's own tokens, so that every row of a window is accepted."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    target = build_target(**shape, num_hidden_layers=4, vocab_size=32000, max_position_embeddings=8192)
    target = target.to("cuda", torch.bfloat16)
    drafter = random_drafter(target).to("cuda", torch.bfloat16)
    options = {"max_new_tokens": 300, "window_size": 10, "cuda_graphs": True}
    config = call_config(target.generation_config, do_sample=False, pad_token_id=PAD, **options)
    for length in (40, 1900, 3900):
        ids = torch.randint(1, 32000, (1, length), device="cuda")
        reference, _ = without_drafts(target, drafter, ids, config)
        with monkeypatch.context() as patch:
            patch.setattr(generation_ppow, "draft", Told(reference))
            out = generate_with(target, drafter, ids, config=options)
        assert out.sequences[0, length:].tolist() == reference
        assert out.acceptance.acceptance_length > 10
