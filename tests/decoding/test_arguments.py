"""What ``generate`` promises of its arguments holds with a drafter too: honoured as without one, refused by name before
any token is made, or warned of by name."""

import copy
import inspect
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    WatermarkingConfig,
)
from transformers.cache_utils import DynamicLayer

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
from ppow import PPOWConfig, PPOWDrafter, recording_ppow
from ppow.attention_ppow import without_cudnn_attention
from ppow.cache_ppow import CACHE_NAME
from ppow.drafting_ppow import DraftOptions
from ppow.entrances_ppow import generate
from ppow.recording_ppow import Gate
from ppow.transcript_ppow import Acceptance

PROMPT = torch.tensor([[7, 3, 11, 5]])
GREEDY = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 12}
EOS = [9, 20, 31, 4, 5]


def both(ids=PROMPT, mask=None, config=None, pair=None, **kwargs):
    """Without and with the drafter: two outputs of the same call."""
    target, drafter = pair or trained_pair()
    return [generate_with(target, d, ids, mask, {**GREEDY, **(config or {})}, **kwargs) for d in (None, drafter)]


# -- every field of a generation config, every argument of generate ----------------------------------------------------

HONOURED = {  # value -> the same tokens as without a drafter
    "max_length": 14,
    "max_new_tokens": 7,
    "min_length": 9,
    "min_new_tokens": 6,
    "max_time": 60.0,
    "do_sample": False,
    "num_beams": 2,  # beams, that is, without drafts
    "early_stopping": True,
    "use_cache": True,
    "cache_implementation": "dynamic",
    "cache_config": None,
    "max_cache_len": 64,
    "temperature": 0.5,  # these matter with sampling only: see test_lossless_sampling.py
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "top_h": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "repetition_penalty": 1.3,
    "encoder_repetition_penalty": 1.3,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[9], [20, 31]],
    "renormalize_logits": True,
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 9,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (4, 1.2),
    "suppress_tokens": [9, 20],
    "begin_suppress_tokens": [9, 20],
    "sequence_bias": [[[9], 4.0]],
    "watermarking_config": WatermarkingConfig(bias=2.0, context_width=1),
    "num_return_sequences": 1,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    "decoder_start_token_id": 5,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "is_assistant": False,
    "disable_compile": True,
    "compile_config": None,
    "prefill_chunk_size": 2,
    "low_memory": True,
}
REFUSED = {  # value -> a ValueError that names the field
    "use_cache": False,
    "cache_implementation": "static",
    "guidance_scale": 1.5,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "assistant_ensemble_weight": 0.5,
    "stop_strings": ["a"],  # needs a tokenizer, see test_decoding.py
    "token_healing": True,  # too
}
WARNED = {  # value -> a warning that names the field, and the same tokens
    "assistant_confidence_threshold": 0.7,
    "prompt_lookup_num_tokens": 4,
    "max_matching_ngram_size": 3,
    "assistant_early_exit": 2,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "use_mtp": True,
    "speculation_type": "dflash",
}
ELSEWHERE = {  # other ways to generate, chosen by transformers before any assistant is looked at
    "constraints", "force_words_ids", "penalty_alpha", "dola_layers", "num_beam_groups", "diversity_penalty",
    "continuous_batching_config", "transformers_version", "stop_strings", "token_healing",
}  # fmt: skip


def fields() -> set[str]:
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")}


def test_the_table_knows_every_field_of_a_generation_config():
    assert fields() <= {*HONOURED, *REFUSED, *WARNED, *ELSEWHERE}, "say what a drafter makes of the new fields"


