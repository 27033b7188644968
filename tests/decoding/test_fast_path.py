"""The fast path of the decoding loop. Off the GPU its functions run directly instead of from graphs: everything but the
capture itself is tested here, the capture in test_gpu.py."""

import contextlib
import copy
import gc
import importlib.util
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from attention_cases import SHAPES, attention_cases
from decoding_helpers import (
    MODES,
    VOCAB,
    build_target,
    generate_with,
    offsets_of,
    prompt_batches,
    random_drafter,
    trained_pair,
)
from ppow import (
    PPOWConfig,
    PPOWDrafter,
    fast_path_ppow,
    fused_ppow,
    generation_ppow,
    graphs_ppow,
    obstacles_ppow,
    recording_ppow,
)
from ppow.target_ppow import TargetState
from tiny_targets import build


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gemma3", "phi3", "gpt-neox"])
def test_greedy_tokens_are_the_targets_own(family, mode, anywhere):
    target, drafter = trained_pair(family)
    for batch in (1, 3):
        for ids, mask in prompt_batches(batch, 3, seed=batch):
            expected = target.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
            config = {**MODES[mode], "max_new_tokens": 24, "cuda_graphs": True}
            out = generate_with(target, drafter, ids, mask, config)
            plain = generate_with(target, drafter, ids, mask, {**config, "cuda_graphs": False})
            torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
            for fast_row, plain_row in zip(out.acceptance.accepted, plain.acceptance.accepted):
                assert fast_row[:3] == plain_row[:3]  # the plain path drafts less where less room is left


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_end_early_and_their_caches(mode, anywhere):
    """Here the next cycle has begun before the tokens that end a row are read."""
    target, drafter = trained_pair()
    ended = set()
    for batch in (1, 3):
        for ids, mask in prompt_batches(batch, 6, seed=10 + batch):
            config = {"max_new_tokens": 40, "eos_token_id": [5, 7, 11], "pad_token_id": 0}
            expected = target.generate(ids, attention_mask=mask, do_sample=False, **config)
            out = generate_with(target, drafter, ids, mask, {**MODES[mode], **config, "cuda_graphs": True})
            torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
            ended.add(out.sequences.shape[1] - ids.shape[1])
            if batch == 1 and out.sequences.shape[1] > ids.shape[1] + 1:
                assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    assert len(ended) > 3


def test_sampling_draws_the_same_tokens_as_the_plain_path(anywhere):
    target, drafter = trained_pair()
    ids = torch.arange(1, 9)[None]
    outputs = []
    for graphs in (True, False):
        torch.manual_seed(3)
        config = {"window_size": 3, "max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_k": 20}
        outputs.append(generate_with(target, drafter, ids, config={**config, "cuda_graphs": graphs}).sequences)
    # the first windows see the same random numbers; the last one may be cut short on the plain path
    torch.testing.assert_close(outputs[0][:, :16], outputs[1][:, :16])


def test_buffers_serve_call_after_call_and_returned_caches_are_independent(anywhere):
    target, drafter = trained_pair()
    drafter = copy.deepcopy(drafter)
    config = {"window_size": 4, "max_new_tokens": 8, "cuda_graphs": True}
    first, second = torch.arange(1, 9)[None], torch.arange(20, 26)[None]
    expected = [generate_with(target, drafter, ids, config=config).sequences for ids in (first, second)]
    path = drafter._fast_paths.by_batch[1]
    out = generate_with(target, drafter, first, config=config)
    again = generate_with(target, drafter, second, config=config)
    assert drafter._fast_paths.by_batch[1] is path
    torch.testing.assert_close(out.sequences, expected[0])
    torch.testing.assert_close(again.sequences, expected[1])
    # the first call's cache still holds the first text after the second call used the buffers
    ids = torch.cat((out.sequences, second), 1)
    fresh = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    turn = {**config, "cuda_graphs": False}
    continued = generate_with(target, drafter, ids, config=turn, past_key_values=out.past_key_values)
    torch.testing.assert_close(continued.sequences, fresh)


def test_buffers_are_kept_for_each_batch_size_and_made_anew_for_more_room_and_moved_weights(anywhere):
    target, drafter = (copy.deepcopy(model) for model in trained_pair())
    ids = torch.arange(1, 9)[None]

    def path(rows=1, new=8):
        config = {"window_size": 4, "max_new_tokens": new, "cuda_graphs": True, "max_time": 0.1 if new > 100 else None}
        out = generate_with(target, drafter, ids.expand(rows, -1), config=config)
        expected = generate_with(target, None, ids.expand(rows, -1), config={"max_new_tokens": 8})
        kept = min(16, out.sequences.shape[1])
        torch.testing.assert_close(out.sequences[:, :kept], expected.sequences[:, :kept])
        return drafter._fast_paths.by_batch[rows]

    first = path()
    assert path(new=20) is first
    second = path(rows=2)
    assert second is not first and path() is first and path(rows=2) is second
    longer = path(new=1100)
    assert longer is not first and path() is longer and path(rows=2) is second
    target.lm_head.weight = torch.nn.Parameter(target.lm_head.weight.detach().clone())
    assert path() is not longer and list(drafter._fast_paths.by_batch) == [1]
    assert not copy.deepcopy(drafter)._fast_paths.by_batch
    third = path()
    drafter.set_draft_vocabulary(*offsets_of(torch.arange(6, VOCAB), VOCAB))  # in place: graphs keep its columns
    assert path() is not third


