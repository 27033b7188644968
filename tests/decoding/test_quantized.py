"""Quantized targets: served where a token's logits do not depend on what else is in the pass, refused where they do.

Weights alone in fewer bits make another target, and drafting keeps what that one says. Activations in fewer bits make
its rounding coarser, and where several tokens share a scale or a choice of columns, a window's pass is another function
than the same tokens one by one.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from decoding_helpers import CHAIN, MODES, build_target, generate_with, prompt_batches, random_drafter, train
from ppow import PPOWDrafter, fast_path_ppow, probe_ppow, products_ppow, recording_ppow
from ppow.lossless_ppow import first_difference, in_dtype

NEW_TOKENS = 12
PROMPT = torch.tensor([[5, 9, 7, 3]])


def torchao(kind: str, embeddings: bool = False, **options) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization", reason="needs: pip install torchao")
    if "granularity" in options:
        options["granularity"] = getattr(quantization, options["granularity"])()
    return TorchAoConfig(getattr(quantization, kind)(**options), include_input_output_embeddings=embeddings)


def bitsandbytes(**options) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="needs: pip install bitsandbytes")
    return BitsAndBytesConfig(**options)


WEIGHTS = {
    "int8": lambda: torchao("Int8WeightOnlyConfig"),
    "int8 embeddings": lambda: torchao("Int8WeightOnlyConfig", embeddings=True),
    "float8": lambda: torchao("Float8WeightOnlyConfig"),
    "intx": lambda: torchao("IntxWeightOnlyConfig"),
}
COARSE = {
    "bitsandbytes 4 bits": lambda: bitsandbytes(load_in_4bit=True),
    "bitsandbytes 8 bits": lambda: bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0),
    "int8 activations by token": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "float8": WEIGHTS["float8"],
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """-> a target quantized anew, always of the same weights."""
    folder = tmp_path_factory.mktemp("quantized")
    build_target(hidden_size=64, intermediate_size=128).float().save_pretrained(folder)
    return lambda make, dtype=torch.float32: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=make(), dtype=dtype
    )


@pytest.fixture(autouse=True)
def _no_grad():
    """bitsandbytes multiplies in another way where gradients may be asked for."""
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", WEIGHTS)
def test_with_quantized_weights_greedy_tokens_are_the_targets_own(kind, load, anywhere):
    target = load(WEIGHTS[kind])
    drafter = train(random_drafter(target), target)
    gained = []
    for batch in (1, 3):
        for ids, mask in prompt_batches(batch, 1, seed=batch):
            expected = generate_with(target, None, ids, mask, {"max_new_tokens": NEW_TOKENS}).sequences
            for mode in MODES.values():
                for graphs in (False, True):
                    config = {**mode, "max_new_tokens": NEW_TOKENS, "cuda_graphs": graphs}
                    out = generate_with(target, drafter, ids, mask, config)
                    assert torch.equal(out.sequences, expected), (mode, graphs)
                    gained.append(out.acceptance.acceptance_length)
    assert sum(gained) / len(gained) > 1.2


@pytest.mark.parametrize("kind", COARSE)
def test_in_16_bits_every_difference_is_a_near_tie(kind, load):
    target = load(COARSE[kind], torch.bfloat16)
    drafter, before = random_drafter(target), target(PROMPT).logits
    verdicts = []
    for ids, mask in prompt_batches(1, 3, seed=3):
        config = {**CHAIN, "max_new_tokens": NEW_TOKENS}
        answers = [generate_with(target, each, ids, mask, config).sequences[0] for each in (drafter, None)]
        found = first_difference(target, ids, *(answer[ids.shape[1] :].tolist() for answer in answers))
        verdicts.append(found.verdict if found else "identical")
    assert "identical" in verdicts and set(verdicts) <= {"identical", "near tie"}
    assert torch.equal(target(PROMPT).logits, before)  # the precise scores left it as it was


@pytest.mark.parametrize("kind", ["float8", "int8", "intx"])
def test_precise_scores_are_those_of_the_weights_as_they_count(kind, load):
    target = load(WEIGHTS[kind])
    weight = target.model.layers[0].mlp.up_proj.weight
    kept, values = type(weight), weight.dequantize()
    given = target(PROMPT).logits
    with in_dtype(target, torch.float64):
        precise = target(PROMPT).logits
    assert precise.dtype == torch.float64
    torch.testing.assert_close(given.double(), precise, rtol=1e-4, atol=1e-4)
    assert type(target.model.layers[0].mlp.up_proj.weight) is kept and torch.equal(weight.dequantize(), values)


REFUSED = {
    "LLM.int8": (lambda: bitsandbytes(load_in_8bit=True), "Linear8bitLt layers compute of a token changes"),
    "one scale for all": (
        lambda: torchao("Int8DynamicActivationInt8WeightConfig", granularity="PerTensor"),
        "Int8Tensor layers compute of a token changes",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", REFUSED)
def test_activations_that_are_quantized_together_are_refused(kind, dtype, load):
    make, why = REFUSED[kind]
    target = load(make, dtype)
    with pytest.raises(ValueError, match=f"{why}.*llm_int8_threshold=0.0"):
        generate_with(target, random_drafter(target), PROMPT, config=CHAIN)


def test_float32_promises_more_than_quantized_activations_keep(load):
    target = load(COARSE["int8 activations by token"])
    with pytest.raises(ValueError, match="not those of the same tokens one by one"):
        generate_with(target, random_drafter(target), PROMPT, config=CHAIN)


def test_weights_that_were_quantized_by_hand_are_noticed():
    """transformers does not know of it, and the layers' class is as before."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs: pip install torchao")
    target = build_target().float()
    assert not probe_ppow.is_quantized(target) and probe_ppow.is_known(target)
    quantization.quantize_(target, quantization.Int8WeightOnlyConfig())
    assert probe_ppow.is_quantized(target) and not probe_ppow.is_known(target)