@pytest.mark.parametrize("name", HONOURED)
def test_fields_that_are_honoured(name):
    config = {name: HONOURED[name]}
    if name == "max_length":
        config["max_new_tokens"] = None
    if name in ("min_length", "min_new_tokens", "exponential_decay_length_penalty", "forced_eos_token_id"):
        config["eos_token_id"] = EOS
    target, drafter = trained_pair()
    base = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 12}
    calls = [GenerationConfig(**{**base, **config}) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name.startswith("num_assistant_tokens") else "ignore")
        outs = [
            target.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), generation_config=call, assistant_model=d)
            for call, d in zip(calls, (None, drafter))
        ]
    ids = [out if torch.is_tensor(out) else out.sequences for out in outs]
    assert torch.equal(*ids) and torch.is_tensor(outs[0]) == torch.is_tensor(outs[1])
    for kind in ("scores", "logits"):
        if getattr(outs[0], kind, None) is not None:
            torch.testing.assert_close(getattr(outs[1], kind), getattr(outs[0], kind), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_are_refused_by_name(name):
    target, drafter = trained_pair("qwen3")
    with pytest.raises(ValueError, match=name.split("_")[0] + ".?" + name.split("_")[1]):
        generate_with(target, drafter, PROMPT, config={**GREEDY, name: REFUSED[name]})


@pytest.mark.parametrize("name", sorted(set(WARNED) & fields()))
@pytest.mark.parametrize("own", [False, True])
def test_fields_that_have_no_effect_are_warned_of_by_name(name, own):
    target, drafter = trained_pair()
    expected = generate_with(target, None, PROMPT, config=GREEDY).sequences
    drafter = copy.copy(drafter)
    drafter.generation_config = GenerationConfig(window_size=4, **({name: WARNED[name]} if own else {}))
    with pytest.warns(UserWarning, match=name):
        out = generate_with(target, drafter, PROMPT, config={**GREEDY, **({} if own else {name: WARNED[name]})})
    assert torch.equal(out.sequences, expected)


def test_defaults_are_not_warned_of():
    target, drafter = trained_pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_with(target, drafter, PROMPT, config=GREEDY)


def deepest(out) -> int:
    return max(map(max, out.acceptance.drafted))


def test_num_assistant_tokens_is_transformers_name_of_window_size():
    target, drafter = trained_pair()
    asked = generate_with(target, drafter, PROMPT, config={**GREEDY, "num_assistant_tokens": 2})
    assert deepest(asked) == 2
    with pytest.warns(UserWarning, match="num_assistant_tokens=2 has no effect: window_size=3"):
        out = generate_with(target, drafter, PROMPT, config={**GREEDY, "num_assistant_tokens": 2, "window_size": 3})
    assert deepest(out) == 3
    with pytest.warns(UserWarning, match="num_assistant_tokens=2 has no effect: tree_nodes=12"):
        generate_with(target, drafter, PROMPT, config={**GREEDY, "num_assistant_tokens": 2, **TREE})
    drafter = copy.copy(drafter)
    drafter.generation_config = GenerationConfig(window_size=10, num_assistant_tokens=3)  # where transformers reads it
    assert deepest(generate_with(target, drafter, PROMPT, config=GREEDY)) == 3
    with pytest.raises(ValueError, match="window_size=0|num_assistant_tokens"):
        generate_with(target, drafter, PROMPT, config={**GREEDY, "num_assistant_tokens": 0})
    assert (
        DraftOptions.resolve(GenerationConfig(num_assistant_tokens=5), GenerationConfig(window_size=10)).window_size
        == 5
    )


def test_transformers_heuristic_needs_chains_and_no_other_schedule():
    target, drafter = trained_pair()
    asked = {**GREEDY, "num_assistant_tokens_schedule": "heuristic", "num_assistant_tokens": 6}
    out = generate_with(target, drafter, PROMPT, config=asked)
    assert out.drafting.window_schedule == "heuristic" and out.drafting.window_size == 6
    for other in ({"window_schedule": "gammatune"}, TREE):
        config = {**GREEDY, "num_assistant_tokens_schedule": "heuristic", **other}
        with pytest.warns(UserWarning, match="num_assistant_tokens_schedule='heuristic' has no effect"):
            generate_with(target, drafter, PROMPT, config=config)


def test_every_argument_of_generate_is_known_to_these_tests():
    known = {"self", "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}
    known |= {"synced_gpus", "assistant_model", "streamer", "custom_generate", "kwargs"}
    known |= {"negative_prompt_ids", "negative_prompt_attention_mask"}  # of guidance_scale, which is refused
    assert set(inspect.signature(GenerationMixin.generate).parameters) <= known
    target, drafter = trained_pair()
    with pytest.raises(ValueError, match="synced_gpus=True"):
        generate_with(target, drafter, PROMPT, config=GREEDY, synced_gpus=True)


@pytest.mark.parametrize("argument", ["inputs_embeds", "output_router_logits"])
def test_forward_arguments_that_a_drafter_cannot_follow(argument):
    target, drafter = trained_pair()
    value = target.get_input_embeddings()(PROMPT) if argument == "inputs_embeds" else True
    with pytest.raises(ValueError, match=f"cannot honour .*{argument}"):
        generate_with(target, drafter, PROMPT, config=GREEDY, **{argument: value})


# -- caches ------------------------------------------------------------------------------------------------------------


def turns(drafter, target, cache, ids, mask, config, follow):
    first = generate_with(target, drafter, ids, mask, config, **{CACHE_NAME: cache})
    longer = torch.cat((first.sequences, follow), 1)
    grown = torch.cat((mask, torch.ones(len(ids), longer.shape[1] - mask.shape[1], dtype=torch.long)), 1)
    state = cache.get_seq_length(), [tuple(part.shape for part in layer[:2]) for layer in cache]
    return first, state, generate_with(target, drafter, longer, grown, config, **{CACHE_NAME: cache})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_is_filled_in_place_as_without_a_drafter(family, mode, with_config, batch):
    """Also one with sliding windows, which forgets keys, and also by rows that end early."""
    target, drafter = trained_pair(family)
    follow = torch.tensor([[4, 9, 2]]).expand(batch, -1)
    for ids, mask in prompt_batches(batch, 1, seed=40 + batch):
        runs = []
        for assistant in (None, drafter):
            cache = DynamicCache(config=target.config) if with_config else DynamicCache()
            config = {**GREEDY, **MODES[mode], "eos_token_id": [5, 7]}
            runs.append((*turns(assistant, target, cache, ids, mask, config, follow), cache))
        (plain, plain_state, plain_next, stock), (ours, our_state, our_next, filled) = runs
        assert torch.equal(ours.sequences, plain.sequences) and our_state == plain_state
        assert our_state[0] == plain.sequences.shape[1] - 1
        assert torch.equal(our_next.sequences, plain_next.sequences)
        assert ours[CACHE_NAME] is filled and isinstance(filled, DynamicCache)
        for mine, theirs in zip(filled, stock):
            torch.testing.assert_close(mine[:2], theirs[:2], atol=1e-4, rtol=1e-4)


def test_a_filled_cache_is_filled_without_return_dict_too():
    target, drafter = trained_pair()
    cache = DynamicCache()
    out = target.generate(PROMPT, assistant_model=drafter, **GREEDY, **{CACHE_NAME: cache})
    assert torch.is_tensor(out) and cache.get_seq_length() == out.shape[1] - 1


@pytest.mark.parametrize("mode", MODES)
def test_a_returned_cache_is_a_dynamic_cache(mode):
    target, drafter = trained_pair()
    for ids, mask in prompt_batches(2, 1, seed=3):
        out = generate_with(target, drafter, ids, mask, {**GREEDY, **MODES[mode]})
        cache = out[CACHE_NAME]
        assert isinstance(cache, DynamicCache) and len(cache) == len(list(cache)) == target.config.num_hidden_layers
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        assert cache.layers[0].keys.shape[:1] == (2,)
        cache.crop(-3)
        assert cache.get_seq_length() == out.sequences.shape[1] - 4
        rest = torch.cat((mask, torch.ones(2, 12, dtype=torch.long)), 1)
        for assistant in (None, drafter):  # the cropped cache with other ends
            other = torch.cat((out.sequences[:, :-3], torch.full((2, 3), 6)), 1)
            copied = copy.deepcopy(cache)
            again = generate_with(target, assistant, other, rest, GREEDY, **{CACHE_NAME: copied})
            assert torch.equal(again.sequences, generate_with(target, None, other, rest, GREEDY).sequences)


def test_the_drafters_side_follows_what_is_done_to_a_cache():
    target, drafter = trained_pair()
    first = generate_with(target, drafter, PROMPT, config=GREEDY)
    longer = torch.cat((first.sequences, torch.tensor([[4, 9, 2]])), 1)
    fresh = generate_with(target, drafter, longer, config=GREEDY)

    def continued(change, ids=longer):
        cache = copy.deepcopy(first[CACHE_NAME])
        change(cache)
        return generate_with(target, drafter, ids, config=GREEDY, **{CACHE_NAME: cache})

    kept = continued(lambda cache: None)
    assert kept.acceptance == fresh.acceptance and torch.equal(kept.sequences, fresh.sequences)
    assert torch.equal(continued(lambda cache: cache.crop(-2)).sequences, fresh.sequences)
    grown = continued(
        lambda cache: target(longer[:, cache.get_seq_length() : -1], use_cache=True, **{CACHE_NAME: cache})
    )
    assert torch.equal(grown.sequences, fresh.sequences)
    chosen = continued(lambda cache: cache.batch_repeat_interleave(2), longer.expand(2, -1))
    assert torch.equal(chosen.sequences, fresh.sequences.expand(2, -1))
    other = random_drafter(target, num_key_value_heads=1)  # another drafter knows nothing of it
    out = generate_with(target, other, longer, config=GREEDY, **{CACHE_NAME: copy.deepcopy(first[CACHE_NAME])})
    assert torch.equal(out.sequences, fresh.sequences)


class OtherLayer(DynamicLayer):
    pass


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (lambda c: StaticCache(config=c, max_cache_len=64), "StaticLayer"),
        (lambda c: DynamicCache(offloading=True), "offloading"),
        (lambda c: Cache(layer_class_to_replicate=OtherLayer), "OtherLayer"),
        (lambda c: Cache(layers=[OtherLayer() for _ in range(4)]), "OtherLayer"),
    ],
)
def test_caches_that_cannot_be_filled_are_refused(cache, message):
    target, drafter = trained_pair()
    with pytest.raises((ValueError, RuntimeError), match=message):
        generate_with(target, drafter, PROMPT, config=GREEDY, **{CACHE_NAME: cache(target.config)})


