"""EAGLE-3 drafters of other trainers in, PPOW drafters out: round trips, dialects, bad input, both commands.

``python tests/sharing/test_formats.py`` writes the table of docs/serve.md anew.
"""

import functools
import itertools
import json
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, ViTConfig

import small_pair
from formats_helpers import EMBEDDINGS, FEATURES, HT, TARGET, D, V, assert_same, build, export, fields_of, logits, write
from ppow import PPOWConfig, PPOWDrafter
from ppow.training import cli, convert
from ppow.training.config import ReinforceConfig
from ppow.training.convert import import_checkpoint
from ppow.training.export_formats import FORMATS, from_ppow
from ppow.training.import_formats import READ, Known, detect, to_ppow

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "serve.md"
START, END = "<!-- written by tests/sharing/test_formats.py -->\n", "<!-- end -->"
FOLDERS = [form for form in FORMATS if form != "gguf"]  # config.json and safetensors; the file has its own tests
AXES = [
    ("D = V",),
    ("2 layers",),
    ("Qwen3 style (norms on q and k)",),
    ("3 other taps", "4 taps"),
    ("fc_norm", "norm_before_fc"),
    ("norm_before_residual",),
    ("norm_output",),
    ("narrower than the target",),
]


@functools.cache
def refused(feature: str, form: str) -> str | None:
    """Round trip of one feature: None when it is bit-exact, else why the export is refused."""
    drafter = build(feature)
    try:
        config, tensors = export(drafter, form)
    except ValueError as error:
        return str(error).split("badly: ", 1)[1].rstrip(".")
    assert_same(drafter, config, tensors, form)


@pytest.mark.parametrize("most", [2, pytest.param(len(AXES), marks=pytest.mark.slow)])
def test_round_trips_are_bit_exact_or_refused_over_the_product_of_options(most):
    """A combination is refused exactly when one of its features is, and every reason is named."""
    exact = dict.fromkeys(FORMATS, 0)
    for choice in itertools.product(*((None, *axis) for axis in AXES)):
        features = [feature for feature in choice if feature]
        if len(features) > most and None in choice:  # in pairs and all at once, if not in every combination
            continue
        drafter = build(*features)
        for form in FORMATS:
            reasons = [reason for feature in features if (reason := refused(feature, form))]
            if not reasons:
                assert_same(drafter, *export(drafter, form), form)
                exact[form] += 1
                continue
            with pytest.raises(ValueError, match=f"cannot be exported to {form}") as error:
                export(drafter, form)
            assert all(reason in str(error.value) for reason in reasons)
    assert list(exact.values()) == ([44, 58, 35, 11, 4, 16] if most == 2 else [288, 576, 144, 16, 4, 32])


def table() -> str:
    """The table of docs/serve.md: what each format can express, and why it cannot express the rest."""
    lines = ["| drafter | " + " | ".join(FORMATS) + " |", "|---" * (len(FORMATS) + 1) + "|"]
    for feature in FEATURES:
        marks = ["exact" if refused(feature, form) is None else "refused" for form in FORMATS]
        lines.append(f"| {feature} | " + " | ".join(marks) + " |")
    lines += ["", "The refusals, as the command words them for these drafters:", ""]
    for feature in FEATURES:
        reasons = {}
        for form in FORMATS:
            if reason := refused(feature, form):
                reasons.setdefault(reason, []).append(form)
        lines += [f"- {', '.join(forms)}: {reason}" for reason, forms in reasons.items()]
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_current():
    found = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    assert found == table(), "run: python tests/sharing/test_formats.py"


def test_sglang_takes_embeddings_only_when_they_are_the_targets():
    drafter = build()
    with pytest.raises(ValueError, match="give --target"):
        from_ppow(drafter.config, drafter.state_dict(), "sglang", TARGET)
    with pytest.raises(ValueError, match="these differ"):
        from_ppow(drafter.config, drafter.state_dict(), "sglang", TARGET, EMBEDDINGS + 1)
    narrow = build("narrower than the target")  # no engine can share then
    exported = from_ppow(narrow.config, narrow.state_dict(), "sglang", TARGET)
    assert "embed_tokens.weight" in exported.tensors


def test_sglang_leaves_out_the_embeddings_that_it_replaces_as_the_docs_say():
    drafter = build()
    imported = to_ppow(*export(drafter, "sglang"), TARGET, PPOWDrafter)
    assert not drafter.config.share_target_embeddings and imported.config.share_target_embeddings
    assert drafter.state_dict().keys() - imported.tensors.keys() == {"embed_tokens.weight"}
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert "leaves out a copy of them, and an import has `share_target_embeddings` true" in page


