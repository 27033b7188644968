"""What users of ``generate`` rely on, with a drafter and without: its options, streamers, caches, entrances, errors.

Token identity over families of targets is test_families.py, exact distributions are test_lossless_sampling.py.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

from decoding_helpers import (
    CHAIN,
    MODES,
    PAD,
    TREE,
    build_target,
    generate_with,
    prompt_batches,
    random_drafter,
    trained_pair,
)
from ppow import PPOWDrafter
from ppow.cache_ppow import CACHE_NAME, SlotCache
from ppow.drafting_ppow import DrafterState, DraftOptions
from ppow.entrances_ppow import generate

# -- what users of generate rely on ------------------------------------------------------------------------------------

PROMPT = torch.tensor([[7, 3, 11, 5]])


def both(mode="chain", ids=PROMPT, mask=None, target=None, drafter=None, config=None, **kwargs):
    """Stock generate and ours with the same arguments: -> (expected ids, our output)."""
    pair = trained_pair()
    target, drafter = target or pair[0], drafter or pair[1]
    mask = torch.ones_like(ids) if mask is None else mask
    config = {"do_sample": False, "pad_token_id": PAD, **(config or {})}
    expected = target.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**config), **kwargs)
    return expected, generate_with(target, drafter, ids, mask, config | MODES[mode], **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "config",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": 17},
        {"max_length": 9},
        {"max_new_tokens": 20, "eos_token_id": 9},
        {"max_new_tokens": 30, "eos_token_id": [9, 20, 31]},
        {"max_new_tokens": 20, "min_new_tokens": 12, "eos_token_id": [9, 20, 31, 4, 5]},
        {"max_new_tokens": 20, "repetition_penalty": 1.4},
        {"max_new_tokens": 20, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 20, "bad_words_ids": [[9], [20, 31]]},
        {"max_new_tokens": 20, "suppress_tokens": [9, 20]},
        {"max_new_tokens": 20, "prefill_chunk_size": 2},
    ],
    ids=str,
)
def test_options_of_generate(mode, config):
    expected, found = both(mode, config=config)
    assert torch.equal(found.sequences, expected)
    for ids, mask in prompt_batches(4, 2, seed=3):
        if "prefill_chunk_size" in config or "max_length" in config:
            continue
        expected, found = both(mode, ids, mask, config=config)
        assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize("mode", MODES)
def test_scores_equal_stock_ones(mode):
    config = {
        "max_new_tokens": 12,
        "output_scores": True,
        "output_logits": True,
        "return_dict_in_generate": True,
        "repetition_penalty": 1.2,
    }
    expected, found = both(mode, config=config)
    assert len(found.scores) == len(found.logits) == 12
    for ours, stock in zip(found.scores + found.logits, expected.scores + expected.logits):
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    target = trained_pair()[0]
    transitions = target.compute_transition_scores(found.sequences, found.scores)
    stock = target.compute_transition_scores(expected.sequences, expected.scores)
    torch.testing.assert_close(transitions, stock, atol=1e-5, rtol=1e-5)


class StopAfter(StoppingCriteria):
    """Stops when the sum of the text's tokens passes a bound; remembers the lengths it was asked about."""

    def __init__(self, bound):
        self.bound, self.lengths = bound, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids.sum(1) > self.bound


@pytest.mark.parametrize("mode", MODES)
def test_custom_criteria_are_asked_after_every_token(mode):
    target, drafter = trained_pair()
    runs = []
    for assistant in (None, drafter):
        criterion = StopAfter(150)
        config = {"max_new_tokens": 40, "pad_token_id": PAD, "do_sample": False}
        out = target.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            generation_config=GenerationConfig(**config, **(MODES[mode] if assistant else {})),
            assistant_model=assistant,
            stopping_criteria=StoppingCriteriaList([criterion]),
        )
        runs.append((out.tolist(), criterion.lengths))
    assert runs[0] == runs[1]


