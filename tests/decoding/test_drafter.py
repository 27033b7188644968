"""The drafter's files and features: saving and loading, tensor names, taps, and loading without the package."""

import itertools
import json
import re
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from decoding_helpers import FAMILIES, build_target, generate_with, prompt_batches, random_drafter
from ppow import PPOWConfig, PPOWDrafter, drafting_ppow
from ppow.drafting_ppow import DrafterState, DraftWindow
from ppow.target_ppow import TargetState, decoder_layers, read_taps
from ppow.training.target import FrozenTarget

V, H, HT, MLP, HEADS, KV, D_HEAD = 24, 16, 12, 20, 4, 2, 6
STYLES = {"llama": {}, "qwen3": {"qk_norm": True}}
NORMS = {
    "plain": {},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_output": {"norm_output": True},
    "all": {"norm_before_fc": True, "fc_norm": True, "norm_before_residual": True, "norm_output": True},
}
TAPS = [[1, 3, 4], [0, 5]]
OPTIONS = list(itertools.product((1, 2), STYLES, TAPS, NORMS, (9, V), (False, True)))


def build(layers=1, style="llama", taps=TAPS[0], norms="plain", draft_vocab=9, shared=False) -> PPOWDrafter:
    """A drafter whose every tensor is random, norms and vocabulary too, so that none is right by default."""
    config = PPOWConfig(
        vocab_size=V,
        draft_vocab_size=draft_vocab,
        hidden_size=H,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=D_HEAD,
        target_hidden_size=H if shared else HT,
        target_num_layers=6,
        target_taps=taps,
        share_target_embeddings=shared,
        **STYLES[style],
        **NORMS[norms],
    )
    drafter = PPOWDrafter(config).eval()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_()
    if drafter.pruned:
        ids = torch.randperm(V)[:draft_vocab].sort().values
        member = torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)
        drafter.set_draft_vocabulary(ids - torch.arange(draft_vocab), member)
    return drafter


def expected_tensors(layers, style, taps, norms, draft_vocab, shared) -> dict[str, list[int]]:
    """Names and shapes that EAGLE-3 checkpoints have in common, and the extras that its variants add."""
    target = H if shared else HT
    tensors = {"fc.weight": [H, len(taps) * target], "norm.weight": [H], "lm_head.weight": [draft_vocab, H]}
    for layer in range(layers):
        width = 2 * H if layer == 0 else H  # the first layer reads embedding and features side by side
        prefix = f"layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": [HEADS * D_HEAD, width],
            f"{prefix}.self_attn.k_proj.weight": [KV * D_HEAD, width],
            f"{prefix}.self_attn.v_proj.weight": [KV * D_HEAD, width],
            f"{prefix}.self_attn.o_proj.weight": [H, HEADS * D_HEAD],
            f"{prefix}.mlp.gate_proj.weight": [MLP, H],
            f"{prefix}.mlp.up_proj.weight": [MLP, H],
            f"{prefix}.mlp.down_proj.weight": [H, MLP],
            f"{prefix}.input_layernorm.weight": [H],
            f"{prefix}.post_attention_layernorm.weight": [H],
        }
        if style == "qwen3":
            tensors |= {f"{prefix}.self_attn.{name}_norm.weight": [D_HEAD] for name in "qk"}
    tensors["layers.0.hidden_norm.weight"] = [H]
    if not shared:
        tensors["embed_tokens.weight"] = [V, H]
    if draft_vocab < V:
        tensors |= {"d2t": [draft_vocab], "t2d": [V]}
    if NORMS[norms].get("norm_before_fc"):
        tensors["input_norm.weight"] = [len(taps) * target]
    if NORMS[norms].get("fc_norm"):
        tensors |= {f"fc_norm.{i}.weight": [target] for i in range(len(taps))}
    return tensors