def test_speculators_stores_the_embeddings_that_its_loader_would_leave_uninitialised():
    drafter = build("the target's embeddings")
    with pytest.raises(ValueError, match="speculators wants them stored, .* give --target"):
        from_ppow(drafter.config, drafter.state_dict(), "speculators", TARGET, target_name="ORG/TARGET")
    config, tensors = export(drafter, "speculators")
    assert torch.equal(tensors["embed_tokens.weight"], EMBEDDINGS)
    imported = to_ppow(config, tensors, TARGET, PPOWDrafter)
    assert not imported.config.share_target_embeddings


@pytest.mark.parametrize("form", ["vllm", "sglang", "specforge", "speculators"])
def test_exports_keep_both_vocabulary_maps(form):
    """vLLM and SGLang pass t2d over, and speculators' converter wants it."""
    drafter = build()
    _, tensors = export(drafter, form)
    assert torch.equal(tensors["t2d"], drafter.t2d) and torch.equal(tensors["d2t"], drafter.d2t)


@pytest.mark.parametrize("form", ["sglang", "specforge"])
def test_explicit_taps_are_right_in_vllm_too(form):
    """vLLM reads the top-level field first, as hidden-state indices; SGLang and SpecForge the nested one alone."""
    config, _ = export(build("3 other taps"), form)
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 5]


@pytest.mark.parametrize("form", ["sglang", "eagle"])
def test_taps_as_wide_as_the_drafter_are_refused_where_fc_would_be_skipped(form):
    drafter = build(hidden_size=3 * HT, head_dim=24)
    with pytest.raises(ValueError, match="takes them for fused"):
        export(drafter, form)
    export(drafter, "vllm")


@pytest.mark.parametrize("form", FORMATS)
def test_exported_positions_reach_as_far_as_the_targets(form):
    config, _ = export(build("the target's embeddings", max_position_embeddings=64), form)
    assert config.get("transformer_layer_config", config)["max_position_embeddings"] == 256


# -- every dialect, as its trainer writes it ---------------------------------------------------------------------------

LAYER = {  # what all of them write about the layer
    "model_type": "llama",
    "hidden_size": HT,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": V,
    "max_position_embeddings": 64,  # too few: the target's are taken
}
PLAIN = {**LAYER, "draft_vocab_size": D, "rope_theta": 5000.0}
SPECULATORS = {
    "speculators_model_type": "eagle3",
    "speculators_version": "0.9.0",
    "draft_vocab_size": D,
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "ORG/TARGET"}},
    "transformer_layer_config": {**LAYER, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
}
# dialect -> (config.json, name of the layer, what is left out, the taps it means)
DIALECTS = {
    "EAGLE": ({"architectures": ["LlamaForCausalLM"]}, "midlayer", ["embed_tokens.weight"], None),
    "SpecForge": (
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 2, 5]},
            "norm_output": True,
        },
        "midlayer",
        [],
        [1, 3, 6],
    ),
    "AngelSlim": (
        {"architectures": ["Eagle3LlamaForCausalLM"], "aux_hidden_states_layer_ids": [1, 3, 4]},
        "midlayer",
        [],
        None,
    ),
    "Model-Optimizer": (
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "eagle_config": {
                "use_aux_hidden_state": True,
                "use_last_layernorm": True,
                "eagle_aux_hidden_state_layer_ids": [0, 2, 5],
            },
        },
        "layers.0",
        ["embed_tokens.weight", "t2d"],
        [1, 3, 6],
    ),
    "SGLang": ({"architectures": ["LlamaForCausalLMEagle3"]}, "layers.0", ["t2d"], None),
    "vLLM": (
        {"architectures": ["Eagle3LlamaForCausalLM"], "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}},
        "layers.0",
        ["t2d"],
        [1, 3, 6],
    ),
    "speculators": (
        {**SPECULATORS, "architectures": ["Eagle3DraftModel"], "eagle_aux_hidden_state_layer_ids": [1, 3, 6]},
        "layers.0",
        [],
        [1, 3, 6],
    ),
    "speculators (old)": ({**SPECULATORS, "architectures": ["Eagle3Speculator"]}, "layers.0", [], None),
}


