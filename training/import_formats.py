"""EAGLE-3 checkpoints of other trainers: which dialect they speak, and what their tensors and fields mean here.

The architecture is one, the dialects are many: EAGLE, SpecForge, AngelSlim, speculators (old and new), Model-Optimizer,
and the layouts that vLLM, SGLang and llama.cpp read. They differ in names (``midlayer`` or ``layers.0``), in what they
leave to the target (embeddings, vocabulary maps, positions), and in what their explicit tap ids count:

    speculators, vLLM, llama.cpp                       id i is the hidden state ENTERING block i, as here
    SpecForge, Model-Optimizer, AngelSlim, SGLang      id i is the OUTPUT of block i, here i + 1
    no ids                                             [2, L // 2, L - 3] entering, everywhere
    ids up to L                                        hidden states, whoever wrote them: no block L has an output

What a checkpoint leaves open is assumed, in a row of its own, and :class:`Known` overrides it.

Shapes come from the tensors and the target, never from the checkpoint's own configuration. The other direction is
``export_formats``; ``convert`` reads the files.

Not included: EAGLE-1 and 2, MLA drafters (Kimi, DeepSeek), sliding windows, quantized weights.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ppow import PPOWConfig

from .foreign_files import Tensors
from .gguf_format import ARCHITECTURE

_LEGACY_NAMES = {
    "midlayer.": "layers.0.",
    "aux_norm_low.": "fc_norm.0.",  # SGLang's former names
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
_OTHER_NAMES = [f"Eagle3{name}ForCausalLM" for name in ("MiniMaxM2", "Qwen2_5vl", "Qwen3vl")]  # vLLM: the same class
_BY_ARCHITECTURE: dict[tuple[str, str | None], str] = {
    ("midlayer", None): "EAGLE",
    ("midlayer", "LlamaForCausalLM"): "EAGLE",
    ("midlayer", "LlamaForCausalLMEagle3"): "SpecForge",
    ("midlayer", "Eagle3LlamaForCausalLM"): "AngelSlim",
    ("layers", "LlamaForCausalLMEagle3"): "SGLang",
    ("layers", "Eagle3LlamaForCausalLM"): "vLLM",
    ("layers", "Eagle3Qwen3ForCausalLM"): "vLLM",
    ("layers", ARCHITECTURE): "llama.cpp",  # a GGUF file's
    **dict.fromkeys((("layers", name) for name in _OTHER_NAMES), "vLLM"),
    **dict.fromkeys((("midlayer", name) for name in _OTHER_NAMES), "AngelSlim"),
}
# Some write their target's model_type around what is, by its architecture and its tensors, a Llama layer.
_MODEL_TYPES = {"llama", "qwen3", "eagle", "qwen2", "phi3", "mistral", "minimax_m2"}
_MODEL_TYPES |= {f"{name}{end}" for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl") for end in ("", "_text")}
ANGELSLIM_ROPE_THETA = 10000.0
_LAYER_FIELDS = (
    "head_dim",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
_TYPES: dict[str, type | tuple[type, ...]] = {  # of the fields that are read, wherever they are; null is absent
    **dict.fromkeys(("dflash_config", "eagle_config", "rope_parameters", "rope_scaling", "speculators_config"), dict),
    **dict.fromkeys(("transformer_layer_config", "verifier"), dict),
    **dict.fromkeys(("architectures", "layer_types"), list),
    **dict.fromkeys(("aux_hidden_states_layer_ids", "eagle_aux_hidden_state_layer_ids", "target_layers"), list),
    **dict.fromkeys(("head_dim", "max_position_embeddings", "num_attention_heads"), int),
    **dict.fromkeys(("initializer_range", "partial_rotary_factor", "rms_norm_eps", "rope_theta"), (int, float)),
    "hidden_act": str,
}
UNSCALED_ROPE = ("default", "linear", "llama3")  # types whose frequencies ignore max_position_embeddings
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Row(NamedTuple):
    """One line of the report: what was ``mapped``, ``dropped``, ``assumed`` or ``given`` by the user, and how."""

    action: str
    what: str
    how: str


class Known(NamedTuple):
    """What a user knows of a checkpoint and it does not say, or says wrongly; None: as it is read or assumed.

    ``taps`` are hidden-state indices, as :class:`PPOWConfig` has them.
    """

    rope_theta: float | None = None
    norm_output: bool | None = None
    norm_before_residual: bool | None = None
    taps: list[int] | None = None


READ = Known()  # nothing: everything as it is read or assumed


@dataclass
class Imported:
    """A foreign checkpoint as a PPOW drafter: its configuration, its tensors under our names, and the report."""

    dialect: str
    config: PPOWConfig
    tensors: Tensors
    rows: list[Row]


def detect(config: dict, names: Iterable[str]) -> str:
    """The dialect of a checkpoint, from its configuration and tensor names. Raises ValueError for an unknown one."""
    if config.get("model_type") == PPOWConfig.model_type:
        raise ValueError("This is a PPOW drafter already: use it as it is, there is nothing to import.")
    names = set(names)
    architecture = (config.get("architectures") or [None])[0]
    if "speculators_model_type" in config:
        if config["speculators_model_type"] != "eagle3":
            raise ValueError(
                f"This is a speculators checkpoint of type {config['speculators_model_type']!r}; only 'eagle3' is one "
                "that PPOW can run."
            )
        return "speculators" if architecture == "Eagle3DraftModel" else "speculators (old)"
    prefix = "midlayer" if any(name.startswith("midlayer.") for name in names) else "layers"
    dialect = _BY_ARCHITECTURE.get((prefix, architecture))
    if dialect == "SGLang" and "use_last_layernorm" in (config.get("eagle_config") or {}):
        dialect = "Model-Optimizer"
    if dialect is None or f"{prefix}{'.0' * (prefix == 'layers')}.self_attn.q_proj.weight" not in names:
        known = ", ".join(sorted({name for _, name in _BY_ARCHITECTURE if name}))
        raise ValueError(
            f"Unknown format: architectures={config.get('architectures')} with tensors such as "
            f"{', '.join(sorted(names)[:4])}. Known are speculators' eagle3 checkpoints and {known}, with tensors "
            "midlayer.* or layers.0.*; EAGLE-1/2 and MLA drafters are other architectures."
        )
    return dialect


def to_ppow(
    config: dict,
    tensors: Tensors,
    target_config: PreTrainedConfig,
    drafter_class: type[PreTrainedModel],
    known: Known = READ,
) -> Imported:
    """Translate a checkpoint as read, its config.json and its tensors under their own names; they are not copied.

    Raises:
        ValueError: unknown format, missing, superfluous or misshapen tensors, fields that PPOW cannot express, or a
            target whose width, vocabulary or depth does not fit.
    """
    check_types(config)
    if (config.get("eagle_config") or {}).get("use_aux_hidden_state") is False:
        raise ValueError("use_aux_hidden_state=false: this drafter reads one hidden state, as EAGLE-1/2; not EAGLE-3.")
    rows: list[Row] = []
    if any(name.startswith("model.") for name in tensors):
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        rows.append(Row("mapped", "model.*", "without the prefix"))
    dialect = detect(config, tensors)
    text = target_config.get_text_config(decoder=True)
    if missing := [key for key in ("vocab_size", "max_position_embeddings") if not hasattr(text, key)]:
        raise ValueError(f"The target's {type(text).__name__} lacks {', '.join(missing)}: no decoder-only target.")
    tensors = _rename(tensors, rows)
    fields = config.get("transformer_layer_config") or {} if dialect.startswith("speculators") else config
    norms = _norms(dialect, config, known, rows)
    refuse_foreign(config, fields, norms)
    pruned = _vocabulary(tensors, text.vocab_size, rows)
    width = tensors["norm.weight"].shape[0]
    shared = "embed_tokens.weight" not in tensors and width == text.hidden_size
    if shared:
        rows.append(Row("assumed", "embed_tokens", "not stored: the target's are used"))
    if fields.get("tie_word_embeddings"):
        rows.append(Row("dropped", "tie_word_embeddings", "a head of its own is stored"))
    result = drafter_class.config_class.from_target(
        target_config,
        vocab_size=text.vocab_size,
        draft_vocab_size=tensors["lm_head.weight"].shape[0] if pruned else text.vocab_size,
        hidden_size=width,
        intermediate_size=tensors["layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in tensors if name.startswith("layers.")}),
        attention_bias="layers.0.self_attn.q_proj.bias" in tensors,
        qk_norm="layers.0.self_attn.q_norm.weight" in tensors,
        target_taps=_taps(dialect, config, known, tensors["fc.weight"].shape[1], text, rows),
        share_target_embeddings=shared,
        **norms,
        **attention_shape(tensors, fields, text, rows),
        **layer_fields(dialect, fields, known, text, rows),
    )
    result.dtype = stored_dtype(tensors, rows)
    with torch.device("meta"):
        check_tensors(tensors, drafter_class(result).state_dict())
    verifier = ((config.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path")
    if verifier and verifier != result.target_name_or_path:
        rows.append(Row("assumed", "target", f"trained for {verifier}, taken to be the one given"))
    return Imported(dialect, result, tensors, rows)


def check_types(config: dict) -> None:
    """That the fields of a config.json, nested ones too, have the types that the rest of this module relies on."""
    for key, value in config.items():
        expected = _TYPES.get(key, object)
        wrong = value is not None and (not isinstance(value, expected) or isinstance(value, bool) and key in _TYPES)
        if key.endswith("_layer_ids") and not wrong:
            wrong = any(type(tap) is not int for tap in value or ())
        if wrong:
            raise ValueError(f"{key}={value!r} in config.json is of the wrong type; correct it and import again.")
        if isinstance(value, dict):
            check_types(value)


def _rename(tensors: Tensors, rows: list[Row]) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        own = name
        for legacy, ours in _LEGACY_NAMES.items():
            own = ours + own.removeprefix(legacy) if own.startswith(legacy) else own
        if own.startswith(("verifier_", "rotary_emb.")) or own.endswith(".rotary_emb.inv_freq"):
            rows.append(Row("dropped", name, "not part of the drafter"))
            continue
        if re.fullmatch(r"layers\.[1-9]\d*\.hidden_norm\.weight", own):  # SGLang's name for it in further layers
            own = own.replace("hidden_norm", "input_layernorm")
        if tensor.dim() == 0:
            raise ValueError(f"{name} is a single number, no weight of a drafter: the checkpoint is damaged.")
        if own in renamed:
            raise ValueError(f"Two tensors of this checkpoint mean {own}, {name} among them; it cannot be told apart.")
        renamed[own] = tensor
    if "fc_norm.0.weight" in renamed and any(name.startswith("aux_norm") for name in tensors):
        rows.append(Row("mapped", "aux_norm_low, _mid, _high", "fc_norm.0, .1, .2"))
    if any(name.startswith("midlayer.") for name in tensors):
        rows.append(Row("mapped", "midlayer.*", "layers.0.*"))
    if any(re.match(r"layers\.[1-9]\d*\.hidden_norm\.", name) for name in tensors):
        rows.append(Row("mapped", "layers.1.hidden_norm, ...", "layers.1.input_layernorm, ..."))
    _require(renamed)
    return renamed


def _require(tensors: Tensors) -> None:
    """That the tensors are there, and matrices or vectors, from which the drafter's shape is read."""
    dims = {"fc": 2, "norm": 1, "lm_head": 2, "layers.0.mlp.gate_proj": 2}
    dims |= {f"layers.0.self_attn.{name}_proj": 2 for name in "qk"}
    if missing := [f"{name}.weight" for name in dims if f"{name}.weight" not in tensors]:
        raise ValueError(
            f"This checkpoint lacks {', '.join(missing)}: it is incomplete, no EAGLE-3 drafter, or one that borrows "
            "them from its target, which PPOW drafters do for embeddings only."
        )
    for name, dim in dims.items():
        shape = list(tensors[f"{name}.weight"].shape)
        if len(shape) != dim or 0 in shape:
            raise ValueError(f"{name}.weight has shape {shape}; expected {dim} dimensions, none of them empty.")


