"""The decoding loop and the training stages on a CUDA device: run with ``pytest -m gpu``."""

import copy
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from attention_cases import SHAPES, attention_cases
from decoding_helpers import (
    MODES,
    PAD,
    VOCAB,
    build_target,
    generate_with,
    prompt_batches,
    random_drafter,
    sharing_pair,
    trained_block,
    trained_pair,
)
from fused_cases import (
    check_cold_draws,
    check_draws,
    check_edge_of_equals,
    check_likeliest,
    check_models,
    check_refusals,
    check_streaming,
    check_strides,
    check_twins,
    check_verifying,
    check_writing,
)
from ppow import pair_ppow, streamed_ppow
from ppow.cache_ppow import CACHE_NAME
from ppow.drafting_ppow import DraftWindow, call_config
from ppow.lossless_ppow import first_difference, without_drafts
from ppow.probe_ppow import check_target
from ppow.recording_ppow import Replay
from ppow.training.data import Batch
from ppow.training.supervised import block_step
from ppow.training.target import FrozenTarget
from ppow.transcript_ppow import Acceptance
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
            out = generate_with(target, drafter, ids, mask, config)
            torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    assert out.acceptance.acceptance_length > 1.3


KINDS = {
    "markov": lambda: trained_block(markov_rank=4),
    "dflash": lambda: trained_block(predict_from_anchor=False),
    "block, own vocabulary": lambda: trained_block(draft_vocab_size=36),
    "EAGLE-3, the target's head": sharing_pair,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_of_other_drafters_makes_the_same_tokens(kind, mode):
    target, drafter = (copy.deepcopy(model).to("cuda", torch.float32) for model in KINDS[kind]())
    for batch in (1, 4):
        for ids, mask in prompt_batches(batch, 4, seed=batch):
            ids, mask = ids.cuda(), mask.cuda()
            expected = target.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=PAD)
            config = {**MODES[mode], "max_new_tokens": 24, "cuda_graphs": True}
            out = generate_with(target, drafter, ids, mask, config)
            torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    assert out.acceptance.acceptance_length > 1.1
    with torch.no_grad():  # graphs read a borrowed head's rows from a copy
        target.get_output_embeddings().weight.copy_(target.get_output_embeddings().weight.roll(1, 0))
    found, anew = (generate_with(target, each, ids, mask, config) for each in (drafter, copy.deepcopy(drafter)))
    assert found.acceptance.accepted == anew.acceptance.accepted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_drafter_learns_the_same_whether_the_comparison_is_compiled_or_not(dtype):
    target, drafter = (copy.deepcopy(model).to("cuda", torch.float32) for model in trained_block(markov_rank=4))
    drafter.requires_grad_(True)
    frozen = FrozenTarget(target.to(dtype), drafter.config.target_taps)
    ids = torch.randint(1, 48, (8, 40), device="cuda")
    batch = Batch(ids, torch.ones_like(ids).bool(), torch.full((8,), 40), seed=0)
    found = []
    for fused in (False, True):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, metrics = block_step(frozen, drafter, batch, 0.8, anchors=16, fused=fused)
        found.append((loss, metrics["step_losses"], *torch.autograd.grad(loss, list(drafter.layers.parameters()))))
    for eager, compiled in zip(*found):
        torch.testing.assert_close(eager, compiled, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


@pytest.mark.parametrize("path", ["plain", "fast"])
@pytest.mark.parametrize("schedule", ["cost", "gammatune", "heuristic"])
def test_schedules_make_the_same_tokens(schedule, path):
    target, drafter = (copy.deepcopy(model).to("cuda", torch.float32) for model in trained_pair())
    lengths = set()
    for batch in (1, 4):
        for ids, mask in prompt_batches(batch, 4, seed=batch):
            ids, mask = ids.cuda(), mask.cuda()
            expected = target.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
            config = {"window_size": 8, "window_schedule": schedule, "max_new_tokens": 60}
            out = generate_with(target, drafter, ids, mask, {**config, "cuda_graphs": path == "fast"})
            torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
            lengths |= {drafts for row in out.acceptance.drafted for drafts in row}
    assert len(lengths) > 1 and (path == "plain" or lengths <= {2, 4, 6, 8})
    if path == "fast":
        paths = drafter._fast_paths.by_batch.values()
        recorded = {name[1] for path in paths for name in path.replay.graphs if name[0] == "cycle"}
        assert recorded <= {2, 4, 6, 8} and len(recorded) > 1


@pytest.mark.parametrize("schedule", ["cost", "gammatune"])
def test_schedules_sample_from_the_targets_distribution_on_the_fast_path(schedule):
    """Rows of one text: their lengths are chosen together, and follow what was accepted in earlier windows."""
    target, drafter = (copy.deepcopy(model).to("cuda", torch.float32) for model in trained_pair())
    rows, ids = 512, torch.arange(1, 9, device="cuda")[None]
    counts = torch.zeros(2, target.config.vocab_size, device="cuda")
    for seed in range(24):
        for which, assistant in enumerate((None, drafter)):
            torch.manual_seed(seed + 1000 * which)
            config = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "cuda_graphs": True}
            config |= {"window_size": 6, "window_schedule": schedule}
            out = generate_with(target, assistant, ids.expand(rows, -1), config=config).sequences
            counts[which].index_add_(0, out[:, -1], torch.ones(rows, device="cuda"))
    seen = counts.sum(0) >= 20
    expected = counts.sum(0)[seen] / 2
    statistic, freedom = ((counts[:, seen] - expected) ** 2 / expected).sum(), int(seen.sum()) - 1
    assert freedom > 5
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


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


