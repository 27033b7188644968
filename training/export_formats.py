"""A PPOW drafter in the terms of other engines and trainers: what each can express, and how it wants it written.

    speculators   layers.N, its own nested config; vLLM reads it too
    vllm          layers.N, Eagle3LlamaForCausalLM or Eagle3Qwen3ForCausalLM, tap ids as hidden-state indices
    sglang        layers.N, LlamaForCausalLMEagle3, tap ids as block outputs (one less), and as vLLM wants them beside
    specforge     midlayer, LlamaForCausalLMEagle3, always with d2t and t2d, tap ids as sglang's
    eagle         midlayer, LlamaForCausalLM, default taps only
    gguf          one file for llama.cpp, see ``gguf_format``

What an engine would load and then run wrong, without a word, is refused with the reason. The other direction is
``import_formats``. Read from: speculators 0.9.0, vLLM 0.33.0, SGLang 0.5.23, SpecForge 0.2.0, llama.cpp build 11434.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ppow import PPOWConfig

from .foreign_files import Tensors
from .gguf_format import metadata, to_llama_cpp
from .import_formats import UNSCALED_ROPE, Row

FORMATS = ("speculators", "vllm", "sglang", "specforge", "eagle", "gguf")
SPECULATORS_VERSION = "0.9.0"
# Targets for which SGLang reads explicit tap id i as the output of block i; others guess, or take it as it stands.
SGLANG_BLOCK_OUTPUTS = (
    "apertus",
    "gemma3_text",
    "glm4_moe",
    "gpt_oss",
    "llama",
    "mistral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)


@dataclass
class Exported:
    """What to write: config.json (a GGUF file's metadata), the tensors under the engine's names, and the report."""

    config: dict
    tensors: Tensors
    rows: list[Row]


def default_taps(config: PPOWConfig) -> bool:
    """Whether the taps are those that every engine takes when none are named."""
    layers = config.target_num_layers
    return config.target_taps == [2, layers // 2, layers - 3]


def refusals(config: PPOWConfig, form: str) -> list[str]:
    """Why a drafter of this configuration cannot be expressed in ``form``; empty when it can.

    Args:
        config: the drafter's.
        form: one of :data:`FORMATS`.
    """
    return [reason for holds, reason in _checks(config, form) if holds]


def _checks(c: PPOWConfig, form: str) -> Iterator[tuple[bool, str]]:
    taps, default, rope = c.target_taps, default_taps(c), c.rope_parameters["rope_type"]
    yield c.attention_bias, "attention_bias: the engines put biases on o_proj too, or none anywhere"
    yield c.norm_before_fc and c.fc_norm, "norm_before_fc with fc_norm: others apply the two in the other order"
    if form == "speculators":
        differ = c.hidden_size != c.target_hidden_size
        yield differ, "a drafter narrower or wider than its target: speculators has one width (vLLM has two)"
    if form in ("vllm", "speculators", "sglang", "gguf"):
        yield c.hidden_act != "silu", f"hidden_act={c.hidden_act}: the engines' MLP is silu"
    if form in ("sglang", "specforge", "eagle"):
        yield c.norm_before_residual, "norm_before_residual: it knows no such switch and runs the raw residual"
        yield c.qk_norm, "qk_norm: it has no norms on q and k and drops them"
        yield 0 in taps, "tap 0: its ids name outputs of blocks, and the embeddings are none"
        last = f"tap {c.target_num_layers}: it keeps no output of the last block from before the final norm"
        yield c.target_num_layers in taps, last
    if form == "gguf":
        yield c.num_hidden_layers > 1, f"{c.num_hidden_layers} layers: llama.cpp has one"
        yield c.qk_norm, "qk_norm: llama.cpp has no norms on q and k of a drafter"
        yield c.fc_norm, "fc_norm: llama.cpp has no such norm"
        yield c.norm_output, "norm_output: llama.cpp feeds raw states back"
        yield len(taps) != 3, f"{len(taps)} taps: llama.cpp reads three"
        yield c.target_num_layers in taps, f"tap {c.target_num_layers}: llama.cpp keeps what enters a block alone"
        yield (
            rope not in UNSCALED_ROPE,
            f"RoPE of type {rope}: only default, linear and llama3 have a place in the file",
        )
        yield c.dtype == torch.float64, "float64: a GGUF file has 32 bits"
    if form in ("sglang", "eagle"):
        fused = len(taps) * c.target_hidden_size
        yield fused == c.hidden_size, f"taps as wide as the drafter ({fused}): it takes them for fused and skips fc"
    if form == "sglang":
        unknown = not default and c.target_model_type not in SGLANG_BLOCK_OUTPUTS
        yield unknown, f"explicit taps {taps} of a {c.target_model_type} target: it does not count them the same way"
    if form in ("specforge", "eagle"):
        yield c.num_hidden_layers > 1, f"{c.num_hidden_layers} layers: it has one, midlayer"
        yield c.norm_before_fc, "norm_before_fc: it has no such norm"
        yield c.norm_output, "norm_output: it feeds raw states back"
    if form == "specforge":
        yield len(taps) != 3, f"{len(taps)} taps: it reads three"
        yield rope not in UNSCALED_ROPE, f"RoPE of type {rope}: its code does not compute that as transformers does"
    if form == "eagle":
        yield c.fc_norm, "fc_norm: it has no such norm"
        yield not default, f"taps {taps}: its code reads [2, L // 2, L - 3] of the target and has no field for others"
        heads = f"{c.num_attention_heads} heads of {c.head_dim}: its code has heads of hidden_size / heads alone"
        yield c.num_attention_heads * c.head_dim != c.hidden_size, heads
        yield rope != "default", f"RoPE of type {rope}: its code knows the plain one"


def from_ppow(
    config: PPOWConfig,
    tensors: Tensors,
    form: str,
    target_config: PreTrainedConfig | None = None,
    target_embeddings: torch.Tensor | None = None,
    target_head: torch.Tensor | None = None,
    speculative_tokens: int = 3,
    target_name: str | None = None,
) -> Exported:
    """Translate a PPOW drafter.

    Args:
        config: the drafter's configuration.
        tensors: its state dict.
        form: one of :data:`FORMATS`.
        target_config: of its target; raises ``max_position_embeddings`` to the target's and names its architecture.
        target_embeddings: (V, Ht) of its target; needed for SGLang, to tell whether the drafter's own are the same,
            and for speculators, whose loader would leave memory as it finds it where a drafter stores none.
        target_head: (V, Ht) of its target; needed where the drafter reads that, which no engine does.
        speculative_tokens: recorded for speculators.
        target_name: recorded for speculators.

    Returns:
        The configuration and tensors to write; tensors are not copied.

    Raises:
        ValueError: naming every feature that ``form`` cannot express, or would run wrong.
    """
    rows: list[Row] = []
    reasons, tensors = refusals(config, form), dict(tensors)
    if form == "sglang" and "embed_tokens.weight" in tensors and config.hidden_size == config.target_hidden_size:
        reasons += _share_embeddings(tensors, target_embeddings, rows)
    if form == "speculators" and config.share_target_embeddings:
        if target_embeddings is None:
            reasons.append("embed_tokens: speculators wants them stored, and they are the target's: give --target")
        else:
            tensors["embed_tokens.weight"] = target_embeddings.to(tensors["fc.weight"])
    if config.share_target_head:
        if target_head is None:
            reasons.append("lm_head: engines want it stored, and it is the target's: give --target")
        else:
            columns = torch.arange(int(config.draft_vocab_size or 0)) + tensors.get("d2t", 0)
            tensors["lm_head.weight"] = target_head[columns].to(tensors["fc.weight"])
            rows.append(Row("mapped", "lm_head", "the target's rows, stored: engines borrow none"))
    if reasons:
        raise ValueError(
            f"This drafter cannot be exported to {form}, which would not load it or silently draft badly: "
            f"{'; '.join(reasons)}."
        )
    if config.share_target_embeddings:
        stored = form == "speculators"
        how = "the target's, stored: its loader takes none" if stored else "not stored: the engine takes the target's"
        rows.append(Row("mapped" if stored else "assumed", "embed_tokens", how))
    if config.confidence_head:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("confidence_head.")}
        rows.append(Row("dropped", "confidence_head", "engines end windows by rules of their own"))
    layer = layer_config(config)
    if target_config is not None and config.rope_parameters["rope_type"] in UNSCALED_ROPE:
        positions = target_config.get_text_config(decoder=True).max_position_embeddings
        layer["max_position_embeddings"] = max(positions, config.max_position_embeddings)
    if form == "gguf":
        rows.append(Row("mapped", "target_taps", f"target_layers {config.target_taps}"))
        if "t2d" in tensors:
            rows.append(Row("mapped", "d2t", "token ids instead of offsets, without t2d"))
        return Exported(metadata(config, layer["max_position_embeddings"]), to_llama_cpp(tensors, config), rows)
    _write_vocabulary(tensors, config, form, rows)
    tensors = _engine_names(tensors, form, rows)
    if form == "speculators":
        return Exported(
            _speculators_config(config, layer, target_config, speculative_tokens, target_name, rows), tensors, rows
        )
    return Exported(_plain_config(config, layer, form, tensors, rows), tensors, rows)


def _share_embeddings(tensors: Tensors, target_embeddings: torch.Tensor | None, rows: list[Row]) -> list[str]:
    """Leave out embeddings that are the target's; the reason against it when they are not."""
    own = tensors["embed_tokens.weight"]
    if target_embeddings is None:
        return ["embed_tokens: SGLang puts the target's in their place; give --target, so that the two are compared"]
    if own.shape != target_embeddings.shape or not torch.equal(own, target_embeddings.to(own)):
        return ["embed_tokens: SGLang puts the target's in their place, and these differ from them"]
    del tensors["embed_tokens.weight"]
    rows.append(Row("dropped", "embed_tokens", "equal to the target's, which SGLang uses anyway"))
    return []


def _write_vocabulary(tensors: Tensors, config: PPOWConfig, form: str, rows: list[Row]) -> None:
    if form == "specforge" and "d2t" not in tensors:
        tensors["d2t"] = torch.zeros(config.draft_vocab_size, dtype=torch.long)
        tensors["t2d"] = torch.ones(config.vocab_size, dtype=torch.bool)
        rows.append(Row("mapped", "full draft vocabulary", "d2t of zeros, t2d of ones"))


def _engine_names(tensors: Tensors, form: str, rows: list[Row]) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        own = name
        if form in ("specforge", "eagle") and name.startswith("layers.0."):
            own = "midlayer." + name.removeprefix("layers.0.")
        elif form == "sglang" and name.endswith(".input_layernorm.weight") and not name.startswith("layers.0."):
            own = name.replace("input_layernorm", "hidden_norm")  # what SGLang runs in further layers
        renamed[own] = tensor.contiguous()
    if changed := sorted(set(tensors) - set(renamed)):
        how = "midlayer.*" if form in ("specforge", "eagle") else "hidden_norm in layers 1, ..."
        rows.append(Row("mapped", f"{changed[0].split('.')[0]}.*" if form != "sglang" else "input_layernorm", how))
    return renamed


def layer_config(config: PPOWConfig) -> dict:
    """The drafter's layers as a configuration of a Llama or Qwen3 model names them."""
    return {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_parameters": config.rope_parameters,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def _switches(config: PPOWConfig) -> dict:
    names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    return {name: getattr(config, name) for name in names}


def _speculators_config(
    config: PPOWConfig,
    layer: dict,
    target_config: PreTrainedConfig | None,
    tokens: int,
    target_name: str | None,
    rows: list[Row],
) -> dict:
    architectures = getattr(target_config, "architectures", None)
    if not architectures:
        guess = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.target_model_type)
        architectures = [guess] if guess else []
        rows.append(Row("assumed", "verifier architecture", ", ".join(architectures) or "unknown"))
    if len(config.target_taps) != 3:
        layer = {**layer, "num_aux_hidden_states": len(config.target_taps)}  # vLLM counts by this field
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    taps = None if default_taps(config) else config.target_taps
    rows.append(Row("mapped", "target_taps", f"eagle_aux_hidden_state_layer_ids {taps or 'left out: the default'}"))
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "draft_vocab_size": config.draft_vocab_size,
        **_switches(config),
        "embed_requires_grad": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": taps,
        "tie_word_embeddings": False,
        "dtype": _dtype_name(config),
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target_name, "architectures": architectures},
        },
        "transformer_layer_config": layer,
    }