def _norms(dialect: str, config: dict, known: Known, rows: list[Row]) -> dict:
    """The four norm switches, which only the configuration knows (their weights are checked against them)."""
    fused = {**config, **(config.get("eagle_config") or {})}
    norms = {
        "norm_before_fc": bool(fused.get("norm_before_fc")),
        "fc_norm": bool(fused.get("fc_norm") or fused.get("use_aux_norm")),
        "norm_before_residual": bool(config.get("norm_before_residual")),
        "norm_output": bool(config.get("norm_output")),
    }
    if known.norm_before_residual is not None:
        norms["norm_before_residual"] = known.norm_before_residual
        rows.append(Row("given", "norm_before_residual", str(known.norm_before_residual)))
    elif "norm_before_residual" not in config and dialect.startswith("speculators"):
        how = "not stored: false, as speculators has it (vLLM takes true; --norm-before-residual does so here)"
        rows.append(Row("assumed", "norm_before_residual", how))
    elif "norm_before_residual" not in config and dialect == "vLLM":
        rows.append(Row("assumed", "norm_before_residual", "not stored: false, as vLLM has it"))
    if known.norm_output is not None:
        norms["norm_output"] = known.norm_output
        kind = "normed" if known.norm_output else "raw"
        rows.append(Row("given", "norm_output", f"{known.norm_output}: {kind} states are fed back"))
    elif dialect == "SpecForge" and "norm_output" in config:
        # Until September 2026 it told whether the head is normed, and raw states were fed back either way.
        if norms["norm_output"]:
            how = "true, as SpecForge meant it until 2026-09: norm before the head, raw states fed back; one trained "
            how += "since then feeds normed states back: give --norm-output"
        else:
            how = "false, as SpecForge means it since 2026-09: raw states fed back, norm before the head; one trained "
            how += "before has no norm there, which PPOW drafters always have"
        norms["norm_output"] = False
        rows.append(Row("assumed", "norm_output", how))
    return norms