def checkpoint(dialect: str) -> tuple[PPOWDrafter, dict, dict]:
    """A drafter, and the config.json and tensors that ``dialect`` has for it."""
    config, layer, left_out, taps = DIALECTS[dialect]
    own = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if dialect == "AngelSlim" else {}
    drafter = build(target_taps=taps, share_target_embeddings="embed_tokens.weight" in left_out, **own)
    tensors = {name: tensor for name, tensor in drafter.state_dict().items() if name not in left_out}
    tensors = {name.replace("layers.0", layer): tensor for name, tensor in tensors.items()}
    return drafter, config if dialect.startswith("speculators") else {**PLAIN, **config}, tensors


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_checkpoint_of_every_dialect_loads_directly(tmp_path, dialect, name):
    drafter, config, tensors = checkpoint(dialect)
    assert detect(config, tensors) == dialect
    folder = write(tmp_path / dialect, config, tensors, name)
    loaded = PPOWDrafter.from_pretrained(folder, target=TARGET)
    assert fields_of(loaded.config) == fields_of(drafter.config)
    assert torch.equal(logits(loaded), logits(drafter))
    if drafter.pruned:
        assert torch.equal(loaded.draft_columns(), drafter.draft_columns())
    assert PPOWDrafter.from_pretrained(folder, target=TARGET, dtype=torch.float64).dtype == torch.float64


def test_what_is_missing_is_assumed_and_said():
    _, config, tensors = checkpoint("EAGLE")
    for key in (
        "architectures",
        "rope_theta",
        "rms_norm_eps",
        "max_position_embeddings",
        "num_attention_heads",
        "vocab_size",
    ):
        del config[key]
    imported = to_ppow(config, tensors, TARGET, PPOWDrafter)
    assert imported.config.rope_parameters["rope_theta"] == 10000.0 and imported.config.rms_norm_eps == 1e-6
    assert imported.config.target_taps == [2, 4, 5] and imported.config.num_attention_heads == 4
    said = {(row.action, row.what) for row in imported.rows}
    assumed = {"embed_tokens", "taps", "rope_theta", "rms_norm_eps", "num_attention_heads"}
    assert {("assumed", what) for what in assumed} <= said and ("mapped", "midlayer.*") in said


def imported_with(dialect: str, known: Known = READ, **fields):
    """A dialect's checkpoint with other fields in its config.json, imported: -> configuration, the rows' words."""
    _, config, tensors = checkpoint(dialect)
    imported = to_ppow({**config, **fields}, tensors, TARGET, PPOWDrafter, known)
    return imported.config, {(row.action, row.what): row.how for row in imported.rows}


def test_angelslim_trains_with_a_rope_base_of_its_own():
    stored = {"rope_theta": 1e6}
    config, rows = imported_with("AngelSlim", **stored)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    assert rows["assumed", "rope_theta"] == "10000: its trainer ignores the stored 1e+06; else give --rope-theta"
    config, rows = imported_with("AngelSlim", Known(rope_theta=1e6), **stored)
    assert config.rope_parameters["rope_theta"] == 1e6 and rows["given", "rope_theta"] == "1e+06"
    sections = {"rope_type": "default", "mrope_section": [1, 1, 2], "type": "mrope"}
    config, rows = imported_with("AngelSlim", **stored, rope_scaling=sections)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert ("dropped", "mrope_section") in rows and ("assumed", "rope_theta") not in rows
    assert imported_with("SpecForge", **stored)[0].rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize(("stored", "year"), [(True, "until 2026-09"), (False, "since 2026-09")])
def test_specforge_changed_what_norm_output_means(stored, year):
    config, rows = imported_with("SpecForge", norm_output=stored)
    assert not config.norm_output and year in rows["assumed", "norm_output"]
    config, rows = imported_with("SpecForge", Known(norm_output=True), norm_output=stored)
    assert config.norm_output and rows["given", "norm_output"] == "True: normed states are fed back"
    assert ("assumed", "norm_output") not in rows


def test_a_missing_norm_before_residual_is_said_and_can_be_given():
    config, rows = imported_with("speculators")
    assert not config.norm_before_residual and "vLLM takes true" in rows["assumed", "norm_before_residual"]
    config, rows = imported_with("speculators", Known(norm_before_residual=True))
    assert config.norm_before_residual and ("given", "norm_before_residual") in rows


@pytest.mark.parametrize(
    ("dialect", "field", "ids", "taps", "means"),
    [
        # of 8 layers EAGLE-3's default is [2, 4, 5], as outputs of blocks [1, 3, 4]
        ("vLLM", "eagle_aux_hidden_state_layer_ids", [1, 3, 4], [1, 3, 4], "outputs of blocks"),
        ("SpecForge", "eagle_config", [2, 4, 5], [3, 5, 6], "hidden states"),
        ("Model-Optimizer", "eagle_config", [1, 4, 8], [1, 4, 8], None),  # a block 8 would be the ninth
    ],
)
def test_ids_that_another_reading_would_make_the_default_or_possible_are_said(dialect, field, ids, taps, means):
    value = {"eagle_aux_hidden_state_layer_ids": ids} if field == "eagle_config" else ids
    fields = {"eagle_config": None, field: value}
    config, rows = imported_with(dialect, **fields)
    assert config.target_taps == taps
    said = rows["assumed", "target_taps"]
    assert f"if its trainer meant {means}" in said and "--taps 2,4,5" in said if means else "no block of 8" in said
    assert imported_with(dialect, Known(taps=[2, 4, 5]), **fields)[0].target_taps == [2, 4, 5]