@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_p": 0.8}], ids=["all", "top_k", "top_p"])
@pytest.mark.parametrize("mode", MODES)
def test_the_fast_path_samples_from_the_targets_distribution(mode, filters):
    target, drafter = (copy.deepcopy(model).to("cuda", torch.float32) for model in trained_pair())
    rows, length = 512, 2
    ids = torch.arange(1, 9, device="cuda")[None].expand(rows, -1)
    counts = torch.zeros(2, target.config.vocab_size**length, device="cuda")
    for round_ in range(24):
        for which, assistant in enumerate((None, drafter)):
            torch.manual_seed(round_ + 1000 * which)
            config = {"max_new_tokens": length + 1, "do_sample": True, "temperature": 0.8, "cuda_graphs": True}
            out = generate_with(target, assistant, ids, config={**config, **MODES[mode], **filters}).sequences[:, 8:]
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
    """A pair in bfloat16, whose drafter drafts well."""
    return tuple(copy.deepcopy(model).to("cuda", torch.bfloat16) for model in trained_pair())


def test_long_prompts_and_answers_in_batches_of_all_sizes_leave_no_more_memory_and_record_nothing_again(monkeypatch):
    """16k tokens of a prompt, 4k of an answer, batches of 1 to 8 in turn, one process: after one round all is there."""
    target = build_target(max_position_embeddings=32768).to("cuda", torch.bfloat16)
    drafter = random_drafter(target).to("cuda", torch.bfloat16)
    recorded, states = [], []
    capture = Replay._capture
    monkeypatch.setattr(Replay, "_capture", lambda self, *functions: recorded.append(1) or capture(self, *functions))
    for _ in range(3):
        for batch in (8, 1, 4, 2):
            for length, new in ((16384, 4096), (100, 64)):
                ids = torch.randint(
                    1, VOCAB, (batch, length), device="cuda", generator=torch.Generator("cuda").manual_seed(batch)
                )
                out = generate_with(target, drafter, ids, config={**FAST, **MODES["chain"], "max_new_tokens": new})
                assert out.sequences.shape == (batch, length + new) and out.drafting.cuda_graphs
                del out
        torch.cuda.synchronize()
        states.append((len(recorded), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    first, second, third = states
    assert first[:2] == second[:2] == third[:2]  # graphs, bytes in use
    assert third[2] <= second[2]  # what torch's allocator keeps: beside all buffers a prompt's parts lie otherwise


@pytest.mark.parametrize("mode", MODES)
def test_in_bfloat16_what_differs_is_a_near_tie_and_the_reference_agrees_token_for_token(mode, low_precision_pair):
    target, drafter = low_precision_pair
    options = {**MODES[mode], "cuda_graphs": True}
    config = call_config(target.generation_config, do_sample=False, max_new_tokens=48, pad_token_id=PAD, **options)
    lengths = []
    for ids, _ in prompt_batches(1, 24, seed=5):
        ids = ids.cuda()
        stock = target.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist()
        out = generate_with(target, drafter, ids, config={**options, "max_new_tokens": 48})
        answer = out.sequences[0, ids.shape[1] :].tolist()
        reference, ran = without_drafts(target, drafter, ids, config)
        assert ran.repeats_exactly == (mode == "chain")
        parted = first_difference(target, ids, answer, reference, config, exact=ran.repeats_exactly)
        assert ran.cuda_graphs and (parted is None or parted.verdict == "near tie"), parted
        difference = first_difference(target, ids, answer, stock, config)
        assert difference is None or difference.verdict == "near tie", difference
        lengths.append(out.acceptance.acceptance_length)
    assert max(lengths) > 1.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_fused_modules_compute_what_they_stand_for(dtype, tolerance):
    check_strides("cuda", dtype)
    check_models("cuda", dtype, tolerance)
    check_twins("cuda", dtype, tolerance)
    check_writing("cuda", dtype)
    check_refusals("cuda", dtype)
    check_likeliest("cuda")


def test_draws_by_kernels_are_those_of_torch():
    check_draws("cuda", 1e-4)
    check_verifying("cuda")
    check_cold_draws("cuda")
    check_edge_of_equals("cuda")


def test_training_reads_a_target_by_fused_kernels():
    target, ids = build_target().float(), torch.randint(1, VOCAB, (3, 40), device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        target.save_pretrained(folder)
        frozen = FrozenTarget.load(folder, "float32", "cuda")
    frozen.taps = [1, 2]
    assert type(frozen.model.model.norm) is not type(target.model.norm)
    found, expected = frozen.read(ids), FrozenTarget(target.cuda(), [1, 2]).read(ids)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.taps, expected.taps, rtol=1e-3, atol=1e-4)


def test_a_drafter_in_eight_bits_drafts_nearly_the_same_and_the_text_stays_the_targets(monkeypatch):
    check_streaming("cuda", torch.bfloat16)
    ids, lengths = torch.arange(1, 9, device="cuda")[None], []
    for fewest in (0, 1 << 30):  # all weights of the drafter, or none
        monkeypatch.setattr(streamed_ppow, "FEWEST_WEIGHTS", fewest)
        target, drafter = (copy.deepcopy(model).to("cuda", torch.bfloat16) for model in trained_pair())
        for mode in MODES.values():
            config = call_config(target.generation_config, **FAST, **mode, return_dict_in_generate=True)
            out = target.generate(ids, generation_config=config, assistant_model=drafter)
            assert bool(drafter._fast_paths.twins.drafter.streamed) is (fewest == 0)
            assert out.sequences[0, ids.shape[1] :].tolist() == without_drafts(target, drafter, ids, config)[0]
            lengths.append(out.acceptance.acceptance_length)
    half = len(lengths) // 2
    assert sum(lengths[:half]) > 0.9 * sum(lengths[half:])
    monkeypatch.setattr(streamed_ppow, "FEWEST_WEIGHTS", 0)
    drafter._fast_paths.forget()
    paths = []
    for change in (1, 1, -1):  # in place: graphs read the weight itself, copies would stay behind
        drafter.lm_head.weight.data.mul_(change)
        generate_with(target, drafter, ids, config={**FAST, **MODES["chain"]})
        paths.append(drafter._fast_paths.by_batch[1])
    assert paths[0] is paths[1] is not paths[2]


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_cycle_as_one_graph_is_the_cycle_of_its_parts(mode, sampling, monkeypatch):
    """Greedy the same tokens and windows; sampled, the same seed gives the same text again whenever it was recorded."""
    target, drafter = (copy.deepcopy(model).to("cuda", torch.float32) for model in trained_pair())
    texts = {}
    for whole in (True, False):
        monkeypatch.setattr(pair_ppow.Pair, "whole_cycles", whole)
        for ids, mask in (*prompt_batches(1, 3, seed=7), *prompt_batches(3, 3, seed=8)):
            ids, mask = ids.cuda(), mask.cuda()
            config = {**MODES[mode], "max_new_tokens": 60, "eos_token_id": [5, 7], "cuda_graphs": True}
            config |= {"do_sample": True, "temperature": 0.8, "top_k": 12} if sampling else {}
            for _ in range(2):
                torch.manual_seed(3)
                out = generate_with(target, drafter, ids, mask, config)
                graphs = drafter._fast_paths.by_batch[len(ids)].replay.graphs
                assert any(name[0] == "cycle" for name in graphs) or not whole
                texts.setdefault((whole, tuple(ids.flatten().tolist())), []).append(
                    (out.sequences.tolist(), out.acceptance.accepted)
                )
    for (whole, prompt), (first, again) in texts.items():
        assert first == again
        assert sampling or whole or first == texts[True, prompt][0]


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
            patch.setattr(pair_ppow, "draft", Told(reference))
            patch.setattr(pair_ppow.Pair, "whole_cycles", False)  # one graph would draft the same window for ever
            out = generate_with(target, drafter, ids, config=options)
        assert out.sequences[0, length:].tolist() == reference
        assert out.acceptance.acceptance_length > 10


# -- what generate() promises of its arguments, on the fast path -------------------------------------------------------

FAST = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": PAD, "cuda_graphs": True}


def on_gpu(family="llama"):
    return (copy.deepcopy(model).to("cuda", torch.float32) for model in trained_pair(family))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_is_filled_in_place(family, mode):
    """Buffers of graphs stay behind: the cache of a call survives later calls, and serves turns with and without."""
    target, drafter = on_gpu(family)
    for batch in (1, 3):
        ids, mask = (tensor.cuda() for tensor in next(prompt_batches(batch, 1, seed=30 + batch)))
        ends = {"eos_token_id": [5, 7]} if batch > 1 else {}
        caches, outs = [], []
        for assistant in (None, drafter):
            caches.append(DynamicCache(config=target.config))
            config = {**FAST, **MODES[mode], **ends}
            outs.append(generate_with(target, assistant, ids, mask, config, **{CACHE_NAME: caches[-1]}))
        generate_with(target, drafter, ids.flip(1), mask * 0 + 1, {**FAST, **MODES[mode]})  # the buffers are used again
        assert torch.equal(outs[0].sequences, outs[1].sequences) and outs[1][CACHE_NAME] is caches[1]
        assert caches[1].get_seq_length() == caches[0].get_seq_length() == outs[1].sequences.shape[1] - 1
        for mine, theirs in zip(caches[1], caches[0]):
            torch.testing.assert_close(mine[:2], theirs[:2], atol=1e-3, rtol=1e-3)
        longer = torch.cat((outs[0].sequences, ids.new_tensor([[4, 9, 2]]).expand(batch, -1)), 1)
        rest = torch.cat((mask, mask.new_ones(batch, longer.shape[1] - mask.shape[1])), 1)
        config = {**FAST, **MODES[mode], "cuda_graphs": False}
        fresh = generate_with(target, None, longer, rest, config).sequences if batch == 1 else None
        turns = [
            generate_with(target, assistant, longer, rest, config, **{CACHE_NAME: copy.deepcopy(caches[1])}).sequences
            for assistant in (None, drafter)
        ]
        assert torch.equal(*turns) and (fresh is None or torch.equal(turns[0], fresh))


@pytest.mark.parametrize("sampling", [False, True])
def test_calls_at_once_are_each_right(sampling):
    """Some find the graphs taken and go the plain path, some wait, some run without a drafter while others record."""
    target, drafter = on_gpu()
    setting = torch.backends.cuda.cudnn_sdp_enabled()
    prompts = [torch.tensor([[7, 3, 11, 5 + k]], device="cuda") for k in range(4)]
    greedy = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": PAD}
    expected = [generate_with(target, None, ids, config=greedy).sequences for ids in prompts]
    start = threading.Barrier(4)

    def call(k):
        if k < 4:
            start.wait()
        if k % 6 == 5:
            return torch.equal(generate_with(target, None, prompts[k % 4], config=greedy).sequences, expected[k % 4])
        config = {**greedy, **MODES["tree" if k % 3 else "chain"]}
        config |= {"cuda_graphs": True} if k % 2 else {}
        if sampling and k % 4 == 1:  # draws while others record; never more than one way to sample at temperature 0.01
            config |= {"do_sample": True, "temperature": 0.01}
            return generate_with(target, drafter, prompts[k % 4], config=config).sequences.shape[1] == 28
        return torch.equal(generate_with(target, drafter, prompts[k % 4], config=config).sequences, expected[k % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(24)))
    assert torch.backends.cuda.cudnn_sdp_enabled() == setting
    assert target.config._attn_implementation == "sdpa"
    out = generate_with(target, drafter, prompts[0], config={**FAST, **MODES["chain"]})
    assert torch.equal(out.sequences, expected[0])


def test_calls_on_streams_of_their_own_share_the_buffers():
    target, drafter = on_gpu()
    ids = torch.arange(1, 9, device="cuda")[None]
    expected = generate_with(target, None, ids, config=FAST).sequences
    for _ in range(6):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert torch.equal(
                generate_with(target, drafter, ids, config={**FAST, **MODES["tree"]}).sequences, expected
            )


class Watcher(LogitsProcessor):
    """Remembers all that it is shown, and forbids each row's newest token."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class Ender(StoppingCriteria):
    def __init__(self, bound):
        self.bound, self.seen = bound, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        return input_ids.sum(1) > self.bound


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("place", ["cuda", "cpu"])  # of the ids: processors and output stay where they are
def test_users_code_is_called_as_without_a_drafter(mode, batch, place):
    target, drafter = on_gpu()
    for ids, mask in prompt_batches(batch, 3, seed=20 + batch):
        for ends in ({}, {"eos_token_id": [9, 20, 31, 4, 5], "max_new_tokens": 40}):
            runs = []
            for assistant in (None, drafter):
                watcher, ender = Watcher(), Ender(int(ids.sum(1).max()) + 350)
                given = {"logits_processor": [watcher], "stopping_criteria": [ender]}
                where = "cuda" if assistant is None else place  # old versions of transformers do not move ids
                config = {**FAST, **MODES[mode], **ends}
                out = generate_with(target, assistant, ids.to(where), mask.to(where), config, **given)
                assert out.sequences.device.type == where
                runs.append((out.sequences.tolist(), watcher.seen, ender.seen))
            assert runs[0] == runs[1]


@pytest.mark.parametrize("mode", MODES)
def test_every_stop_position_and_the_figures_up_to_it(mode):
    """Whole windows are drafted though less room is left: what lies behind the end counts for nothing."""
    target, drafter = on_gpu()
    ids = torch.tensor([[7, 3, 11, 5]], device="cuda")
    free = generate_with(target, None, ids, config=FAST).sequences
    for new in range(1, 20):
        for stop in ({"max_new_tokens": new}, {"eos_token_id": int(free[0, 3 + new])}):
            config = {**FAST, **MODES[mode], **stop}
            expected = generate_with(target, None, ids, config=config).sequences
            out = generate_with(target, drafter, ids, config=config)
            assert torch.equal(out.sequences, expected)
            figures = out.acceptance
            assert sum(figures.gained[0]) == out.sequences.shape[1] - ids.shape[1] - 1
            assert all(a <= g for a, g in zip(figures.accepted[0], figures.gained[0]))
            if figures.gained[0] and figures.accepted[0][-1] == figures.gained[0][-1]:  # cut
                last = Acceptance(*([row[0][-1:]] for row in (figures.drafted, figures.accepted, figures.gained)))
                assert set(last.per_position()) == {1.0}


def test_grad_modes_mix_on_the_fast_path():
    target, drafter = on_gpu()
    ids = torch.arange(1, 9, device="cuda")[None]
    expected = generate_with(target, None, ids, config=FAST).sequences
    for mode in (torch.inference_mode, torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            out = generate_with(target, drafter, ids.clone(), config={**FAST, **MODES["chain"]})
            assert torch.equal(out.sequences, expected)


several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is always the current one")


@several
@pytest.mark.parametrize("path", ["plain", "fast"])
def test_a_pair_on_another_gpu_than_the_current_one(path):
    target, drafter = (model.to("cuda:1") for model in on_gpu())
    ids = torch.arange(1, 9, device="cuda:1")[None]
    expected = generate_with(target, None, ids, config=FAST).sequences
    for mode in MODES.values():
        for sampling in ({}, {"do_sample": True, "temperature": 0.01}):
            config = {**FAST, **mode, **sampling, "cuda_graphs": path == "fast"}
            assert torch.equal(generate_with(target, drafter, ids, config=config).sequences, expected)
    assert torch.cuda.current_device() == 0


@several
@pytest.mark.parametrize("mode", MODES)
def test_a_target_spread_over_two_gpus(mode):
    import accelerate

    target, drafter = on_gpu()
    ids = torch.arange(1, 9, device="cuda")[None]
    plain = {**FAST, "cuda_graphs": None}
    expected = generate_with(target, None, ids, config=plain).sequences
    second = {"model.layers.2", "model.layers.3", "model.norm", "lm_head"}
    first = {"model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1"}
    accelerate.dispatch_model(target, dict.fromkeys(first, 0) | dict.fromkeys(second, 1))
    assert torch.equal(generate_with(target, drafter, ids, config={**plain, **MODES[mode]}).sequences, expected)


def test_models_that_do_not_meet_are_refused():
    target, drafter = on_gpu()
    with pytest.raises(ValueError, match="The drafter is on cpu, the target takes its inputs on cuda:0"):
        generate_with(target, drafter.to("cpu"), torch.arange(1, 9)[None], config={"max_new_tokens": 4})


def test_a_target_that_accelerate_brings_to_the_gpu():
    import accelerate

    target, drafter = on_gpu()
    ids = torch.arange(1, 9, device="cuda")[None]
    plain = {**FAST, "cuda_graphs": None}
    expected = generate_with(target, None, ids, config=plain).sequences
    accelerate.cpu_offload(target, execution_device=torch.device("cuda", 0))
    out = generate_with(target, drafter, ids, config={**plain, **MODES["chain"]})
    assert torch.equal(out.sequences, expected)
    with pytest.raises(ValueError, match="cuda_graphs=True, but"):
        generate_with(target, drafter, ids, config={**FAST, **MODES["chain"]})
