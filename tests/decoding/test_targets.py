"""Which targets are served: right, or refused with a ValueError before any token, whatever the architecture.

The sweep walks every causal language model of the installed transformers, built tiny: a part of the windows always,
all of them under both attention implementations with ``-m slow``. docs/targets.md is its table.
"""

import types

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from decoding_helpers import FAMILIES, MODES, build_target, generate_with, random_drafter
from ppow import PPOWConfig, PPOWDrafter, graphs_ppow, obstacles_ppow, pair_ppow, probe_ppow
from ppow.probe_ppow import KNOWN, check_rope, check_target, is_known
from ppow.target_ppow import TargetState
from ppow.training import plan, preparation
from ppow.training.config import SupervisedConfig
from tiny_targets import UNBUILT, Oracle, build, causal_classes, read_table, row_of

VERSION, TABLE = read_table()
PARTS = 8  # so that workers share the sweep


@pytest.mark.parametrize("part", range(PARTS))
def test_every_architecture_is_right_or_refused(part):
    here = VERSION == transformers.__version__
    for kind in sorted(causal_classes())[part::PARTS]:
        found = row_of(kind, brief=True)
        if here:
            assert found == TABLE[kind], (
                f"{kind}: run `python -m tests.helpers.tiny_targets` if what is served has changed"
            )


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", sorted(set(causal_classes()) - set(UNBUILT)))
def test_every_window_of_every_architecture(kind, attention):
    assert row_of(kind, attention)[0] == TABLE.get(kind, row_of(kind))[0]


def test_the_table_holds_every_architecture_of_its_version():
    assert {verdict for verdict, _ in TABLE.values()} == {"right", "refused", "not tried"}
    if transformers.__version__ == VERSION:
        assert set(TABLE) == set(causal_classes())


def test_the_known_are_those_that_the_family_tests_walk():
    assert {spec[0] for spec in FAMILIES.values()} == KNOWN


# -- trials ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(monkeypatch):
    """How often a target was tried."""
    original, seen = probe_ppow._try, []
    monkeypatch.setattr(probe_ppow, "_try", lambda *given: seen.append(given[1]) or original(*given))
    return seen


def test_a_target_is_tried_once_and_again_when_its_configuration_changes(tried):
    target = build("stablelm")
    check_target(target)
    check_target(target)
    assert len(tried) == 1
    target.set_attn_implementation("eager")
    check_target(target)
    assert len(tried) == 2
    assert not is_known(target) and not tried.clear()
    check_target(build_target("llama"))
    assert tried == []


def test_a_trial_leaves_the_target_and_the_random_numbers_as_they_were():
    target = build("stablelm")
    target.generation_config.repetition_penalty = 1.5
    before, held = torch.get_rng_state(), list(vars(target))
    check_target(target)
    assert torch.equal(before, torch.get_rng_state()) and list(vars(target)) == held
    assert target.generation_config.repetition_penalty == 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_local_windows_by_slot_are_refused_in_every_dtype(dtype):
    with pytest.raises(ValueError, match="GPTNeoForCausalLM is not served: the logits of a tree are not those"):
        check_target(build("gpt_neo").to(dtype))
    check_target(build("stablelm").to(dtype))


def test_a_border_is_tried_only_by_a_call_that_reaches_it(tried):
    target = build("gpt_neo", window_size=64)
    check_target(target, end=40)  # so far every local window holds the whole text
    with pytest.raises(ValueError, match="are not those of the same tokens"):
        check_target(target, end=60, ahead=10)  # slots, not positions
    assert tried == [probe_ppow.PROMPT, 62]


def test_targets_without_layers_or_with_other_states_say_so(monkeypatch):
    target = build("stablelm")
    monkeypatch.setattr(target.config, "num_hidden_layers", 3)
    with pytest.raises(ValueError, match="StableLmForCausalLM shows no list of 3 decoder layers"):
        check_target(target)
    with pytest.raises(ValueError, match="BloomForCausalLM is not served: it takes no windows"):
        check_target(build("bloom"))


def test_prompt_learning_is_refused_and_lora_is_served():
    peft = pytest.importorskip("peft")
    ids = torch.tensor([[5, 6, 7, 8]])
    for given in (peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig):
        base = build_target("llama").float()
        drafter = random_drafter(base)
        model = peft.get_peft_model(base, given(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
        plain = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        try:
            ours = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, assistant_model=drafter)
        except ValueError as error:
            assert "LlamaForCausalLM is not served" in str(error)
            continue
        assert torch.equal(plain, ours), given  # a version of PEFT whose prompt does not reach generate()
    base = build_target("llama").float()
    drafter = random_drafter(base)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, lora).eval()
    plain = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, assistant_model=drafter))


def test_the_fast_paths_attention_is_tried_too():
    assert obstacles_ppow.attention_obstacle(build_target("llama")) is None
    assert obstacles_ppow.attention_obstacle(build("stablelm")) is None
    sinks = build("gpt_oss", attention="eager")  # its attention has a sink, which the fast path's has not
    assert "not those of the same tokens" in probe_ppow.trial(sinks, "fast", 24, graphs_ppow.unrecorded)
    assert probe_ppow.trial(sinks, "plain", 24, TargetState) is None
    ways = build("moshi")  # it reads a prompt as a whole, and what follows in a sliding window
    assert "the logits of a prompt are not those" in obstacles_ppow.attention_obstacle(ways)
    assert probe_ppow.trial(ways, "plain", 24, TargetState) is None


def test_another_default_device_changes_nothing_about_a_trial():
    target = build("stablelm")
    here = probe_ppow._text(target, 24)
    with torch.device("meta"):  # as torch.set_default_device("cuda") for a target on a GPU
        there = probe_ppow._text(target, 24)
    assert all(torch.equal(*pair) for pair in zip(here, there))