def test_where_memory_is_short_other_batch_sizes_lose_their_buffers(monkeypatch):
    """Of 7,500 slots; 750 must stay free beside several batch sizes, or beside more room than a call needs."""
    target, drafter = (copy.deepcopy(model) for model in trained_pair())
    slot = obstacles_ppow.path_bytes(target, drafter, 100, 1) // 100  # of so many rows a prompt is not read by graphs
    monkeypatch.setattr(obstacles_ppow, "SHORT_PROMPT", 0)
    monkeypatch.setattr(fast_path_ppow, "place_obstacle", lambda *args: None)
    monkeypatch.setattr(obstacles_ppow, "total_bytes", lambda device: size["all"] * slot)
    size = {"all": 7500, "longest": 8192}  # slots that there are, and that the target has positions for
    monkeypatch.setattr(fast_path_ppow, "longest_text", lambda target: size["longest"])

    def rooms():
        return {rows: path.capacity for rows, path in drafter._fast_paths.by_batch.items()}

    def run(rows, new=8):
        config = {"window_size": 4, "max_new_tokens": new, "max_time": 0.05, "cuda_graphs": True}
        generate_with(target, drafter, torch.arange(1, 9).expand(rows, -1), config=config)
        return rooms()

    def free(device):
        return (size["all"] - sum(rows * room for rows, room in rooms().items())) * slot

    monkeypatch.setattr(obstacles_ppow, "free_bytes", free)
    for rows, kept in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [4]), (1, [4, 1]), (2, [1, 2]), (1, [2, 1])):
        assert list(run(rows).items()) == [(each, 1024) for each in kept]
    assert run(1, new=1100) == {2: 1024, 1: 2048}
    assert run(2, new=1100) == {1: 2048, 2: 2048}
    assert run(1, new=2500) == {1: 4096}  # twice what it was, in the other's room
    assert run(1, new=4200) == {1: 5120}  # twice would not fit
    with pytest.raises(ValueError, match="8 x 1024 cache slots"):
        run(8)
    assert rooms() == {1: 5120}, "what would not fit alone either costs nobody his buffers"
    drafter._fast_paths.forget()
    assert run(7) == {7: 1024} and run(1) == {1: 1024}  # alone a call may take what is there
    size["all"] = 6500
    assert run(1, new=2500) == {1: 3072} and run(1, new=3200) == {1: 4096}  # twice would leave too little
    assert run(1, new=3200) == {1: 4096}
    drafter._fast_paths.forget()
    size["longest"] = 3072
    assert run(1, new=1100) == {1: 2048} and run(1, new=2100) == {1: 3072}  # the target has no use for twice


def test_graphs_of_one_adapter_do_not_serve_another(anywhere):
    peft = pytest.importorskip("peft")
    target = build_target().float()
    drafter, ids = random_drafter(target), torch.tensor([[5, 6, 7, 8]])
    drafter.generation_config.cuda_graphs = True
    lora = peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "up_proj"], lora_alpha=64)
    model = peft.get_peft_model(target, lora).eval()
    model.add_adapter("other", lora)

    def answer():
        found = [
            model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, assistant_model=assistant)
            for assistant in (None, drafter)
        ]
        assert torch.equal(*found)
        return found[0].tolist()

    first = answer()
    with model.disable_adapter():
        without = answer()
    model.set_adapter("other")
    assert first != without != answer()
    model.merge_adapter()
    answer()
    model.unmerge_adapter()
    model.set_adapter("default")
    assert answer() == first


def test_outgrown_buffers_and_graphs_are_freed_at_once(anywhere):
    """Whether new ones fit is asked right then, so nothing may wait for the collector of cycles."""
    target, drafter = (copy.deepcopy(model) for model in trained_pair())
    ids = torch.arange(1, 9)[None]
    for mode in MODES.values():
        generate_with(target, drafter, ids, config={**mode, "max_new_tokens": 8, "cuda_graphs": True})
        gc.collect()
        gc.disable()
        try:
            path = drafter._fast_paths.by_batch[1]
            held = (path.target_state.cache, path.drafter_state.cache, path.replay)
            left = [weakref.ref(each) for each in held]
            path = held = None
            drafter._fast_paths.forget()
            assert [each() for each in left] == [None] * 3
        finally:
            gc.enable()