def test_a_cache_of_other_rows_is_refused():
    target, drafter = trained_pair()
    cache = DynamicCache()
    target(PROMPT[:, :2].expand(2, -1), **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="holds 2 rows and input_ids has 1"):
        generate_with(target, drafter, PROMPT, config=GREEDY, **{CACHE_NAME: cache})


def test_quantized_layers_are_no_dynamic_layers():
    from ppow.cache_ppow import cache_obstacle

    kind = type(
        "QuantizedOne", (QuantizedCache,), {"__init__": lambda self: Cache.__init__(self, layers=[OtherLayer()])}
    )
    assert "cannot be rolled back" in cache_obstacle(kind())
    assert "is a tuple" in cache_obstacle(((1, 2),))


# -- ids, masks, positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_integer_type(dtype):
    target, drafter = trained_pair()
    expected = generate_with(target, None, PROMPT, config=GREEDY).sequences
    found = generate_with(target, drafter, PROMPT.to(dtype), torch.ones_like(PROMPT), GREEDY).sequences
    assert torch.equal(found, expected) and found.dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (PROMPT.float(), "integers of shape"),
        (PROMPT + 1000, "token ids from 1003 to 1011, the target's embeddings know 0 to 47"),
        (-PROMPT, "token ids from -11"),
    ],
)
def test_ids_that_cannot_be_looked_up(ids, message):
    target, drafter = trained_pair()
    with pytest.raises(ValueError, match=message):
        generate_with(target, drafter, ids, torch.ones_like(PROMPT), GREEDY)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.float16, torch.uint8])