def test_without_an_end_token_stopped_rows_run_on_until_all_stop():
    for ids, mask in prompt_batches(4, 4, seed=5):
        criteria = StoppingCriteriaList([StopAfter(250)])
        expected, found = both("chain", ids, mask, config={"max_new_tokens": 40}, stopping_criteria=criteria)
        assert torch.equal(found.sequences, expected)


class Recorder(LogitsProcessor):
    """A stateful processor: remembers every prefix and forbids the token it saw last."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[0].tolist())
        scores = scores.clone()
        scores[:, self.seen[-1][-1]] = -torch.inf
        return scores


@pytest.mark.parametrize("mode", MODES)
def test_a_stateful_processor_sees_what_it_would_see_without_a_drafter(mode):
    target, drafter = trained_pair()
    recorders = [Recorder(), Recorder()]
    config = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD}
    mask = torch.ones_like(PROMPT)
    stock = GenerationConfig(**config)
    expected = target.generate(PROMPT, attention_mask=mask, generation_config=stock, logits_processor=[recorders[0]])
    found = generate_with(target, drafter, PROMPT, mask, config | MODES[mode], logits_processor=[recorders[1]])
    assert torch.equal(found.sequences, expected) and recorders[0].seen == recorders[1].seen


def test_prefix_allowed_tokens_see_their_batch_row():
    def allowed(row, ids):
        return list(range(1 + row, 40, 2 + row))

    for ids, mask in prompt_batches(3, 3, seed=6):
        expected, found = both("chain", ids, mask, config={"max_new_tokens": 12}, prefix_allowed_tokens_fn=allowed)
        assert torch.equal(found.sequences, expected)


class Sink:
    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


def test_streamers_get_every_token_once_in_order():
    target, drafter = trained_pair()
    sink = Sink()
    out = generate_with(target, drafter, PROMPT, config={"max_new_tokens": 25, **TREE}, streamer=sink)
    assert sum(sink.pieces, []) == out.sequences[0].tolist()
    assert sink.pieces[0] == PROMPT[0].tolist() and sink.ended == 1


def test_the_same_seed_gives_the_same_text():
    target, drafter = trained_pair()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out = generate_with(target, drafter, PROMPT, config={"do_sample": True, "max_new_tokens": 20, **CHAIN})
        outs.append(out.sequences.tolist())
    assert outs[0] == outs[1] != outs[2]


def test_a_time_limit_ends_the_text():
    target, drafter = trained_pair()
    out = generate_with(target, drafter, PROMPT, config={"max_new_tokens": 400, "max_time": 1e-6})
    assert out.sequences.shape[1] == PROMPT.shape[1] + 1


@pytest.mark.parametrize("mode", MODES)
def test_multi_turn_with_the_returned_cache(mode):
    target, drafter = trained_pair()
    config = {"max_new_tokens": 15, **MODES[mode]}
    first = generate_with(target, drafter, PROMPT, config=config)
    cache = first[CACHE_NAME]  # by this transformers' own name; the next test takes the old one
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    longer = torch.cat((first.sequences, torch.tensor([[4, 9, 2]])), 1)
    fresh = generate_with(target, drafter, longer, config=config)
    again = generate_with(target, drafter, longer, config=config, **{CACHE_NAME: cache})
    assert torch.equal(again.sequences, fresh.sequences)
    assert again.acceptance.accepted == fresh.acceptance.accepted  # the drafter's side came along


def test_caches_pass_between_stock_and_ours():
    target, drafter = trained_pair()
    ours = generate_with(target, drafter, PROMPT, config={"max_new_tokens": 10, **TREE})
    longer = torch.cat((ours.sequences, torch.tensor([[4, 9]])), 1)
    mask = torch.ones_like(longer)
    expected = target.generate(longer, attention_mask=mask, max_new_tokens=10, do_sample=False)
    stock = target.generate(
        longer, attention_mask=mask, max_new_tokens=10, do_sample=False, past_key_values=ours.past_key_values
    )
    assert torch.equal(stock, expected)
    cache = DynamicCache(config=target.config)
    target(longer[:, :-1], past_key_values=cache)
    found = generate_with(target, drafter, longer, config={"max_new_tokens": 10}, past_key_values=cache)
    assert torch.equal(found.sequences, expected)


def test_acceptance_figures_add_up():
    target, drafter = trained_pair()
    for ids, mask in prompt_batches(3, 2, seed=8):
        out = generate_with(target, drafter, ids, mask, {"max_new_tokens": 20, **CHAIN})
        figures = out.acceptance
        assert [sum(row) for row in figures.gained] == [19] * 3  # the first token comes from the prompt
        assert all(a <= d <= 4 for r, s in zip(figures.accepted, figures.drafted) for a, d in zip(r, s))
        flat = [min(a, 1) for row in figures.accepted for a in row]
        drafted = [d for row in figures.drafted for d in row]
        tried = [a for a, d in zip(flat, drafted) if d > 0]
        assert figures.per_position()[0] == pytest.approx(sum(tried) / len(tried))


# -- entrances -------------------------------------------------------------------------------------------------------


def test_the_three_entrances_agree(tmp_path, tiny_tokenizer):
    target = build_target(vocab_size=len(tiny_tokenizer), eos_token_id=tiny_tokenizer.eos_token_id)
    target.generation_config.pad_token_id = PAD
    random_drafter(target).float().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).to(target.dtype)
    inputs = tiny_tokenizer("the quick dog", return_tensors="pt")
    expected = target.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(target.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_model=loaded), expected)
    sink = Sink()
    through_repository = target.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        assistant_model=loaded,
        custom_generate=str(tmp_path),
        trust_remote_code=True,
        revision="main",  # handed on by transformers
        window_size=3,
        streamer=sink,
    )
    assert torch.equal(through_repository, expected) and sum(sink.pieces, []) == expected[0].tolist()
    pipe = pipeline("text-generation", model=target, tokenizer=tiny_tokenizer, assistant_model=loaded)
    text = pipe("the quick dog", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert text == tiny_tokenizer.decode(expected[0], skip_special_tokens=True)
    with pytest.raises(ValueError, match="custom_generate needs assistant_model"):
        target.generate(**inputs, custom_generate=str(tmp_path), trust_remote_code=True)


def test_stop_strings_on_both_entrances(tmp_path, tiny_tokenizer):
    target = build_target(vocab_size=len(tiny_tokenizer))
    drafter = random_drafter(target)
    drafter.save_pretrained(tmp_path)
    inputs = tiny_tokenizer("one and two", return_tensors="pt")
    free = target.generate(**inputs, max_new_tokens=30, do_sample=False)
    text = tiny_tokenizer.decode(free[0, inputs["input_ids"].shape[1] + 4 :])
    stop = next(letter for letter in text if letter.isascii() and letter.isprintable())
    arguments = {"max_new_tokens": 30, "do_sample": False, "stop_strings": [stop], "tokenizer": tiny_tokenizer}
    expected = target.generate(**inputs, **arguments)
    assert expected.shape[1] < free.shape[1]
    assert torch.equal(target.generate(**inputs, **arguments, assistant_model=drafter), expected)
    entrance = {"custom_generate": str(tmp_path), "trust_remote_code": True, "assistant_model": drafter}
    assert torch.equal(target.generate(**inputs, **arguments, **entrance), expected)


def test_other_assistants_still_work():
    target, _ = trained_pair()
    small = build_target("llama", num_hidden_layers=1).to(target.dtype)
    arguments = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 15, "do_sample": False}
    expected = target.generate(PROMPT, **arguments)
    assert torch.equal(target.generate(PROMPT, assistant_model=small, **arguments), expected)


def test_how_to_draft_is_resolved_in_order():
    call, own = GenerationConfig(window_size=3), GenerationConfig(tree_nodes=9)
    assert DraftOptions.resolve(call, own) == DraftOptions(window_size=3, window_schedule="constant")
    assert DraftOptions.resolve(GenerationConfig(), own) == DraftOptions(tree_depth=7, tree_top_k=10, tree_nodes=9)
    assert DraftOptions.resolve(GenerationConfig()) == DraftOptions(window_size=10)
    mixed = DraftOptions.resolve(GenerationConfig(tree_depth=2), GenerationConfig(tree_nodes=9, draft_threshold=0.2))
    assert mixed == DraftOptions(tree_depth=2, tree_top_k=10, tree_nodes=9)


# -- errors before any token is made -----------------------------------------------------------------------------------


def other(**overrides):
    return random_drafter(build_target("llama", **overrides))


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (lambda: other(hidden_size=16), "hidden size 16 in the drafter, 32 in the target"),
        (lambda: other(num_hidden_layers=6), "layer count 6 in the drafter, 4 in the target"),
        (lambda: random_drafter(build_target("qwen2")), "model type qwen2 in the drafter, llama in the target"),
    ],
)
def test_a_drafter_of_another_target(drafter, message):
    target, _ = trained_pair()
    with pytest.raises(ValueError, match=message):
        generate_with(target, drafter(), PROMPT, config={"max_new_tokens": 5})


def test_a_drafter_of_another_vocabulary():
    target, _ = trained_pair()
    drafter = other(vocab_size=50)
    with pytest.raises(ValueError, match="different tokenizers"):  # transformers looks first
        generate_with(target, drafter, PROMPT, config={"max_new_tokens": 5})
    with pytest.raises(ValueError, match="vocabulary 50 in the drafter, 48 in the target"):
        tokenizers = {"tokenizer": object(), "assistant_tokenizer": object()}  # as it asks for
        generate(target, assistant_model=drafter, inputs=PROMPT, max_new_tokens=5, **tokenizers)


def test_a_rounded_draft_vocabulary_is_refused(tmp_path):
    """All tensors converted to bfloat16, the offsets among them: tokens of every other text would be drafted."""
    target = build_target(vocab_size=3000)
    drafter = random_drafter(target, draft_vocab_size=1000)
    generate_with(target, drafter, PROMPT, config={"max_new_tokens": 3})
    drafter.save_pretrained(tmp_path)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rounded = PPOWDrafter.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="drafts 1000 tokens of 3000, but d2t .* agree on"):
        generate_with(target, rounded, PROMPT, config={"max_new_tokens": 3})


def test_a_recorded_target_id_must_match():
    target = build_target()
    drafter = random_drafter(target)
    drafter.config.target_name_or_path, target.config._name_or_path = "org/one", "org/two"
    with pytest.raises(ValueError, match="made for org/one, the target is org/two"):
        generate_with(target, drafter, PROMPT, config={"max_new_tokens": 5})


@pytest.mark.parametrize(
    ("config", "kwargs", "message"),
    [
        ({"window_size": 0}, {}, "window_size=0: expected an integer of at least 1"),
        ({"tree_nodes": -1}, {}, "tree_nodes=-1"),
        ({"draft_threshold": 1.5, "window_size": 3}, {}, "draft_threshold=1.5"),
        ({"draft_threshold": "0.1", "window_size": 3}, {}, "draft_threshold='0.1'"),
        ({"accept_drafts": "yes"}, {}, "accept_drafts='yes'"),
        ({"output_hidden_states": True}, {}, "output_hidden_states=True is not available"),
        ({"output_attentions": True}, {}, "output_attentions=True is not available"),
        ({"use_cache": False}, {}, "use_cache=True"),
        ({"cache_implementation": "static"}, {}, "cannot hold windows"),
        ({"guidance_scale": 1.5}, {}, "guidance_scale"),
    ],
)
def test_options_that_cannot_be_honoured(config, kwargs, message):
    target, drafter = trained_pair("qwen3")
    with pytest.raises(ValueError, match=message):
        generate_with(target, drafter, PROMPT, config={"max_new_tokens": 5, **config}, **kwargs)


def test_a_prompt_that_the_cache_already_holds():
    target, drafter = trained_pair()
    cache = DynamicCache(config=target.config)
    target(PROMPT, past_key_values=cache)
    with pytest.raises(ValueError, match="nothing is left"):
        generate_with(target, drafter, PROMPT, config={"max_new_tokens": 5}, past_key_values=cache)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_prompt(mode):
    target, drafter = trained_pair()
    with pytest.raises(ValueError, match=r"prompt of at least one token.*got input_ids \(1, 0\)"):
        generate_with(target, drafter, torch.zeros(1, 0, dtype=torch.long), config={"max_new_tokens": 5, **MODES[mode]})


def test_damaged_weights_are_noticed():
    target, _ = trained_pair()
    drafter = random_drafter(target)
    drafter.lm_head.weight.data[3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        generate_with(target, drafter, PROMPT, config={"max_new_tokens": 5})


def test_trees_and_batches_under_flash_attention():
    target = build_target()
    drafter = random_drafter(target)
    target.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no window masks"):
        generate_with(target, drafter, PROMPT, config={"max_new_tokens": 5, **TREE})


def test_a_long_prompt_costs_the_drafter_no_square_of_scores(monkeypatch):
    """Without padding it needs no mask; and no kernel is asked for what makes it write all scores out."""
    target, drafter = trained_pair()
    count, calls = 1100, []
    stock = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(k) or stock(*a, **k)
    )
    taps = torch.randn(1, count, drafter.fc.in_features)
    tokens = torch.randint(1, 40, (1, count))
    where, counts = torch.arange(count)[None], torch.tensor([count])
    found = []
    for valid in (None, torch.ones(1, count, dtype=torch.bool)):
        cache, zero = SlotCache(len(drafter.layers), count), torch.zeros(1, dtype=torch.long)
        state = DrafterState(drafter, drafter.embedding_for(target), cache, zero, valid)
        state.extend(taps, tokens, where, counts)
        state.extend(taps[:, :2], tokens[:, :2], where[:, :2] + count, counts * 0 + 2)  # later pairs see all of it
        found.append(state.hidden)
    layers = len(drafter.layers)
    bare, later, padded = calls[:layers], calls[layers : 2 * layers], calls[2 * layers : 3 * layers]
    assert all(call["attn_mask"] is None and call["is_causal"] and not call["enable_gqa"] for call in bare)
    assert all(call["attn_mask"].shape[-2:] == (2, count + 2) for call in later)
    assert all(call["attn_mask"].shape[-1] == count and not call["enable_gqa"] for call in padded)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_a_drafter_does_not_generate_alone():
    with pytest.raises(ValueError, match="drafts for its target"):
        trained_pair()[1].generate(PROMPT)


def test_a_target_whose_cache_cannot_be_rolled_back():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        pad_token_id=PAD,
    )
    target = Qwen3NextForCausalLM(config)
    with pytest.raises(ValueError, match="rolled back|stateful"):
        generate_with(target, random_drafter(target), PROMPT, config={"max_new_tokens": 5})


def test_text_streamers_of_transformers(tiny_tokenizer, capsys):
    target = build_target(vocab_size=len(tiny_tokenizer))
    inputs = tiny_tokenizer("a target", return_tensors="pt")
    drafter = random_drafter(target)
    out = target.generate(
        **inputs, max_new_tokens=12, do_sample=False, assistant_model=drafter, streamer=TextStreamer(tiny_tokenizer)
    )
    assert capsys.readouterr().out.rstrip("\n") == tiny_tokenizer.decode(out[0])