def _plain_config(config: PPOWConfig, layer: dict, form: str, tensors: Tensors, rows: list[Row]) -> dict:
    rope = config.rope_parameters
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    result = {
        "architectures": [_architecture(config, form)],
        **layer,
        "draft_vocab_size": config.draft_vocab_size,
        "rope_theta": rope["rope_theta"],  # for readers older than rope_parameters
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "torch_dtype": _dtype_name(config),
    }
    # EAGLE's code takes this field to mean that the drafter stores its own embeddings.
    if config.hidden_size != config.target_hidden_size or (form == "eagle" and "embed_tokens.weight" in tensors):
        result["target_hidden_size"] = config.target_hidden_size
    if form in ("vllm", "sglang"):
        result |= _switches(config)
        if len(config.target_taps) != 3:
            result["num_aux_hidden_states"] = len(config.target_taps)
    if form == "sglang":
        del result["norm_before_residual"]
    if form == "specforge" and config.fc_norm:
        result["fc_norm"] = True
    if default_taps(config):
        rows.append(Row("mapped", "target_taps", f"left out: {config.target_taps} is the default"))
    elif form == "vllm":
        result["eagle_aux_hidden_state_layer_ids"] = config.target_taps
        rows.append(Row("mapped", "target_taps", f"eagle_aux_hidden_state_layer_ids {config.target_taps}"))
    else:
        result["eagle_aux_hidden_state_layer_ids"] = config.target_taps  # only vLLM and llama.cpp read this one
        outputs = [tap - 1 for tap in config.target_taps]
        result["eagle_config"] = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": outputs}
        rows.append(Row("mapped", f"target_taps {config.target_taps}", f"outputs of blocks {outputs}"))
    return {key: value for key, value in result.items() if value is not None or key == "rope_scaling"}


def _architecture(config: PPOWConfig, form: str) -> str:
    if form == "vllm":
        return "Eagle3Qwen3ForCausalLM" if config.qk_norm else "Eagle3LlamaForCausalLM"
    return "LlamaForCausalLM" if form == "eagle" else "LlamaForCausalLMEagle3"


def _dtype_name(config: PPOWConfig) -> str | None:
    return None if config.dtype is None else str(config.dtype).removeprefix("torch.")