@pytest.mark.parametrize("name", ["Eagle3MiniMaxM2", "Eagle3Qwen2_5vl", "Eagle3Qwen3vl"])
def test_class_names_that_vllm_maps_to_the_llama_class(name):
    config, rows = imported_with("vLLM", architectures=[f"{name}ForCausalLM"], model_type="qwen2")
    assert config.target_taps == [1, 3, 6]
    _, angelslim, tensors = checkpoint("AngelSlim")
    assert detect({**angelslim, "architectures": [f"{name}ForCausalLM"]}, tensors) == "AngelSlim"


def test_a_prefix_of_names_and_the_targets_model_type_around_a_llama_layer():
    drafter, config, tensors = checkpoint("SGLang")
    prefixed = {name if name.startswith(("d2t", "lm_head")) else f"model.{name}": t for name, t in tensors.items()}
    imported = to_ppow({**config, "model_type": "phi3"}, prefixed, TARGET, PPOWDrafter)
    assert ("mapped", "model.*") in {(row.action, row.what) for row in imported.rows}
    assert torch.equal(
        imported.tensors["layers.0.mlp.up_proj.weight"], drafter.state_dict()["layers.0.mlp.up_proj.weight"]
    )


def test_sglangs_former_names_of_norms():
    drafter, (config, tensors) = build("fc_norm"), export(build("fc_norm"), "sglang")
    weights = drafter.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc_norm")}
    tensors |= {f"aux_norm_{n}.weight": weights[f"fc_norm.{i}.weight"] for i, n in enumerate(("low", "mid", "high"))}
    del config["fc_norm"]
    imported = to_ppow({**config, "use_aux_norm": True}, tensors, TARGET, PPOWDrafter)
    assert imported.config.fc_norm
    assert torch.equal(imported.tensors["fc_norm.1.weight"], weights["fc_norm.1.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_checkpoints(tmp_path, name):
    drafter, config, tensors = checkpoint("SpecForge")
    stem, _, ending = name.partition(".")
    shards = {f"{stem}-{i}.{ending}": dict(list(tensors.items())[i::2]) for i in (0, 1)}
    for shard, part in shards.items():
        write(tmp_path, config, part, shard)
    places = {tensor: shard for shard, part in shards.items() for tensor in part}
    (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(logits(PPOWDrafter.from_pretrained(tmp_path, target=TARGET)), logits(drafter))
    (tmp_path / f"{stem}-1.{ending}").unlink()
    with pytest.raises(ValueError, match=f"names '{stem}-1.{ending}', which is not beside it"):
        import_checkpoint(str(tmp_path), TARGET, PPOWDrafter)
    (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "../else.safetensors"}}))
    with pytest.raises(ValueError, match="which is not beside it"):
        import_checkpoint(str(tmp_path), TARGET, PPOWDrafter)


# -- bad input ---------------------------------------------------------------------------------------------------------


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def without(name):
    return lambda config, tensors: tensors.pop(name)


def put(name, tensor):
    return lambda config, tensors: tensors.update({name: tensor})


def say(**fields):
    return lambda config, tensors: config.update(fields)


def absolute(config, tensors):
    tensors["d2t"] = tensors["d2t"] + torch.arange(D)


