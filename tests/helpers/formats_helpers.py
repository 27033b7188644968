"""Tiny drafters with every feature that a format may or may not express, and their way through files."""

import json
import tempfile
from pathlib import Path

import gguf
import torch
from safetensors.torch import load, save, save_file
from transformers import LlamaConfig

from decoding_helpers import LLAMA3, offsets_of
from ppow import PPOWConfig, PPOWDrafter
from ppow.training.export_formats import from_ppow
from ppow.training.gguf_format import read_gguf, write_gguf
from ppow.training.import_formats import to_ppow

V, D, H, HT, DEEP = 40, 24, 16, 32, 8
TARGET = LlamaConfig(
    vocab_size=V,
    hidden_size=HT,
    intermediate_size=48,
    num_hidden_layers=DEEP,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    pad_token_id=0,
)
EMBEDDINGS, HEAD = torch.randn(2, V, HT, generator=torch.Generator().manual_seed(5))
FEATURES = {
    "plain: 1 layer, Llama style, default taps, D < V, as wide as the target": {},
    "D = V": {"draft_vocab_size": V},
    "2 layers": {"num_hidden_layers": 2},
    "Qwen3 style (norms on q and k)": {"qk_norm": True},
    "3 other taps": {"target_taps": [1, 3, 6]},
    "4 taps": {"target_taps": [1, 3, 5, 6]},
    "tap 0 (the embeddings)": {"target_taps": [0, 4, 5]},
    "tap L (what leaves the last block)": {"target_taps": [2, 4, DEEP]},
    "fc_norm": {"fc_norm": True},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm and norm_before_fc": {"fc_norm": True, "norm_before_fc": True},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_output": {"norm_output": True},
    "narrower than the target": {"hidden_size": H, "head_dim": 4},
    "the target's embeddings": {"share_target_embeddings": True},
    "the target's embeddings and head": {"share_target_embeddings": True, "share_target_head": True},
    "heads of another size than hidden_size / heads": {"head_dim": 6},
    "biases on q, k, v": {"attention_bias": True},
    "RoPE of type llama3": {"rope_parameters": LLAMA3},
}


def build(*features: str, **overrides) -> PPOWDrafter:
    """A drafter whose every tensor is random; its embeddings are the target's where the width allows."""
    fields = {"draft_vocab_size": D}
    for feature in features:
        fields |= FEATURES[feature]
    drafter = PPOWDrafter(PPOWConfig.from_target(TARGET, **{**fields, **overrides})).eval()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_()
        if drafter.pruned:
            drafter.set_draft_vocabulary(*offsets_of(torch.randperm(V)[:D].sort().values, V))
        if drafter.config.hidden_size == HT and not drafter.config.share_target_embeddings:
            drafter.embed_tokens.weight.copy_(EMBEDDINGS)
    return drafter


def export(drafter: PPOWDrafter, form: str):
    """What ``ppow export`` would write, as it would be read again: configuration, tensors."""
    given = {"target_embeddings": EMBEDDINGS, "target_head": HEAD, "target_name": "ORG/TARGET"}
    exported = from_ppow(drafter.config, drafter.state_dict(), form, TARGET, **given)
    if form == "gguf":
        with tempfile.TemporaryDirectory() as folder:
            write_gguf(exported.config, exported.tensors, gguf_tokens(Path(folder)), Path(folder) / "drafter.gguf")
            return read_gguf(f"{folder}/drafter.gguf", TARGET)
    return json.loads(json.dumps(exported.config)), load(save(exported.tensors))


def gguf_tokens(folder: Path, count: int = V) -> str:
    """A GGUF file with nothing but a tokenizer, as the target's has one."""
    writer = gguf.GGUFWriter(folder / "target.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(count)])
    writer.add_token_types([1] * count)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder / "target.gguf")


def fields_of(config: PPOWConfig) -> dict:
    fields = config.to_dict()
    noise = ("architectures", "dtype", "transformers_version", "_name_or_path")
    return {key: fields[key] for key in fields if key not in noise}


def assert_same(drafter: PPOWDrafter, config: dict, tensors: dict, form: str) -> None:
    """The import has the drafter's configuration and its tensors, bit for bit."""
    imported = to_ppow(config, tensors, TARGET, PPOWDrafter)
    expected, weights = fields_of(drafter.config), dict(drafter.state_dict())
    if form == "sglang" and drafter.config.hidden_size == HT:  # it runs the target's embeddings; ours equal them
        expected["share_target_embeddings"] = True
        weights.pop("embed_tokens.weight", None)
    if form == "speculators" and drafter.config.share_target_embeddings:  # its loader takes stored ones alone
        expected["share_target_embeddings"] = False
        weights["embed_tokens.weight"] = EMBEDDINGS
    if drafter.config.share_target_head:  # which no engine does
        expected["share_target_head"] = False
        weights["lm_head.weight"] = HEAD[drafter.draft_columns()]
    assert fields_of(imported.config) == expected
    assert imported.tensors.keys() == weights.keys()
    assert all(torch.equal(imported.tensors[name], weights[name]) for name in weights)
    assert all(imported.tensors[name].dtype == weights[name].dtype for name in weights)


def write(folder: Path, config, tensors: dict, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    return folder


def logits(drafter: PPOWDrafter) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    taps = torch.randn(2, 9, drafter.fc.in_features, generator=generator)
    embeds = torch.randn(2, 9, drafter.config.hidden_size, generator=generator)
    with torch.no_grad():
        return drafter(None, taps, inputs_embeds=embeds).logits
