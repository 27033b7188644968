"""DFlash checkpoints (z-lab's; vLLM and SGLang read the same), into block drafters and back.

The tensors have the same names here and there, 11 a layer besides ``fc``, ``hidden_norm`` and ``norm``. The ids of the
tapped layers name outputs of blocks, one less than hidden-state indices; row j of a block predicts the token at its own
place, the anchor's row nothing. ``sample_from_anchor`` (as speculators calls it) says the other convention, in which a
row predicts the token behind it.

Not included: sliding windows, vocabularies of their own (``d2t``), heads that condition slots on each other.
"""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ppow import PPOWConfig

from .export_formats import Exported, layer_config
from .foreign_files import Tensors
from .import_formats import (
    READ,
    Imported,
    Known,
    Row,
    attention_shape,
    check_tensors,
    check_types,
    layer_fields,
    refuse_foreign,
    stored_dtype,
)

ARCHITECTURE = "DFlashDraftModel"
_NEEDED = ("block_size", "mask_token_id", "target_layer_ids")


def is_dflash(config: dict) -> bool:
    """Whether a config.json is that of a DFlash drafter."""
    return ARCHITECTURE in str(config.get("architectures")) or isinstance(config.get("dflash_config"), dict)


def from_dflash(
    config: dict,
    tensors: Tensors,
    target_config: PreTrainedConfig,
    drafter_class: type[PreTrainedModel],
    known: Known = READ,
) -> Imported:
    """Translate a DFlash checkpoint: config.json and tensors under their own names.

    Args:
        drafter_class: ``PPOWDrafter``, which knows the class of block drafters.
        known: overrides what is read; of these ``rope_theta`` and ``taps`` mean something here.

    Raises:
        ValueError: fields that are missing or that PPOW cannot express, tensors that do not fit, another target.
    """
    check_types(config)
    text, rows = target_config.get_text_config(decoder=True), []
    own = config | (config.get("dflash_config") or {})
    ids = own.get("target_layer_ids")
    wrong = [name for name in _NEEDED[:2] if type(own.get(name)) is not int]
    wrong += [] if isinstance(ids, list) and all(type(i) is int for i in ids) and ids else [_NEEDED[2]]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: missing from this DFlash drafter's config.json (or its dflash_config), or of the "
            "wrong type; a drafter of this architecture cannot be run without them."
        )
    refuse_foreign(config, config, {"norm_before_fc": False, "fc_norm": False})
    layers = own.get("num_target_layers", text.num_hidden_layers)
    if layers != text.num_hidden_layers:
        raise ValueError(
            f"This drafter was made for a target of {layers} layers, the given one has {text.num_hidden_layers}: name "
            "the target that it was trained for."
        )
    if "d2t" in tensors or "t2d" in tensors:
        raise ValueError("d2t: this drafter has a vocabulary of its own; PPOW's block drafters use their target's.")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            rows.append(Row("dropped", name.removesuffix(".weight"), "the target's is used"))
    tensors = {name: t for name, t in tensors.items() if not name.startswith(("embed_tokens.", "lm_head."))}
    needed = ("fc.weight", "norm.weight", "layers.0.mlp.gate_proj.weight", "layers.0.self_attn.q_proj.weight")
    if missing := [name for name in (*needed, "layers.0.self_attn.k_proj.weight") if name not in tensors]:
        raise ValueError(f"This checkpoint lacks {', '.join(missing)}: it is incomplete, or no DFlash drafter.")
    from_anchor = bool(own.get("sample_from_anchor"))
    if "sample_from_anchor" not in own:
        rows.append(Row("assumed", "predict_from_anchor", "not stored: false, the anchor's row predicts nothing"))
    taps = [i + 1 for i in ids or ()]
    rows.append(Row("mapped", f"target_layer_ids {ids}", f"target_taps {taps} (hidden states entering these blocks)"))
    if given := [name for name in ("norm_output", "norm_before_residual") if getattr(known, name) is not None]:
        raise ValueError(f"{', '.join(given)}: DFlash's layers leave no choice here; leave it out.")
    if known.taps is not None:
        taps = known.taps
        rows.append(Row("given", "target_taps", str(taps)))
    result = drafter_class.config_class.from_target(
        target_config,
        architecture="block",
        block_size=own["block_size"],
        mask_token_id=own["mask_token_id"],
        predict_from_anchor=from_anchor,
        hidden_size=tensors["norm.weight"].shape[0],
        intermediate_size=tensors["layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in tensors if name.startswith("layers.")}),
        attention_bias="layers.0.self_attn.q_proj.bias" in tensors,
        target_taps=taps,
        **attention_shape(tensors, config, text, rows),
        **layer_fields("dflash", {"model_type": "qwen3", **config}, known, text, rows),
    )
    result.dtype = stored_dtype(tensors, rows)
    with torch.device("meta"):
        check_tensors(tensors, drafter_class.class_for("block")(result).state_dict(), "DFlash")
    return Imported("DFlash", result, tensors, rows)


def to_dflash(config: PPOWConfig, tensors: Tensors) -> Exported:
    """Write a block drafter as DFlash's readers take it.

    Raises:
        ValueError: what they would load and run wrong.
    """
    reasons = {
        "markov_rank: DFlash's slots know nothing of each other": config.markov_rank,
        "draft_vocab_size: DFlash's readers take the target's whole head": config.draft_vocab_size != config.vocab_size,
        "attention_bias: the engines put biases on o_proj too, or none anywhere": config.attention_bias,
        f"hidden_act={config.hidden_act}: the engines' MLP is silu": config.hidden_act != "silu",
        "tap 0: DFlash's ids name outputs of blocks, and the embeddings are none": 0 in (config.target_taps or ()),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"This drafter cannot be exported to dflash, which would run it badly: {'; '.join(found)}.")
    ids = [tap - 1 for tap in config.target_taps or ()]
    layer = layer_config(config)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("confidence_head.")}
    rows = [Row("mapped", f"target_taps {config.target_taps}", f"target_layer_ids {ids}, outputs of blocks")]
    if config.confidence_head:
        rows.append(Row("dropped", "confidence_head", "engines end windows by rules of their own"))
    own = {"mask_token_id": config.mask_token_id, "target_layer_ids": ids}
    if config.predict_from_anchor:
        own["sample_from_anchor"] = True
        rows.append(Row("mapped", "predict_from_anchor", "sample_from_anchor: vLLM and speculators know it, z-lab not"))
    flat = {
        "architectures": [ARCHITECTURE],
        **layer,
        "block_size": config.block_size,
        "num_target_layers": config.target_num_layers,
        "layer_types": ["full_attention"] * int(config.num_hidden_layers),
        "rope_theta": (config.rope_parameters or {})["rope_theta"],  # for readers older than rope_parameters
        "torch_dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "dflash_config": own,
        **({"sample_from_anchor": True} if config.predict_from_anchor else {}),
    }
    contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return Exported({key: value for key, value in flat.items() if value is not None}, contents, rows)