BAD = {
    "unknown format": (say(architectures=["MistralForCausalLM"]), "Unknown format: architectures=.'Mistral"),
    "speculators, another type": (say(speculators_model_type="mtp"), "speculators checkpoint of type 'mtp'"),
    "another model": (lambda c, t: t.clear(), "Unknown format"),
    "no fc": (without("fc.weight"), "lacks fc.weight"),
    "no head": (without("lm_head.weight"), "lacks lm_head.weight: .* one that borrows them from its target"),
    "no norm": (without("midlayer.hidden_norm.weight"), "lacks layers.0.hidden_norm.weight"),
    "no vocabulary": (without("d2t"), "d2t is missing: nothing says which 24 of the 40"),
    "too much": (put("band0_mix", torch.ones(3)), "has band0_mix besides"),
    "wrong shape": (
        put("midlayer.mlp.up_proj.weight", torch.ones(47, HT)),
        r"layers.0.mlp.up_proj.weight \[47, 32\] instead of \[48, 32\]",
    ),
    "half heads": (put("midlayer.self_attn.k_proj.weight", torch.ones(15, 2 * HT)), "not whole heads of size 8"),
    "integer weights": (
        put("norm.weight", torch.ones(HT, dtype=torch.long)),
        "Weights must be of torch.float16.* got torch.float32, torch.int64",
    ),
    "absolute ids": (absolute, r"d2t holds absolute token ids.*d2t - torch.arange\(len\(d2t\)\)"),
    "damaged d2t": (put("d2t", torch.full((D,), 99)), "do not describe 24 distinct tokens"),
    "d2t of floats": (put("d2t", torch.zeros(D)), "d2t must be int64"),
    "another depth": (
        say(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}),
        r"target_taps=\[2, 16, 29\] must be strictly increasing hidden-state indices in 0..8",
    ),
    "taps that disagree": (
        say(aux_hidden_states_layer_ids=[1, 2, 3], eagle_aux_hidden_state_layer_ids=[1, 2, 3]),
        "tap fields of this checkpoint disagree",
    ),
    "taps that are too few": (
        say(eagle_aux_hidden_state_layer_ids=[1, 2]),
        r"fc reads 96 values, 48 for each of the taps \[1, 2\] that the checkpoint names; .* hidden size is 32",
    ),
    "one feature": (say(eagle_config={"use_aux_hidden_state": False}), "EAGLE-1/2; not EAGLE-3"),
    "one feature, and so no fc": (
        lambda c, t: (c.update(eagle_config={"use_aux_hidden_state": False}), t.pop("fc.weight")),
        "EAGLE-1/2; not EAGLE-3",
    ),
    "sliding window": (say(layer_types=["sliding_attention"]), "attends to a sliding window"),
    "quantized": (say(quantization_config={"bits": 4}), "is quantized"),
    "mixture": (say(model_type="mixtral"), "layers of type 'mixtral'"),
    "unknown RoPE": (say(rope_scaling={"rope_type": "swirl", "factor": 2.0}), "RoPE of type 'swirl'"),
    "a string for a number": (say(rms_norm_eps="abc"), "rms_norm_eps='abc' in config.json is of the wrong type"),
    "a string for a table": (say(eagle_config="x"), "eagle_config='x' in config.json is of the wrong type"),
    "taps that are no list": (say(eagle_config={"eagle_aux_hidden_state_layer_ids": 3}), "=3 .* wrong type"),
    "taps that are no numbers": (say(eagle_aux_hidden_state_layer_ids=[None, 2, 3]), "None, 2, 3.* wrong type"),
    "negative heads": (say(num_attention_heads=-4), "not whole heads"),
    "RoPE without its factor": (say(rope_scaling={"rope_type": "yarn"}), "Missing required keys .*factor"),
    "a number for a tensor": (put("t2d", torch.tensor(True)), "t2d is a single number"),
    "a PPOW drafter": (say(model_type="ppow"), "a PPOW drafter already"),
    "both norms": (say(fc_norm=True, norm_before_fc=True), "norm_before_fc with fc_norm"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_by_name(case):
    _, config, tensors = checkpoint("EAGLE")
    spoil, message = BAD[case]
    spoil(config, tensors)
    with pytest.raises(ValueError, match=message):
        to_ppow(config, tensors, TARGET, PPOWDrafter)


def test_absolute_ids_are_seen_without_t2d_too():
    _, config, tensors = checkpoint("Model-Optimizer")
    absolute(config, tensors)
    with pytest.raises(ValueError, match="absolute token ids|do not describe"):
        to_ppow(config, tensors, TARGET, PPOWDrafter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 40}, "made for another target: its fc reads 96 features, .* hidden size 40"),
        ({"hidden_size": 16}, r"fc reads 96 values, 32 for each of the taps \[2, 4, 5\] .* hidden size is 16"),
        ({"vocab_size": V + 8}, "t2d covers 40 tokens, the target's vocabulary 48: .* another target"),
        ({"num_hidden_layers": 5}, r"EAGLE-3's default \[2, 2, 2\] does not fit"),
    ],
)
def test_a_target_that_does_not_match(changes, message):
    _, config, tensors = checkpoint("EAGLE")
    with pytest.raises(ValueError, match=message):
        to_ppow(config, tensors, LlamaConfig(**{**TARGET.to_dict(), **changes}), PPOWDrafter)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_weights(tmp_path, name):
    _, config, tensors = checkpoint("EAGLE")
    folder = write(tmp_path, config, tensors, name)
    for share in (0.5, 0.0):
        (folder / name).write_bytes((folder / name).read_bytes()[: int(share * 20000)])
        with pytest.raises(ValueError, match="damaged"):
            PPOWDrafter.from_pretrained(folder, target=TARGET)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x))])