def refuse_foreign(config: dict, fields: dict, norms: dict) -> None:
    """Raise a ValueError for what no drafter here can do: other layers, sliding windows, quantized weights."""
    if fields.get("model_type", "llama") not in _MODEL_TYPES:
        raise ValueError(
            f"Drafter layers of type {fields['model_type']!r} are not supported, only Llama's and Qwen3's (which some "
            f"write as one of {', '.join(sorted(_MODEL_TYPES))})."
        )
    if "sliding_attention" in (fields.get("layer_types") or ()) or fields.get("use_sliding_window"):
        raise ValueError("This drafter attends to a sliding window; PPOW drafters attend to everything.")
    if config.get("quantization_config"):
        raise ValueError("This drafter is quantized; import the checkpoint in 16 or 32 bit that it was made from.")
    if norms["norm_before_fc"] and norms["fc_norm"]:
        raise ValueError("norm_before_fc with fc_norm: serving engines run the former first, PPOW the latter.")


def _vocabulary(tensors: Tensors, vocab_size: int, rows: list[Row]) -> bool:
    """Check and complete ``d2t``/``t2d`` in place; whether the draft vocabulary is smaller than the target's."""
    size = tensors["lm_head.weight"].shape[0]
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    for name, tensor in (("t2d", t2d), ("embed_tokens.weight", tensors.get("embed_tokens.weight"))):
        if tensor is not None and tensor.shape[0] != vocab_size:
            raise ValueError(
                f"{name} covers {tensor.shape[0]} tokens, the target's vocabulary {vocab_size}: this drafter was made "
                "for another target."
            )
    if size > vocab_size:
        raise ValueError(f"lm_head covers {size} tokens, more than the target's vocabulary {vocab_size}.")
    if d2t is None:
        if size < vocab_size:
            raise ValueError(f"d2t is missing: nothing says which {size} of the {vocab_size} tokens are drafted.")
        return _drop_identity(tensors, rows)
    if d2t.shape != (size,) or d2t.is_floating_point() or d2t.dtype == torch.bool:
        raise ValueError(f"d2t must be int64 of shape [{size}], got {d2t.dtype} of shape {list(d2t.shape)}.")
    d2t = d2t.long()
    if size == vocab_size and not bool(d2t.any()):  # some then leave t2d unset
        return _drop_identity(tensors, rows)
    member = _membership(torch.arange(size) + d2t, vocab_size, t2d)
    # Offsets that grow at every step would mean that no two neighbouring tokens were chosen.
    suspicious = t2d is None and size >= 64 and bool((d2t.diff() > 0).all())
    if (member is None or suspicious) and _membership(d2t, vocab_size, t2d) is not None:
        raise ValueError(
            "d2t holds absolute token ids; EAGLE-3 stores offsets (target id = i + d2t[i]). Convert it with "
            "d2t - torch.arange(len(d2t)) and save the checkpoint again."
        )
    if member is None:
        raise ValueError(
            f"d2t and t2d do not describe {size} distinct tokens of a vocabulary of {vocab_size} (target id = "
            "i + d2t[i], t2d is membership): the checkpoint is damaged, or was made for another target."
        )
    if size == vocab_size:
        raise ValueError("d2t permutes a full draft vocabulary; PPOW drafters keep the target's order.")
    tensors["d2t"] = d2t
    tensors["t2d"] = member
    if t2d is None:
        rows.append(Row("mapped", "d2t", "t2d made from it"))
    return True