def test_quantized_weights_are_not_taken_for_plain_ones(load, monkeypatch):
    monkeypatch.setattr(products_ppow, "FEWEST_IN_ALL", 0)
    monkeypatch.setattr(products_ppow, "FEWEST_WEIGHTS", 1)
    target = load(WEIGHTS["int8"])
    assert recording_ppow.Product.find(list(target.model.layers)) == []
    with products_ppow.few_rows(target):
        assert [name for name, module in target.named_modules() if "forward" in vars(module)] == ["lm_head"]


def test_another_quantized_weight_needs_other_graphs(load):
    target = load(WEIGHTS["int8"])
    layer, before = target.model.layers[0].mlp.up_proj, fast_path_ppow._weights(target)
    assert fast_path_ppow._weights(target) == before
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    assert fast_path_ppow._weights(target) != before


@pytest.mark.parametrize("mode", MODES)
def test_samples_are_of_the_targets_distribution(mode, tmp_path):
    """Two tokens of a vocabulary of 8, 4,000 times: each pair as often as the quantized target's logits say."""
    build_target(vocab_size=8, initializer_range=0.25, seed=1).float().save_pretrained(tmp_path)
    make = WEIGHTS["int8 embeddings"]
    target = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=make(), dtype=torch.float32)
    prompt, count = torch.tensor([1, 4, 2]), 4000
    texts = torch.cat((prompt.expand(8, -1), torch.arange(8)[:, None]), 1)
    chances = target(texts).logits.softmax(-1)
    expected = chances[0, -2][:, None] * chances[:, -1]  # (8, 8)
    torch.manual_seed(0)
    config = {**MODES[mode], "do_sample": True, "top_k": 0, "max_new_tokens": 2}
    drafter = random_drafter(target, initializer_range=0.3)
    found = generate_with(target, drafter, prompt.expand(count, -1), config=config).sequences[:, 3:]
    drawn = torch.bincount(found[:, 0] * 8 + found[:, 1], minlength=64).view(8, 8) / count
    assert ((drawn - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt() + 1e-6).all()


def test_a_drafter_in_float8(load, tmp_path):
    """What it drafts costs or gains time; the tokens are the target's."""
    target = build_target().float()
    train(random_drafter(target), target).save_pretrained(tmp_path)
    drafter = PPOWDrafter.from_pretrained(tmp_path, quantization_config=WEIGHTS["float8"](), dtype=torch.float32)
    drafter.generation_config.window_schedule = "constant"
    assert type(drafter.fc.weight) is not torch.nn.Parameter
    for ids, mask in prompt_batches(3, 3, seed=1):
        expected = generate_with(target, None, ids, mask, {"max_new_tokens": NEW_TOKENS}).sequences
        for mode in MODES.values():
            out = generate_with(target, drafter, ids, mask, {**mode, "max_new_tokens": NEW_TOKENS})
            assert torch.equal(out.sequences, expected) and out.acceptance.acceptance_length > 1.2