def test_masks_of_any_type(dtype):
    for ids, mask in prompt_batches(3, 1, seed=2):
        expected, _ = both(ids, mask)
        found = generate_with(*trained_pair(), ids, mask.to(dtype), GREEDY)
        assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 6), "attention_mask covers 6 tokens, input_ids has 4"),
        (torch.ones(1, 3), "attention_mask covers 3 tokens"),
        (torch.ones(1, 7).masked_fill(torch.arange(7) < 2, 0), "attention_mask covers 7 tokens"),
        (torch.tensor([[0, 1, 1, 2]]), "other values than 0"),
        (torch.tensor([[0.0, 0.5, 1.0, 1.0]]), "other values than 0"),
        (torch.tensor([[0, 0, 0, 0]]), "hides every token of a row"),
        (torch.tensor([[0, 1, 1, 1]] * 2), r"shape \(2, 4\), expected \(1, tokens\)"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    target, drafter = trained_pair()
    with pytest.raises(ValueError, match=message):
        generate_with(target, drafter, PROMPT, mask, GREEDY)


def test_masks_beside_a_cache():
    target, drafter = trained_pair()
    cache = DynamicCache()
    first = generate_with(target, drafter, PROMPT, config=GREEDY, **{CACHE_NAME: cache}).sequences
    new = torch.cat((first[:, -1:], torch.tensor([[4, 9]])), 1)
    whole = torch.cat((first, torch.tensor([[4, 9]])), 1)
    expected = generate_with(target, None, whole, config=GREEDY).sequences[:, whole.shape[1] :]
    part = generate_with(target, drafter, new, torch.ones_like(whole), GREEDY, **{CACHE_NAME: copy.deepcopy(cache)})
    assert torch.equal(part.sequences[:, new.shape[1] :], expected)
    with pytest.raises(ValueError, match=f"covers {whole.shape[1] + 2} tokens, input_ids has {new.shape[1]}"):
        mask = torch.ones(1, whole.shape[1] + 2)
        generate_with(target, drafter, new, mask, GREEDY, **{CACHE_NAME: copy.deepcopy(cache)})


def test_positions_are_the_callers():
    for given in (PROMPT * 0 + torch.arange(4) * 2, torch.arange(3, 7)[None].int(), torch.arange(4)[None]):
        expected, found = both(position_ids=given)
        assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.arange(3)[None], r"position_ids has shape \(1, 3\)"),
        (torch.arange(9)[None], r"position_ids has shape \(1, 9\)"),
        (torch.arange(4), r"position_ids has shape \(4,\)"),
        (torch.arange(4.0)[None], "expected integers"),
        (torch.arange(12).view(3, 1, 4), r"the same on every axis"),
    ],
)
def test_positions_that_do_not_fit(positions, message):
    target, drafter = trained_pair()
    with pytest.raises(ValueError, match=message):
        generate_with(target, drafter, PROMPT, config=GREEDY, position_ids=positions)