def test_pickled_code_is_never_run(tmp_path, save):
    _, config, tensors = checkpoint("EAGLE")
    folder = write(tmp_path, config, {"fc.weight": tensors["fc.weight"]})
    (folder / "model.safetensors").unlink()
    save({**tensors, "norm.weight": Evil(tmp_path / "was-here")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds pickled code .* as safetensors"):
        PPOWDrafter.from_pretrained(folder, target=TARGET)
    assert not (tmp_path / "was-here").exists()


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        import_checkpoint(str(tmp_path / "nowhere"), TARGET, PPOWDrafter)
    with pytest.raises(ValueError, match="has no config.json"):
        import_checkpoint(str(tmp_path), TARGET, PPOWDrafter)
    _, config, tensors = checkpoint("EAGLE")
    write(tmp_path, config, tensors)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        import_checkpoint(str(tmp_path), TARGET, PPOWDrafter)
    for text, message in (("{", "is not valid JSON"), ("[]", "must hold a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            import_checkpoint(str(tmp_path), TARGET, PPOWDrafter)
    write(tmp_path, config, [1, 2], "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a dict of tensors"):
        import_checkpoint(str(tmp_path), TARGET, PPOWDrafter)


def test_a_target_that_is_no_language_model():
    with pytest.raises(ValueError, match="ViTConfig lacks vocab_size"):
        to_ppow(*checkpoint("EAGLE")[1:], ViTConfig(), PPOWDrafter)


def test_a_foreign_drafter_without_its_target_says_what_to_do(tmp_path):
    _, config, tensors = checkpoint("EAGLE")
    with pytest.raises(ValueError, match=r"say for which target: PPOWDrafter.from_pretrained\(\.\.\., target="):
        PPOWDrafter.from_pretrained(write(tmp_path, config, tensors))


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a tiny target and of a drafter for it that every format can express."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    target = LlamaForCausalLM(TARGET)
    with torch.no_grad():
        target.get_input_embeddings().weight.copy_(EMBEDDINGS)
    target.save_pretrained(folder / "target")
    build().save_pretrained(folder / "drafter")
    return folder / "target", folder / "drafter"


def ppow(*argv) -> int:
    return cli.main([str(part) for part in argv])


def test_a_dry_run_prints_the_table_and_writes_nothing(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target, drafter = pair
    assert ppow("export", drafter, "--format", "sglang", "--target", target, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "format   sglang, 15 tensors",
        "dropped  embed_tokens  equal to the target's, which SGLang uses anyway",
        "mapped   target_taps   left out: [2, 4, 5] is the default",
    ]
    source = write(tmp_path / "in" / "foreign", *checkpoint("AngelSlim")[1:])
    assert ppow("import", source, "--target", target, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "format   AngelSlim, 16 tensors"
    assert "mapped   aux_hidden_states_layer_ids  target_taps [2, 4, 5] (hidden states entering these blocks)" in lines
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


SERVE = {
    "vllm": 'vllm serve {target} --speculative-config \'{{"method": "eagle3", "model": "{drafter}", '
    '"num_speculative_tokens": 10}}\'',
    "sglang": "python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 "
    "--speculative-draft-model-path {drafter} --speculative-num-steps 10 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 11",
}


def test_a_head_that_is_the_targets_is_stored_in_every_format(pair, tmp_path, capsys):
    target, _ = pair
    drafter = build("the target's embeddings and head")
    drafter.save_pretrained(tmp_path / "drafter")
    assert ppow("export", tmp_path / "drafter", "--format", "vllm", "--out", tmp_path / "no") == 2
    assert "lm_head: engines want it stored, and it is the target's: give --target" in capsys.readouterr().err
    assert ppow("export", tmp_path / "drafter", "--format", "vllm", "--target", target, "--out", tmp_path / "out") == 0
    assert "mapped   lm_head" in capsys.readouterr().out
    head = LlamaForCausalLM.from_pretrained(target).get_output_embeddings().weight
    stored = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(stored, head[drafter.draft_columns()]) and not torch.equal(head, EMBEDDINGS)


@pytest.mark.parametrize("form", FOLDERS)
def test_export_prints_how_to_serve_and_import_brings_it_back(pair, tmp_path, monkeypatch, capsys, form):
    monkeypatch.chdir(tmp_path)
    target, drafter = pair
    assert ppow("export", drafter, "--format", form, "--target", target) == 0
    out = tmp_path / f"drafter-{form}"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    command = capsys.readouterr().out.splitlines()[-1]
    if expected := SERVE.get("vllm" if form == "speculators" else form):
        assert command == expected.format(target=target, drafter=out) and shlex.split(command)
    assert ppow("import", out, "--target", target) == 0
    back = PPOWDrafter.from_pretrained(tmp_path / f"drafter-{form}-ppow")
    assert torch.equal(logits(back), logits(PPOWDrafter.from_pretrained(drafter)))
    assert (tmp_path / f"drafter-{form}-ppow" / "custom_generate" / "generate.py").is_file()
    assert {path.suffix for path in (tmp_path / f"drafter-{form}-ppow").iterdir()} <= {
        ".json",
        ".safetensors",
        ".py",
        "",
    }


def test_a_foreign_drafter_exports_without_a_stop(pair, tmp_path):
    source = write(tmp_path / "specforge", *checkpoint("SpecForge")[1:])
    assert ppow("export", source, "--format", "vllm", "--target", pair[0], "--out", tmp_path / "vllm") == 0
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6] and config["norm_before_residual"] is False


@pytest.mark.parametrize("form", FOLDERS)
def test_export_refuses_a_target_that_the_drafter_does_not_fit(pair, tmp_path, capsys, form):
    target, drafter = pair
    for changes, message in (
        ({"hidden_size": 64}, "hidden size 32 in the drafter, 64 in the target"),
        ({"vocab_size": V + 8}, "vocabulary 40 in the drafter, 48 in the target"),
        ({"num_hidden_layers": 9}, "layer count 8 in the drafter, 9 in the target"),
    ):
        other = tmp_path / "other"
        LlamaConfig(**{**TARGET.to_dict(), "head_dim": None, **changes}).save_pretrained(other)
        assert ppow("export", drafter, "--format", form, "--target", other, "--out", tmp_path / "out") == 2
        shown = capsys.readouterr()
        assert message in shown.err and "serve" not in shown.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["drafter", "target"])
def test_export_names_a_truncated_file(pair, tmp_path, capsys, part):
    folders = {"target": pair[0], "drafter": pair[1]}
    folders[part] = shutil.copytree(folders[part], tmp_path / part)
    file = folders[part] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert ppow("export", folders["drafter"], "--format", "sglang", "--target", folders["target"], "--dry-run") == 2
    assert f"{file} is damaged or truncated" in capsys.readouterr().err


def test_nothing_is_half_written(pair, tmp_path, monkeypatch, capsys):
    target, drafter = pair
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    arguments = ("export", drafter, "--format", "vllm", "--target", target, "--out")
    assert ppow(*arguments, tmp_path / "taken") == 2
    assert "exists and is not empty" in capsys.readouterr().err

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def full_for_weights(*_, **__):
        raise SafetensorError("No space left on device")

    # the weights fail; then they are there, and the configuration fails
    for place, name, fail in ((convert, "save_file", full_for_weights), (Path, "write_text", full)):
        monkeypatch.setattr(place, name, fail)
        assert ppow(*arguments, tmp_path / "out") == 2
        assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    assert ppow(*arguments, tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["import", "x"], "import needs --target"),
        (["import", "x", "y", "--target", "t"], "unexpected argument 'y'"),
        (
            ["export", "x", "--format", "onnx"],
            "format must be one of speculators, vllm, sglang, specforge, eagle, gguf",
        ),
        (["export", "x", "--format", "gguf", "--target", "t"], "give --target the GGUF file of the target"),
    ],
)
def test_mistakes_on_the_command_line(argv, message, capsys):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_help_shows_the_source_without_its_key(capsys):
    with pytest.raises(SystemExit):
        convert.ImportConfig.from_args(["--help"])
    assert "usage: ppow import SOURCE --target TARGET [options]" in capsys.readouterr().out


# -- a drafter's repository, with this package and without it ---------------------------------------------------------

ALONE = """
import json, sys
import torch
from transformers import AutoModel, AutoModelForCausalLM
package, target, repository, foreign = sys.argv[1:]
if package == "without":
    sys.modules["ppow"] = None  # however it is installed here, it cannot be imported
target = AutoModelForCausalLM.from_pretrained(target)
drafter = AutoModel.from_pretrained(repository, trust_remote_code=True)
options = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}
out = target.generate(torch.tensor([[5, 9, 7]]), assistant_model=drafter, **options)
try:
    read = type(drafter).from_pretrained(foreign, target=target)
    assert type(read) is type(drafter) and type(read.config) is type(drafter).config_class
    expected = drafter.state_dict()
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in read.state_dict().items()) and not expected
    said = "read"
except ValueError as error:
    said = str(error)
print(json.dumps([out.sequences.tolist(), out.acceptance.gained, said]))
"""


@pytest.mark.parametrize("package", ["with", "without"])
def test_a_repository_drafts_without_the_package_and_reads_other_trainers_formats_with_it(pair, tmp_path, package):
    target_folder, repository = pair
    assert {path.name for path in repository.glob("*.py")} == {
        path.name for path in (ROOT / "modeling_ppow").glob("*_ppow.py")
    }
    drafter = PPOWDrafter.from_pretrained(repository)
    foreign = write(tmp_path / "foreign", *export(drafter, "vllm"))
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, package, target_folder, repository, foreign],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    tokens, gained, said = json.loads(done.stdout.splitlines()[-1])
    target = AutoModelForCausalLM.from_pretrained(target_folder)
    options = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}
    out = target.generate(torch.tensor([[5, 9, 7]]), assistant_model=drafter, **options)
    assert tokens == out.sequences.tolist() and gained == out.acceptance.gained
    if package == "with":
        assert said == "read"
    else:
        assert said.startswith(f"{foreign} is no PPOW drafter (model_type 'llama' in its config.json). ")
        assert "is read by the package `ppow`, which is not installed here (" in said and "`pip install .`" in said


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_the_eagle_dialect_has_no_field_for_other_taps(tmp_path, capsys):
    pair = small_pair.DRAFTER, "--target", small_pair.TARGET
    assert ppow("export", *pair, "--format", "eagle", "--out", tmp_path / "eagle") == 2
    assert "its code reads [2, L // 2, L - 3]" in capsys.readouterr().err and not (tmp_path / "eagle").exists()