def test_of_many_graphs_the_longest_unused_are_forgotten(monkeypatch):
    """Calls may sample with any settings, each of which is a graph with memory of its own."""
    monkeypatch.setattr(recording_ppow, "MOST_GRAPHS", 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    replay, recorded = recording_ppow.Replay(), []
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(replay, "_capture", lambda *functions: recorded.append(name) or (graph, (name, [])))
    for name in (1, 2, 3, 1, 4, 1, 3, 2):
        assert replay.advance((name,), None, [SimpleNamespace(is_cuda=True)]) == name
    assert recorded == [1, 2, 3, 4, 2] and list(replay.graphs) == [(1,), (3,), (2,)]


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gemma3", "phi3", "gpt-neox"])
def test_prompts_read_in_windows_are_what_the_target_reads(family, monkeypatch):
    """Also behind the first window, in every layer, and from another position on than 0."""
    target, read = build_target(family), []
    verify = graphs_ppow.GraphTarget.verify
    monkeypatch.setattr(graphs_ppow.GraphTarget, "verify", lambda *given: read.append(1) or verify(*given))
    for batch, length, first in ((1, 300, 0), (2, 129, 7), (3, 128, 0)):
        ids = torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
        positions = torch.arange(first, first + length).expand(batch, -1)
        ours = graphs_ppow.unrecorded(target, [0, 2, 4], None, batch, 512, None)
        theirs = TargetState(target, [0, 2, 4], None, batch, 512, None)
        with torch.no_grad():
            found, expected = (state.prefill(ids, None, positions, None, 24) for state in (ours, theirs))
        torch.testing.assert_close(found, expected)
        for name in ("lengths", "next_position", "last_position"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        for mine, stock in zip(ours.cache.layers, theirs.cache.layers):
            torch.testing.assert_close(mine.keys[:, :, :length], stock.keys[:, :, :length])
            torch.testing.assert_close(mine.values[:, :, :length], stock.values[:, :, :length])
    assert len(read) == 2 + 2 + 1  # a prompt that is alone in pieces of 256


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_projections_of_one_input_are_one_product_and_the_weights_stay_the_models_own(family, anywhere, tmp_path):
    target, drafter = (copy.deepcopy(model) for model in trained_pair(family))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    ids = torch.arange(1, 9)[None]
    expected = target.generate(ids, max_new_tokens=12, do_sample=False)
    config = {"window_size": 4, "max_new_tokens": 12, "cuda_graphs": True}
    torch.testing.assert_close(generate_with(target, drafter, ids, config=config).sequences, expected)
    products = drafter._fast_paths.by_batch[1].target_state.twin.products
    assert len(products) == 2 * target.config.num_hidden_layers
    assert all(product.result is None for product in products)
    attention = target.model.layers[0].self_attn
    assert attention.k_proj.weight.data_ptr() == products[0].weight[attention.q_proj.out_features :].data_ptr()
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)
    target.save_pretrained(tmp_path)
    saved = type(target).from_pretrained(tmp_path, dtype="auto").state_dict()
    torch.testing.assert_close(saved, before, rtol=0, atol=0)


def test_modules_that_are_not_plain_stay_as_they_are():
    class Adapted(torch.nn.Linear):
        pass

    layer = torch.nn.ModuleDict({name: torch.nn.Linear(4, 3) for name in ("q_proj", "k_proj", "gate_proj")})
    layer["v_proj"], layer["up_proj"] = Adapted(4, 3), torch.nn.Linear(4, 3, bias=False)
    assert recording_ppow.Product.find([layer]) == []


def test_where_it_cannot_run_it_says_why():
    target, drafter = trained_pair()
    with pytest.raises(ValueError, match="cuda_graphs=True, but the target is not on a GPU"):
        generate_with(target, drafter, torch.arange(1, 9)[None], config={"max_new_tokens": 4, "cuda_graphs": True})
    with pytest.raises(ValueError, match="cuda_graphs='yes'"):
        generate_with(target, drafter, torch.arange(1, 9)[None], config={"max_new_tokens": 4, "cuda_graphs": "yes"})


@pytest.mark.parametrize(
    ("family", "reason"), [("gemma2", "caps its attention logits"), ("mixtral", "routes to experts")]
)
def test_targets_that_it_cannot_serve_take_the_plain_path(family, reason, anywhere):
    target, drafter = trained_pair(family)
    ids = torch.arange(1, 9)[None]
    with pytest.raises(ValueError, match=reason):
        generate_with(target, drafter, ids, config={"max_new_tokens": 4, "cuda_graphs": True})
    out = generate_with(target, drafter, ids, config={"max_new_tokens": 4})
    torch.testing.assert_close(out.sequences, target.generate(ids, max_new_tokens=4, do_sample=False))


def test_calls_that_it_cannot_serve_take_the_plain_path(anywhere):
    target, drafter = trained_pair()
    ids = torch.arange(1, 9)[None]
    fast = {"max_new_tokens": 4, "cuda_graphs": True}
    out = generate_with(target, drafter, ids, config=fast)
    with pytest.raises(ValueError, match="continues a cache"):
        generate_with(target, drafter, out.sequences, config=fast, past_key_values=out.past_key_values)
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="padding is not on the left"):
        generate_with(target, drafter, ids, mask, fast)
    with pytest.raises(ValueError, match="autocast is on"), torch.autocast("cpu", dtype=torch.bfloat16):
        generate_with(target, drafter, ids, config=fast)