def forward(drafter: PPOWDrafter) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    taps = torch.randn(2, 5, drafter.fc.in_features, generator=generator).to(drafter.dtype)
    embeds = torch.randn(2, 5, H, generator=generator).to(drafter.dtype)
    inputs = {"inputs_embeds": embeds} if drafter.config.share_target_embeddings else {}
    with torch.no_grad():
        return drafter(torch.arange(10).view(2, 5), taps, **inputs).logits


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_every_kind_of_drafter_is_saved_and_loaded_bit_for_bit(tmp_path, layers, style):
    for number, options in enumerate(o for o in OPTIONS if o[:2] == (layers, style)):
        drafter = build(*options)
        for parameter in drafter.parameters():  # not drafter.to(): it would round the buffer of RoPE frequencies
            parameter.data = parameter.data.to((torch.float32, torch.bfloat16)[number % 2])
        folder = tmp_path / str(number)
        drafter.save_pretrained(folder)
        stored = load_file(folder / "model.safetensors")
        assert {name: list(tensor.shape) for name, tensor in stored.items()} == expected_tensors(*options), options
        loaded, report = PPOWDrafter.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), (options, report)
        for field in set(PPOWConfig.__annotations__) - {"model_type"}:
            assert getattr(loaded.config, field) == getattr(drafter.config, field), (options, field)
        for name, tensor in drafter.state_dict().items():
            found = loaded.state_dict()[name]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), (options, name)
        assert torch.equal(forward(loaded), forward(drafter)), options


def test_vocabulary_tensors_hold_offsets_and_membership(tmp_path):
    drafter = build()
    drafter.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["d2t"].dtype == torch.int64 and stored["t2d"].dtype == torch.bool
    ids = torch.arange(9) + stored["d2t"]
    assert ids.tolist() == stored["t2d"].nonzero().flatten().tolist() == drafter.draft_columns().tolist()


def test_how_it_drafts_is_saved_too(tmp_path):
    drafter = build()
    drafter.generation_config.window_size = 6
    drafter.save_pretrained(tmp_path)
    assert PPOWDrafter.from_pretrained(tmp_path).generation_config.window_size == 6


ALONE = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel
sys.modules["ppow"] = None  # however it is installed here, it cannot be imported
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
drafter = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
generator = torch.Generator().manual_seed(1)
taps = torch.randn(2, 5, drafter.fc.in_features, generator=generator)
logits = drafter(torch.arange(10).view(2, 5), taps).logits
torch.save(logits.detach(), sys.argv[2])
print(json.dumps([type(config).__name__, type(drafter).__name__, type(drafter).__module__]))
"""


def test_a_folder_serves_a_process_without_the_package(tmp_path):
    drafter = build(norms="all")
    drafter.save_pretrained(tmp_path / "drafter")
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, tmp_path / "drafter", tmp_path / "logits.pt"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    config, model, module = json.loads(done.stdout.splitlines()[-1])
    assert (config, model) == ("PPOWConfig", "PPOWDrafter") and module.startswith("transformers_modules.")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), forward(drafter))


def test_truncated_weights_are_refused(tmp_path):
    build().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SafetensorError, match="incomplete|not fully covered"):
        PPOWDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "key, nearest",
    [("target_tap", "target_taps"), ("draft_vocabulary_size", "draft_vocab_size"), ("qknorm", "qk_norm")],
)
def test_unknown_configuration_keys_name_the_nearest_known_one(tmp_path, key, nearest):
    message = f"Unknown configuration key '{key}' .* nearest known key is '{nearest}'"
    with pytest.raises(ValueError, match=message):
        PPOWConfig(**{key: 1})
    build().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: 1}))
    with pytest.raises(ValueError, match=message):
        PPOWDrafter.from_pretrained(tmp_path)


# -- taps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", [[1, 2, 3], [0, 2], [3]])
@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_hidden_state_indices(family, taps):
    """While decoding and in training the tapped states are those of ``output_hidden_states=True``, side by side."""
    target = build_target(family, FAMILIES[family][4][0])
    drafter = random_drafter(target, target_taps=taps)
    ((ids, _),) = prompt_batches(1, 1, seed=4)
    text = torch.cat((ids, torch.tensor([[7, 3, 11, 5]])), 1)
    with torch.no_grad():
        states = target(text, output_hidden_states=True).hidden_states
        assert len(states) == target.config.num_hidden_layers + 1
        expected = torch.cat([states[tap] for tap in taps], -1)

        state = TargetState(target, drafter.config.target_taps, None, 1, 64, None)
        positions = torch.arange(text.shape[1])[None]
        prompt = ids.shape[1]
        _, first = state.prefill(ids, None, positions[:, :prompt], chunk=None)
        _, second = state.verify(DraftWindow.chain(text[:, prompt:]))
        read = FrozenTarget(target, taps).read(text).taps
    tolerance = 1e-9 if target.dtype == torch.float64 else 1e-4
    for found in (torch.cat((first, second), 1), read):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gpt-oss"])
def test_a_tap_at_the_layer_count_is_what_leaves_the_last_block_before_the_final_norm(family):
    """The states' last entry of ``output_hidden_states=True`` is this one, normed."""
    target = build_target(family, FAMILIES[family][4][0])
    layers = target.config.num_hidden_layers
    drafter = random_drafter(target, target_taps=[1, layers])
    ((ids, _),) = prompt_batches(1, 1, seed=4)
    with torch.no_grad():
        taps = drafter.read_target(target, input_ids=ids)[1]
        seen = []
        hook = target.get_decoder().get_submodule("norm" if family != "gpt-neox" else "final_layer_norm")
        handle = hook.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        normed = target(ids, output_hidden_states=True).hidden_states[-1]
        handle.remove()
    low, last = taps.chunk(2, -1)
    torch.testing.assert_close(last, seen[0], rtol=0, atol=0)
    assert low.shape == last.shape and not torch.allclose(last, normed)
    expected = target.generate(ids, do_sample=False, max_new_tokens=12)
    before = dict(decoder_layers(target)[-1]._forward_hooks)  # transformers leaves its own
    out = generate_with(target, drafter, ids, config={"max_new_tokens": 12})
    assert torch.equal(out.sequences, expected)
    assert decoder_layers(target)[-1]._forward_hooks == before