def _drop_identity(tensors: Tensors, rows: list[Row]) -> bool:
    for name in ("d2t", "t2d"):
        if tensors.pop(name, None) is not None:
            rows.append(Row("dropped", name, "the draft vocabulary is the target's"))
    return False


def _membership(ids: torch.Tensor, vocab_size: int, t2d: torch.Tensor | None) -> torch.Tensor | None:
    """(D,) token ids -> (V,) bool, or None unless they are distinct, in range and those of a stored ``t2d``."""
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        return None
    member = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    return member if int(member.sum()) == len(ids) and (t2d is None or torch.equal(member, t2d.bool())) else None


def _taps(dialect: str, config: dict, known: Known, width: int, text: PreTrainedConfig, rows: list[Row]) -> list[int]:
    """Hidden-state indices of the taps, ``width`` values together, from whichever field the dialect has."""
    count, rest = divmod(width, text.hidden_size)
    if rest or not count:
        raise ValueError(
            f"This drafter was made for another target: its fc reads {width} features, which is no multiple of the "
            f"target's hidden size {text.hidden_size}. Name the target that it was trained for."
        )
    layers = text.num_hidden_layers
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    fields = (
        ("eagle_config.eagle_aux_hidden_state_layer_ids", nested, dialect != "vLLM"),  # outputs of blocks, but in vLLM
        ("aux_hidden_states_layer_ids", config.get("aux_hidden_states_layer_ids"), 1),  # AngelSlim
        ("eagle_aux_hidden_state_layer_ids", config.get("eagle_aux_hidden_state_layer_ids"), 0),
        ("target_layers", config.get("target_layers"), 0),  # a GGUF file's
    )
    found = {name: _as_indices(ids, int(shift), layers, rows) for name, ids, shift in fields if ids}
    default = [2, layers // 2, layers - 3]
    if known.taps is not None:
        taps = known.taps
        rows.append(Row("given", "target_taps", f"{taps} (hidden states entering these blocks)"))
    elif len({tuple(taps) for taps in found.values()}) > 1:
        raise ValueError(
            f"The tap fields of this checkpoint disagree, as hidden-state indices: {found}. Say which: --taps."
        )
    elif found:
        name, taps = next(reversed(found.items()))
        rows.append(Row("mapped", name, f"target_taps {taps} (hidden states entering these blocks)"))
        for step, means in ((1, "outputs of blocks"), (-1, "hidden states")):
            if [tap + step for tap in taps] == default:  # as likely, and nothing in the checkpoint tells
                said = ",".join(map(str, default))
                how = f"{taps} as it stands; if its trainer meant {means}, these are EAGLE-3's default: --taps {said}"
                rows.append(Row("assumed", "target_taps", how))
    else:
        taps = default
        if count == 3 and sorted(set(taps)) != taps:
            raise ValueError(
                f"The checkpoint names no taps, and EAGLE-3's default {taps} does not fit a target of {layers} layers. "
                "Name its target, or give the taps (hidden-state indices) with --taps."
            )
        rows.append(Row("assumed", "taps", f"not stored: EAGLE-3's default, target_taps {taps}"))
    if len(taps) != count:
        raise ValueError(
            f"fc reads {width} values, {width / len(taps):g} for each of the taps {taps} that the checkpoint "
            f"{'names' if found else 'leaves to the default'}; this target's hidden size is {text.hidden_size}. Name "
            "the target that the drafter was trained for (is --target another one?), or, if this is it, give the taps "
            "(hidden-state indices) with --taps."
        )
    return taps


def _as_indices(ids: list[int], shift: int, layers: int, rows: list[Row]) -> list[int]:
    """Layer ids of a field that counts from ``shift`` -> hidden-state indices."""
    if shift and max(ids) == layers:
        how = f"{ids} as hidden states: no block of {layers} has an output {layers}, which is what leaves the last one"
        rows.append(Row("assumed", "target_taps", how))
        shift = 0
    return [tap + shift for tap in ids]


def attention_shape(tensors: Tensors, fields: dict, text: PreTrainedConfig, rows: list[Row]) -> dict:
    """Heads and head size, from the projections' widths and whichever of the two is known."""
    if not fields.get("num_attention_heads"):
        rows.append(Row("assumed", "num_attention_heads", f"not stored: the target's {text.num_attention_heads}"))
    width_q, width_k = (tensors[f"layers.0.self_attn.{name}_proj.weight"].shape[0] for name in "qk")
    heads = fields.get("num_attention_heads") or text.num_attention_heads
    size = width_q // max(heads, 1)
    if "layers.0.self_attn.q_norm.weight" in tensors:
        size = tensors["layers.0.self_attn.q_norm.weight"].shape[0]
    elif heads < 1 or width_q % heads or (fields.get("head_dim") or size) != size:
        size = fields.get("head_dim") or 0
    if not size or width_q % size or width_k % size:
        raise ValueError(
            f"q_proj and k_proj have {width_q} and {width_k} rows, which are not whole heads of size {size or '?'} "
            f"(num_attention_heads={heads}, head_dim={fields.get('head_dim')} in config.json); correct config.json."
        )
    return {"num_attention_heads": width_q // size, "num_key_value_heads": width_k // size, "head_dim": size}


def layer_fields(dialect: str, fields: dict, known: Known, text: PreTrainedConfig, rows: list[Row]) -> dict:
    """Norm epsilon, activation, RoPE and positions, with the defaults of the drafter's own configuration class."""
    given = {key: fields[key] for key in _LAYER_FIELDS if fields.get(key) is not None}
    sections = False  # of RoPE, for the axes of images; of a text all have the same position
    for key in ("rope_scaling", "rope_parameters"):
        if "mrope_section" in given.get(key, {}):
            sections, kind = True, given[key].get("rope_type", given[key].get("type"))
            plain = {name: value for name, value in given[key].items() if name != "type" and "mrope" not in name}
            given[key] = {**plain, "rope_type": "default" if kind in (None, "mrope") else kind}
            rows.append(Row("dropped", "mrope_section", "positions of a text are the same in every section"))
    config_class = Qwen3Config if fields.get("model_type") == "qwen3" else LlamaConfig
    try:
        layer = config_class(**given)
    except KeyError as error:  # transformers' word for a RoPE that lacks its parameters
        raise ValueError(f"config.json: {error.args[0]}.") from None
    rope = dict(layer.rope_parameters)
    kind, partial = rope["rope_type"], rope.pop("partial_rotary_factor", fields.get("partial_rotary_factor") or 1.0)
    if kind not in (*ROPE_INIT_FUNCTIONS, "default") or partial != 1.0:
        raise ValueError(f"RoPE of type {kind!r} with partial_rotary_factor {partial} is not supported.")
    if layer.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={layer.hidden_act!r} is not an activation that transformers knows.")
    if known.rope_theta is not None:
        rope["rope_theta"] = known.rope_theta
        rows.append(Row("given", "rope_theta", f"{known.rope_theta:g}"))
    elif dialect == "AngelSlim" and not sections and rope["rope_theta"] != ANGELSLIM_ROPE_THETA:
        how = f"{ANGELSLIM_ROPE_THETA:g}: its trainer ignores the stored {rope['rope_theta']:g}; else give --rope-theta"
        rows.append(Row("assumed", "rope_theta", how))
        rope["rope_theta"] = ANGELSLIM_ROPE_THETA
    elif "rope_theta" not in given and "rope_theta" not in given.get("rope_parameters", {}):
        rows.append(Row("assumed", "rope_theta", f"not stored: {rope['rope_theta']:g}"))
    if "rms_norm_eps" not in given:
        rows.append(Row("assumed", "rms_norm_eps", f"not stored: {layer.rms_norm_eps:g}"))
    positions = layer.max_position_embeddings
    if kind in UNSCALED_ROPE and positions < text.max_position_embeddings:
        positions = text.max_position_embeddings
        rows.append(Row("assumed", "max_position_embeddings", f"the target's {positions}"))
    return {
        "rms_norm_eps": layer.rms_norm_eps,
        "hidden_act": layer.hidden_act,
        "initializer_range": layer.initializer_range,
        "rope_parameters": rope,
        "max_position_embeddings": positions,
    }


def stored_dtype(tensors: Tensors, rows: list[Row]) -> torch.dtype:
    """The type that holds every weight without rounding."""
    found = {tensor.dtype for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    if not found <= set(_FLOATS):
        raise ValueError(
            f"Weights must be of {', '.join(map(str, _FLOATS))}, got {', '.join(sorted(map(str, found)))}: import the "
            "checkpoint that the quantized one was made from."
        )
    widest = functools.reduce(torch.promote_types, found)
    if len(found) > 1:
        rows.append(Row("assumed", "dtype", f"{widest}, which holds the stored {', '.join(sorted(map(str, found)))}"))
    return widest


def check_tensors(tensors: Tensors, expected: Tensors, kind: str = "EAGLE-3") -> None:
    """Names and shapes against those of a drafter."""
    missing, superfluous = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or superfluous:
        parts = [f"lacks {', '.join(missing[:6])}"] * bool(missing)
        parts += [f"has {', '.join(superfluous[:6])} besides"] * bool(superfluous)
        raise ValueError(f"This is no {kind} drafter that PPOW can run: it {' and '.join(parts)}.")
    wrong = [
        f"{name} {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"Tensors of the wrong shape: {'; '.join(wrong[:5])}. The checkpoint does not fit together.")