@pytest.mark.parametrize("form", [form for form in FOLDERS if form != "eagle"])
def test_a_trained_drafter_drafts_the_same_after_a_round_trip(tmp_path, form):
    target_folder, drafter_folder = small_pair.TARGET, small_pair.DRAFTER
    assert ppow("export", drafter_folder, "--format", form, "--target", target_folder, "--out", tmp_path / form) == 0
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    chat = [{"role": "user", "content": "How many apples does Tom have left?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"do_sample": False, "max_new_tokens": 40}
    expected = target.generate(**inputs, **options)
    accepted = []
    for drafter in (
        PPOWDrafter.from_pretrained(drafter_folder, dtype=torch.float32),
        PPOWDrafter.from_pretrained(tmp_path / form, target=target, dtype=torch.float32),
    ):
        drafter.generation_config.draft_threshold = 0.0  # no dialect has a field for it
        out = target.generate(**inputs, **options, assistant_model=drafter, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected)
        accepted.append(out.acceptance.gained)
    assert accepted[0] == accepted[1] and out.acceptance.acceptance_length > 1.5


def test_reinforce_goes_on_from_an_imported_drafter(tmp_path, tiny_tokenizer):
    target = LlamaForCausalLM(LlamaConfig(**{**TARGET.to_dict(), "vocab_size": len(tiny_tokenizer)}))
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer.save_pretrained(tmp_path / "target")
    drafter = PPOWDrafter(PPOWConfig.from_target(target.config, draft_vocab_size=200, target_taps=[1, 3, 6]))
    exported = from_ppow(drafter.config, drafter.state_dict(), "specforge")
    write(tmp_path / "foreign", exported.config, exported.tensors)
    assert ppow("import", tmp_path / "foreign", "--target", tmp_path / "target", "--out", tmp_path / "ours") == 0
    messages = [{"role": "user", "content": "Add 1."}, {"role": "assistant", "content": "One and two make three. " * 3}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 4)
    values = {
        "target": str(tmp_path / "target"),
        "drafter": str(tmp_path / "ours"),
        "data": str(tmp_path / "chats.jsonl"),
        "output_dir": str(tmp_path / "stage2"),
        "steps": 2,
        "batch_size": 2,
        "save_every": 2,
        "max_length": 128,
        "window_size": 4,
        "group_size": 3,
        "learning_rate": 1e-3,
        "preset": "cst",  # random weights leave LK nothing to learn: Q is above P on the whole draft vocabulary
    }
    from ppow.training import reinforce

    reinforce.main(ReinforceConfig.from_dict(values))
    trained = PPOWDrafter.from_pretrained(tmp_path / "stage2", dtype=torch.float32).state_dict()
    assert not torch.equal(trained["fc.weight"], drafter.state_dict()["fc.weight"])
    assert torch.equal(trained["d2t"], drafter.state_dict()["d2t"])


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(START)[0], page.partition(END)[2]
    PAGE.write_text(before + START + table() + END + after, encoding="utf-8")