# -- lengths -----------------------------------------------------------------------------------------------------------

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 32,
}
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def longrope_target():
    config = Phi3Config(
        **SHAPE, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=dict(LONGROPE)
    )
    return Phi3ForCausalLM(config).double().eval()


def dynamic_target():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=32, rope_parameters=rope)).double().eval()


@pytest.fixture
def walk(monkeypatch):
    """Generates (B, P) prompts with windows that hold right tokens; -> with and without, tokens alike."""

    def run(target, ids, mask, new, mode):
        asked = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        plain = target.generate(ids, attention_mask=mask, **asked)
        oracle = Oracle(plain, target.config.vocab_size)
        monkeypatch.setattr(pair_ppow, "draft", oracle)
        out = generate_with(target, random_drafter(target), ids, mask, {**mode, "max_new_tokens": new})
        assert oracle.calls > 0
        torch.testing.assert_close(out.sequences, plain, rtol=0, atol=0)

    return run


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize(
    "make, prompt, new",
    # (texts of exactly 32 tokens are read up to the border: the last token is not read)
    [(longrope_target, 20, 13), (longrope_target, 33, 20), (dynamic_target, 20, 13)],
)
def test_length_dependent_rope_is_right_on_one_side_of_its_border(walk, make, prompt, new, mode):
    target = make()
    ids = torch.randint(2, 64, (2, prompt))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    walk(target, ids[:1], mask[:1], new, mode)
    walk(target, ids, mask, new, mode)  # rows of unequal speed: none reads behind its own end


@pytest.mark.parametrize(
    "make, prompt, new", [(longrope_target, 20, 14), (longrope_target, 32, 2), (dynamic_target, 20, 14)]
)
def test_length_dependent_rope_is_refused_where_a_call_may_cross_its_border(make, prompt, new):
    target = make()
    ids = torch.randint(2, 64, (1, prompt))
    with pytest.raises(ValueError, match=r"RoPE .* changes its frequencies after 32 tokens"):
        generate_with(target, random_drafter(target), ids, None, {"max_new_tokens": new})


def test_rope_of_layer_types_and_of_caches_counts():
    config = LlamaConfig(**SHAPE)
    config.rope_parameters = {"full_attention": dict(LONGROPE), "sliding_attention": {"rope_type": "default"}}
    check_rope(config, start=0, prompt=40, end=60)
    for start, prompt, end in ((0, 20, 33), (20, 40, 60)):
        with pytest.raises(ValueError, match="longrope"):
            check_rope(config, start, prompt, end)
    check_rope(config, start=33, prompt=40, end=60)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_learned_positions_may_be_used_up_to_the_last(walk, mode):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=24, initializer_range=0.3)
    config.eos_token_id = config.bos_token_id = None
    target = GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(2, 64, (2, 12))
    walk(target, ids, torch.ones_like(ids), 13, mode)  # a row that is ahead would be drafted behind position 23


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_and_its_plan_refuse_what_decoding_refuses(tmp_path):
    build("gpt_neo").save_pretrained(tmp_path / "target")
    given = SupervisedConfig(
        target=str(tmp_path / "target"), data="unused", output_dir=str(tmp_path / "out"), max_length=64, dtype="float32"
    )
    where = types.SimpleNamespace(device="cpu")
    with pytest.raises(ValueError, match="--target .*GPTNeoForCausalLM is not served: the logits of a tree"):
        preparation.load_target(given, where)
    dynamic_target().save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match=r"RoPE \(dynamic\) changes its frequencies after 32 tokens"):
        preparation.load_target(given, where)
    config = dynamic_target().config
    with pytest.raises(ValueError, match=r"RoPE \(dynamic\) changes its frequencies after 32 tokens"):
        plan.plan(given, config, PPOWConfig.from_target(config), plan.DEVICES["h100"])


# -- configurations ----------------------------------------------------------------------------------------------------


def gemma3n_config(widths: list):
    return transformers.Gemma3nTextConfig(num_hidden_layers=4, intermediate_size=widths, num_kv_shared_layers=0)


def test_a_drafters_configuration_asks_for_what_the_targets_does_not_say():
    bloom = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4)
    with pytest.raises(ValueError, match=r"BloomConfig .* Pass max_position_embeddings=\.\.\. to PPOWConfig"):
        PPOWConfig.from_target(bloom)
    config = PPOWConfig.from_target(bloom, max_position_embeddings=512)
    assert (config.max_position_embeddings, config.intermediate_size, config.head_dim) == (512, 128, 8)
    with pytest.raises(ValueError, match=r"Pass intermediate_size=.*is \[64, 64, 64, 128\], one number is needed"):
        PPOWConfig.from_target(gemma3n_config([64, 64, 64, 128]))
    assert PPOWConfig.from_target(gemma3n_config([64] * 4)).intermediate_size == 64
    assert PPOWConfig.from_target(gemma3n_config([64, 64, 64, 128]), intermediate_size=48).intermediate_size == 48
    PPOWDrafter(PPOWConfig.from_target(longrope_target().config))  # no RoPE that follows the length of the text
    assert PPOWConfig.from_target(longrope_target().config).rope_parameters["rope_type"] == "default"


def test_image_text_configurations_give_their_text_part():
    text = {**SHAPE, "model_type": "llama"}
    llava = transformers.LlavaConfig(text_config=text, vision_config={"model_type": "clip_vision_model"})
    config = PPOWConfig.from_target(llava)
    assert (config.target_model_type, config.hidden_size, config.vocab_size) == ("llama", 32, 64)