# -- processors, criteria, streamers: called as without a drafter ------------------------------------------------------


class Watcher(LogitsProcessor):
    """Remembers all that it is shown, and forbids each row's newest token and one more that follows from the count."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        scores = scores.clone()
        scores[torch.arange(len(scores)), input_ids[:, -1]] = -torch.inf
        scores[:, 1 + len(self.seen) % 40] = -torch.inf
        return scores


class Ender(StoppingCriteria):
    def __init__(self, bound):
        self.bound, self.seen = bound, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.tolist(), None if scores is None else [tuple(s.shape) for s in scores]))
        return input_ids.sum(1) > self.bound


class Sink:
    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended += 1


ENDS = {
    "length": {},
    "eos": {"eos_token_id": EOS, "max_new_tokens": 40},
    "scores": {"eos_token_id": EOS, "output_scores": True, "max_new_tokens": 20},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fast", [False, True])
def test_users_code_is_called_as_without_a_drafter(mode, ends, batch, fast, anywhere):
    target, drafter = trained_pair()
    for ids, mask in prompt_batches(batch, 1, seed=20 + batch):
        for with_processor, with_criterion in ((True, False), (fast, True)):
            runs = []
            for assistant in (None, drafter):
                watcher, ender, sink = Watcher(), Ender(int(ids.sum(1).max()) + 250), Sink()
                config = {**GREEDY, **ENDS[ends], **MODES[mode], "cuda_graphs": fast}
                out = generate_with(
                    target,
                    assistant,
                    ids,
                    mask,
                    config,
                    logits_processor=[watcher] if with_processor else [],
                    stopping_criteria=[ender] if with_criterion else [],
                    streamer=sink,
                )
                runs.append((out.sequences.tolist(), watcher.seen, ender.seen, sink.pieces, sink.ended))
            for stock, ours in zip(*runs):
                assert ours == stock


def test_stateless_processors_let_rows_go_at_their_own_speed():
    target, drafter = trained_pair()
    ids, mask = next(prompt_batches(4, 1, seed=9))
    config = {**GREEDY, **CHAIN, "max_new_tokens": 30, "repetition_penalty": 1.05}
    out = generate_with(target, drafter, ids, mask, config)
    assert len({len(row) for row in out.acceptance.gained}) > 1
    watched = generate_with(target, drafter, ids, mask, config, logits_processor=[Watcher()])
    assert len({tuple(row) for row in watched.acceptance.gained}) == 1  # side by side


def test_sampling_side_by_side_is_reproducible_and_within_the_processors_limits():
    class Even(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -torch.inf)

    target, drafter = trained_pair()
    ids, mask = next(prompt_batches(3, 1, seed=9))
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        config = {**GREEDY, **CHAIN, "do_sample": True}
        runs.append(generate_with(target, drafter, ids, mask, config, logits_processor=[Even()]).sequences)
    assert torch.equal(*runs) and not (runs[0][:, ids.shape[1] :] % 2).any()


def test_what_a_stop_cut_off_was_neither_accepted_nor_rejected():
    # windows of 3: all accepted; two accepted, then rejected; a stop behind the first token; a stop behind the second
    figures = Acceptance([[3, 3, 3, 3]], [[3, 2, 1, 1]], [[4, 3, 1, 2]], [[3, 2, 3, 1]])
    assert figures.per_position() == [1.0, 2 / 3, 1 / 2]
    assert figures.acceptance_length == 10 / 4
    assert figures.engine_acceptance_length == 1 + 9 / 4  # engines count what was accepted behind the end


@pytest.mark.parametrize("fast", [False, True])
def test_drafts_behind_the_end_are_no_rejections(fast, anywhere):
    """On this cycle the pair drafts perfectly, so any rejection would be one behind the end."""
    target, drafter = trained_pair()
    free = generate_with(target, drafter, PROMPT, config={**GREEDY, **CHAIN, "max_new_tokens": 60})
    drafted, accepted, gained, verified = (row[0] for row in vars(free.acceptance).values())
    assert verified[:-1] == accepted[:-1]
    assert free.acceptance.engine_acceptance_length == 1 + sum(verified) / len(gained)
    at = next(i for i, (d, a) in enumerate(zip(drafted, accepted)) if i and a == d == 4)
    start = PROMPT.shape[1] + 1 + sum(gained[:at])
    for length in range(start + 1, start + 5):
        config = {**GREEDY, **CHAIN, "max_new_tokens": length - PROMPT.shape[1], "cuda_graphs": fast}
        cut = generate_with(target, drafter, PROMPT, config=config).acceptance
        assert cut.gained[0][-1] == length - start and cut.accepted[0][-1] <= cut.gained[0][-1]
        assert cut.accepted[0][-1] <= cut.verified[0][-1] <= cut.drafted[0][-1]
        last = Acceptance(*([row[0][-1:]] for row in (cut.drafted, cut.accepted, cut.gained)))
        assert all(rate == 1.0 for rate in last.per_position())


# -- entrances ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafter")
    trained_pair()[1].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_a_saved_drafter_loads_by_either_class_and_again_after_saving(auto, saved, tmp_path):
    target, drafter = trained_pair()
    expected = generate_with(target, drafter, PROMPT, config=GREEDY)
    loaded = auto.from_pretrained(saved, trust_remote_code=True, dtype=drafter.dtype)
    loaded.save_pretrained(tmp_path)
    for again in (loaded, *(each.from_pretrained(tmp_path, trust_remote_code=True, dtype=drafter.dtype)
                            for each in (AutoModel, AutoModelForCausalLM))):  # fmt: skip
        out = generate_with(target, again, PROMPT, config=GREEDY)
        assert (
            torch.equal(out.sequences, expected.sequences) and out.acceptance.accepted == expected.acceptance.accepted
        )
    assert sorted(file.name for file in (saved / "custom_generate").iterdir()) == ["entrances_ppow.py", "generate.py"]


@pytest.mark.parametrize(
    "config",
    [{"num_beams": 2}, {"num_return_sequences": 2}, {"num_beams": 2, "do_sample": True}, {"use_cache": False},
     {"guidance_scale": 1.5}, {"output_attentions": True}, {"stop_strings": ["a"]}],
    ids=str,
)  # fmt: skip
def test_all_entrances_check_the_same(config, saved):
    target, drafter = trained_pair()
    arguments = {"attention_mask": torch.ones_like(PROMPT), **GREEDY, **config}
    repository = {"custom_generate": str(saved), "trust_remote_code": True}
    entrances = [
        lambda: target.generate(PROMPT, assistant_model=drafter, **arguments),
        lambda: target.generate(PROMPT, assistant_model=drafter, **arguments, **repository),
        lambda: generate(target, assistant_model=drafter, inputs=PROMPT, **arguments),
    ]
    found = []
    for entrance in entrances:
        torch.manual_seed(0)
        try:
            found.append(entrance().tolist())
        except ValueError as error:
            found.append(str(error))
    assert found[0] == found[1] == found[2]
    assert isinstance(found[0], str) or "num_beams" in config


def test_draft_options_through_custom_generate_are_this_calls_only(saved):
    target, drafter = trained_pair()
    entrance = {"custom_generate": str(saved), "trust_remote_code": True, "assistant_model": drafter}
    own = GenerationConfig(**GREEDY, return_dict_in_generate=True, window_size=4)
    out = target.generate(PROMPT, generation_config=own, window_size=2, **entrance)
    assert deepest(out) == 2 and own.window_size == 4
    assert deepest(target.generate(PROMPT, generation_config=own, **entrance)) == 4


@pytest.mark.parametrize("compile_", [lambda d: torch.compile(d, backend="eager"), lambda d: d.compile() or d])
def test_a_compiled_drafter(compile_, saved):
    target, drafter = trained_pair()
    expected = generate_with(target, drafter, PROMPT, config=GREEDY)
    compiled = compile_(copy.deepcopy(drafter))
    for entrance in ({}, {"custom_generate": str(saved), "trust_remote_code": True}):
        out = generate_with(target, compiled, PROMPT, config=GREEDY, **entrance)
        assert torch.equal(out.sequences, expected.sequences) and out.acceptance == expected.acceptance


# -- attention, modalities, places, modes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flex_attention", "paged|sdpa", "paged|flash_attention_2", "my_attention"])
def test_attention_is_a_list_of_what_is_allowed(name):
    target = build_target()
    target.config._attn_implementation_internal = name
    with pytest.raises(ValueError, match="is not known to take the masks of windows"):
        generate_with(target, random_drafter(target), PROMPT, config=GREEDY)


def llava():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"}
    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=60))


def gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60)
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [llava, gemma3])
def test_text_for_image_text_classes(build):
    torch.manual_seed(0)
    target = build().eval()
    drafter = PPOWDrafter(PPOWConfig.from_target(target.config)).eval()
    ids, mask = torch.tensor([[0, 5, 6, 7], [3, 4, 8, 9]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    kinds = {name: torch.zeros_like(ids) for name in ("token_type_ids",) if build is gemma3}
    for config in ({**GREEDY, **CHAIN}, {**GREEDY, **TREE}):
        expected, found = both(ids, mask, config, (target, drafter), **kinds)
        assert torch.equal(found.sequences, expected.sequences)
    with pytest.raises(ValueError, match="cannot honour .*(pixel_values|mm_encoder_outputs)"):
        generate_with(target, drafter, ids, mask, GREEDY, pixel_values=torch.zeros(1, 3, 28, 28))
    if kinds:
        with pytest.raises(ValueError, match="cannot honour token_type_ids"):
            generate_with(target, drafter, ids, mask, GREEDY, token_type_ids=torch.ones_like(ids))


def test_zero_is_not_nothing_where_it_names_a_token():
    """GPT-2 adds the embedding of token_type_ids, token 0 included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    target = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=4, n_head=4, eos_token_id=None)).eval()
    drafter = PPOWDrafter(PPOWConfig.from_target(target.config)).eval()
    with pytest.raises(ValueError, match="cannot honour token_type_ids"):
        generate_with(target, drafter, PROMPT, config=GREEDY, token_type_ids=torch.zeros_like(PROMPT))