def test_hooks_are_called(anywhere):
    """Graphs would not call them, nor know of those that came later."""
    target, drafter = trained_pair()
    ids = torch.arange(1, 9)[None]
    target(ids, output_hidden_states=True)  # hooks of transformers' own stay behind
    config = {"max_new_tokens": 12, "cuda_graphs": True}
    before = generate_with(target, drafter, ids, config=config).sequences
    hook = target.model.layers[1].register_forward_hook(lambda layer, given, out: -out)
    try:
        steered = target.generate(ids, max_new_tokens=12, do_sample=False)
        with pytest.raises(ValueError, match="hooks watch the target's modules"):
            generate_with(target, drafter, ids, config=config)
        assert torch.equal(generate_with(target, drafter, ids, config={"max_new_tokens": 12}).sequences, steered)
    finally:
        hook.remove()
    assert torch.equal(generate_with(target, drafter, ids, config=config).sequences, before)
    assert not torch.equal(steered, before)


@pytest.mark.parametrize("kind", ["aria_text", "dbrx", "jetmoe"])
def test_experts_are_found_whatever_the_configuration_calls_them(kind):
    assert "routes to experts" in obstacles_ppow.target_obstacle(build(kind))


def test_entries_on_another_device_than_the_current_one_are_not_written_by_triton(monkeypatch):
    monkeypatch.setattr(fused_ppow, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for index in (0, 1):
        entries = SimpleNamespace(
            is_cuda=True, device=torch.device("cuda", index), shape=(1, 2, 3, 4), stride=lambda _: 1
        )
        assert fused_ppow.can_write(entries, entries) is (index == 0)


def test_memory_is_checked_before_buffers_are_made(monkeypatch):
    target, drafter = trained_pair()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    assert "2 x 1024 cache slots, and what belongs to them, need" in obstacles_ppow.shortage(target, drafter, 2, 1024)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    assert obstacles_ppow.shortage(target, drafter, 2, 1024) is None


# batch, heads, kv heads, nodes, head size, slots, kept slots of each row
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_windows_mean_what_dense_masks_mean(shape):
    out, expected = attention_cases(shape, "cpu", torch.float64)
    torch.testing.assert_close(out, expected)


ATTENTION = """
from attention_cases import SHAPES, attention_cases
for shape in SHAPES: torch.testing.assert_close(*attention_cases(shape, "cpu", torch.float32))
"""
FUSED = """
from fused_cases import *
check_strides("cpu", torch.float32); check_models("cpu", torch.float32, 1e-5); check_twins("cpu", torch.float32, 1e-5)
check_writing("cpu", torch.float32)
check_refusals("cpu", torch.bfloat16)
check_likeliest("cpu")
check_streaming("cpu", torch.float16)
"""

DRAWS = """
from fused_cases import *
check_draws("cpu", 1e-5); check_verifying("cpu"); check_cold_draws("cpu"); check_edge_of_equals("cpu")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("code", [ATTENTION, FUSED, DRAWS], ids=["attention", "fused", "draws"])
def test_the_kernels_in_tritons_interpreter(code, tmp_path):
    """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    import subprocess
    import sys
    from pathlib import Path

    environment = {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[1] / "helpers"),
        "PATH": "/usr/bin:/bin",
    }
    subprocess.run([sys.executable, "-c", "import torch" + code], env=environment, check=True, cwd=tmp_path)


def test_no_layer_is_touched_for_products_of_few_rows(anywhere, tiny_config, monkeypatch):
    """Its products have one shape and keep the library's order; what it records is not to change between calls."""
    touched = []
    monkeypatch.setattr(generation_ppow, "few_rows", lambda *models: touched.extend(models) or contextlib.nullcontext())
    target = LlamaForCausalLM(tiny_config).eval()
    drafter = PPOWDrafter(PPOWConfig.from_target(tiny_config)).eval()
    for graphs, models in ((True, []), (False, [target, drafter, drafter.embed_tokens])):
        drafter.generation_config.cuda_graphs = graphs
        target.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=4, assistant_model=drafter)
        assert touched == models