def test_taps_are_those_of_the_threads_own_forward():
    """Another thread runs the same target between this forward's taps and its end."""
    target = build_target("llama")
    mine, other = torch.arange(1, 7)[None], torch.arange(7, 13)[None]
    with torch.no_grad():
        expected = read_taps(target, [1, 2], input_ids=mine)[1]

        def interfere(*args):
            hook.remove()
            thread = threading.Thread(target=target, kwargs={"input_ids": other})
            thread.start()
            thread.join()

        hook = target.model.layers[3].register_forward_pre_hook(interfere)
        torch.testing.assert_close(read_taps(target, [1, 2], input_ids=mine)[1], expected, rtol=0, atol=0)
    assert not any(layer._forward_pre_hooks for layer in target.model.layers)


def test_the_default_taps_are_eagle3s():
    layers = {4: [1, 2, 3], 6: [1, 3, 5], 7: [2, 3, 4], 32: [2, 16, 29], 61: [2, 30, 58]}
    for count, taps in layers.items():
        assert PPOWConfig(target_num_layers=count).target_taps == taps


def test_the_order_of_the_taps_is_the_order_of_fcs_columns():
    drafter = build(taps=[1, 3, 4])
    taps = torch.randn(1, 2, 3, HT)
    weights = drafter.fc.weight.view(H, 3, HT)
    expected = torch.einsum("btkh,okh->bto", taps, weights)
    torch.testing.assert_close(drafter.fuse(taps.flatten(2)), expected, rtol=1e-4, atol=1e-4)


def test_a_folder_without_a_drafter_is_not_taken_for_another_trainers(tmp_path):
    (tmp_path / "checkpoints").mkdir()  # a run that has not ended
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        PPOWDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize("layers", [1, 2])
def test_padding_on_the_left_changes_no_feature_that_is_drafted_from(monkeypatch, layers):
    """Windows are their roots alone here, so that those of a batch and of a prompt alone begin at the same tokens."""
    target, found = build_target(), []
    drafter = random_drafter(target, num_hidden_layers=layers)

    def root_alone(state, root, *args, **kwargs):
        found.append(state.hidden[:, 0])
        return DraftWindow.chain(root[:, None])

    monkeypatch.setattr(DrafterState, "chain", root_alone)
    for ids, mask in prompt_batches(4, 2, seed=3):
        found.clear()
        generate_with(target, drafter, ids, mask, {"window_size": 2, "max_new_tokens": 6})
        together = torch.stack(found, 1)  # (B, windows, H)
        for row, prompt, real in zip(together, ids, mask.bool()):
            found.clear()
            generate_with(target, drafter, prompt[real][None], None, {"window_size": 2, "max_new_tokens": 6})
            assert len(found) == 4 and (row - torch.cat(found)).abs().max() < 1e-9


@pytest.mark.parametrize("shape", [(2, 16384), (1, 10, 32000), (3, 7, 100), (2, 641)])
def test_the_highest_of_a_row_are_found_in_parts(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(drafting_ppow.top(values, 10), values.topk(10)):
        assert torch.equal(mine, theirs)