@pytest.mark.parametrize("how", ["offloaded", "on disk", "spread"])
def test_a_target_whose_weights_accelerate_brings(how, tmp_path):
    import accelerate

    target, drafter = copy.deepcopy(trained_pair()[0]), trained_pair()[1]
    expected = generate_with(target, None, PROMPT, config=GREEDY).sequences
    if how == "offloaded":
        accelerate.cpu_offload(target, execution_device=torch.device("cpu"))
    elif how == "on disk":
        accelerate.disk_offload(target, tmp_path, execution_device=torch.device("cpu"))
    else:  # as device_map="auto" does where a GPU is full
        target.save_pretrained(tmp_path)
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
        places |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
        target = type(target).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert any(parameter.device.type == "meta" for parameter in target.parameters())
    for mode in (CHAIN, TREE):
        assert torch.equal(generate_with(target, drafter, PROMPT, config={**GREEDY, **mode}).sequences, expected)


def test_weights_that_are_nowhere_and_models_that_do_not_meet():
    target, drafter = trained_pair()
    with pytest.raises(ValueError, match="drafter's weights are not loaded"):
        generate_with(target, copy.deepcopy(drafter).to("meta"), PROMPT, config=GREEDY)
    with pytest.raises(ValueError, match="target's weights are not loaded"):
        generate(copy.deepcopy(target).to("meta"), drafter, inputs=PROMPT, **GREEDY)


def test_grad_modes_mix():
    """What one call leaves behind, in its caches and in the drafter, serves the next in any mode."""
    target, drafter = trained_pair()
    drafter = copy.deepcopy(drafter)
    expected = generate_with(target, None, PROMPT, config=GREEDY).sequences
    longer = torch.cat((expected, torch.tensor([[4, 9]])), 1)
    further = generate_with(target, None, longer, config=GREEDY).sequences
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad]
    for first in modes:
        for second in modes:
            cache = DynamicCache()
            with first():
                out = generate_with(target, drafter, PROMPT.clone(), config=GREEDY, **{CACHE_NAME: cache})
                assert torch.is_grad_enabled() == (first is torch.enable_grad)
            with second():
                again = generate_with(target, drafter, longer.clone(), config=GREEDY, **{CACHE_NAME: cache})
            assert torch.equal(out.sequences, expected) and torch.equal(again.sequences, further)
            assert not out.sequences.requires_grad


def test_the_fast_path_serves_every_grad_mode(anywhere):
    target, drafter = (copy.deepcopy(model) for model in trained_pair())
    config = {**GREEDY, **CHAIN, "cuda_graphs": True}
    expected = generate_with(target, None, PROMPT, config=GREEDY).sequences
    for mode in (torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(generate_with(target, drafter, PROMPT.clone(), config=config).sequences, expected)


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def restless():
    """Threads change every few steps, so that what they share is met in every state."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("graphs", [None, True, False])
def test_calls_at_once_are_each_right_and_leave_nothing_changed(graphs, anywhere, restless):
    target, drafter = (copy.deepcopy(model) for model in trained_pair())
    settings = torch.backends.cuda.cudnn_sdp_enabled(), torch._dynamo.config.recompile_limit
    prompts = [torch.tensor([[7, 3, 11, 5 + k]]) for k in range(4)]
    expected = [generate_with(target, None, ids, config=GREEDY).sequences for ids in prompts]

    def call(k):  # plain calls and calls with other windows among them
        which = k % 4
        assistant, mode = (None, {}) if k % 6 == 5 else (drafter, TREE if k % 3 else CHAIN)
        config = {**GREEDY, **mode, **({} if graphs is None else {"cuda_graphs": graphs})}
        return torch.equal(generate_with(target, assistant, prompts[which], config=config).sequences, expected[which])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(24)))
    assert (torch.backends.cuda.cudnn_sdp_enabled(), torch._dynamo.config.recompile_limit) == settings
    assert not any(module._forward_pre_hooks for module in target.modules())
    assert target.config._attn_implementation == "sdpa"
    assert all(type(module) is not recording_ppow.PartOfProduct for module in target.modules())


def test_a_call_within_a_call_takes_the_plain_path_or_is_refused(anywhere):
    target, drafter = (copy.deepcopy(model) for model in trained_pair())
    inner = []

    class Asks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if not inner:
                inner.append(generate_with(target, drafter, PROMPT, config={**GREEDY, **CHAIN}).sequences)
                with pytest.raises(ValueError, match="another call is using"):
                    generate_with(target, drafter, PROMPT, config={**GREEDY, **CHAIN, "cuda_graphs": True})
            return torch.zeros(len(input_ids), dtype=torch.bool)

    config = {**GREEDY, **CHAIN, "cuda_graphs": True}
    outer = generate_with(target, drafter, PROMPT, config=config, stopping_criteria=[Asks()]).sequences
    assert torch.equal(outer, inner[0])
    assert torch.equal(generate_with(target, drafter, PROMPT, config=config).sequences, outer)  # the claim was freed


def test_a_call_that_fails_frees_what_it_held(anywhere):
    target, drafter = (copy.deepcopy(model) for model in trained_pair())
    before = torch.backends.cuda.cudnn_sdp_enabled()

    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyError("mine")

    config = {**GREEDY, **CHAIN, "cuda_graphs": True}
    with pytest.raises(KeyError, match="mine"):
        generate_with(target, drafter, PROMPT, config=config, logits_processor=[Fails()])
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    generate_with(target, drafter, PROMPT, config=config)


def test_the_switch_of_cudnn_is_put_back_by_the_last():
    switch = torch.backends.cuda
    for before in (True, False):
        switch.enable_cudnn_sdp(before)
        first, second = without_cudnn_attention(), without_cudnn_attention()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not switch.cudnn_sdp_enabled()
        second.__exit__(None, None, None)
        assert switch.cudnn_sdp_enabled() == before
    switch.enable_cudnn_sdp(True)


def test_recordings_go_on_alone(restless):
    gate, working, recording, faults = Gate(), [0], [0], []

    def work(k):
        for i in range(30):
            with gate.shared():
                working[0] += 1
                if recording[0]:
                    faults.append("work beside a recording")
                if (k + i) % 5 == 0:
                    with gate.exclusive():  # gives others a turn, then is alone
                        recording[0] += 1
                        if recording[0] != 1:
                            faults.append("two recordings")
                        with gate.shared(), gate.exclusive():
                            pass
                        recording[0] -= 1
                working[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert not faults and not gate.inside and gate.alone is None
