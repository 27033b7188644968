"""EAGLE-3 drafters as llama.cpp reads them: one GGUF file of architecture ``eagle3``, with its target's tokenizer.

Names and metadata are those of llama.cpp's own converter (its pull request 18039, read at build 11434):

    token_embd, output, output_norm, fc, enc.output_norm (our input_norm), d2t
    blk.0.attn_norm (of the embedding), .attn_norm_2 (of the features), .attn_q, ..., .ffn_norm, .ffn_gate, ...
    eagle3.target_layers          hidden-state indices of the three taps, as here
    eagle3.target_hidden_size, .norm_before_residual, .norm_before_fc, and what every model has

Three things differ: ``d2t`` holds token ids instead of offsets, rows of ``attn_q`` and ``attn_k`` lie in llama.cpp's
order of the rotated halves, and RoPE of type llama3 is a tensor of factors, ``rope_freqs``. For the way back its
parameters are kept under ``ppow.rope_parameters``, which llama.cpp passes over. Vectors are float32, as it wants them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ppow import PPOWConfig

from .foreign_files import Tensors

ARCHITECTURE = "eagle3"
OWN_ROPE = "ppow.rope_parameters"
_NAMES = {  # ours -> llama.cpp's
    "embed_tokens.weight": "token_embd.weight",
    "fc.weight": "fc.weight",
    "input_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "d2t": "d2t",
    **{
        f"layers.0.{ours}.weight": f"blk.0.{theirs}.weight"
        for ours, theirs in {
            "input_layernorm": "attn_norm",
            "hidden_norm": "attn_norm_2",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }.items()
    },
}
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def metadata(config: PPOWConfig, positions: int) -> dict[str, Any]:
    """The keys of a drafter's GGUF file besides the tokenizer's; ``positions`` it is to reach."""
    rope = config.rope_parameters or {}
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
        "target_layers": config.target_taps,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
    }
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    found: dict[str, Any] = {f"{ARCHITECTURE}.{name}": value for name, value in values.items()}
    return found | ({OWN_ROPE: json.dumps(rope)} if rope["rope_type"] == "llama3" else {})


def to_llama_cpp(tensors: Tensors, config: PPOWConfig) -> Tensors:
    """A drafter's tensors under llama.cpp's names, in its order, type and meaning."""
    found, size = {}, config.head_dim
    assert size is not None
    for name, tensor in tensors.items():
        if name == "t2d":
            continue
        if name == "d2t":
            tensor = tensor + torch.arange(len(tensor))
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _reorder(tensor, size, 2)
        elif tensor.dim() == 1:
            tensor = tensor.float()
        found[_NAMES[name]] = tensor.contiguous()
    if (config.rope_parameters or {})["rope_type"] == "llama3":
        found["rope_freqs.weight"] = _factors(config)
    return found


def write_gguf(config: dict[str, Any], tensors: Tensors, target: str, path: Path) -> None:
    """Write a drafter with the tokenizer of ``target``, the GGUF file of its target.

    Raises:
        ValueError: a target whose tokenizer has not as many tokens as the drafter's vocabulary.
    """
    import gguf

    tokenizer = {name: f for name, f in gguf.GGUFReader(target).fields.items() if name.startswith("tokenizer.")}
    tokens = tokenizer.get("tokenizer.ggml.tokens")
    count, wanted = len(tokens.data) if tokens else 0, config[f"{ARCHITECTURE}.vocab_size"]
    if count != wanted:
        raise ValueError(f"--target {target} names {count} tokens, the drafter's vocabulary has {wanted}.")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for name, value in config.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, getattr(gguf.GGUFValueType, kinds[type(value)]))
    for name, field in tokenizer.items():
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for name, tensor in tensors.items():
        plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        writer.add_tensor(name, plain.numpy(), raw_dtype=getattr(gguf.GGMLQuantizationType, _STORED[tensor.dtype]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: str, target: PreTrainedConfig) -> tuple[dict, Tensors]:
    """A drafter's GGUF file in the terms that ``import_formats`` reads: config.json's, and our tensor names.

    Raises:
        ValueError: no GGUF file or none of a drafter, quantized weights, tensors of no drafter, or RoPE factors that
            are not the target's.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{path} could not be read as a GGUF file ({error}); get it again.") from None
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    kind = values.get("general.architecture")
    if kind != ARCHITECTURE:
        raise ValueError(f"{path} holds a model of architecture {kind!r}; a drafter's is {ARCHITECTURE!r}.")

    def value(name: str, default: Any = None) -> Any:
        found = values.get(f"{ARCHITECTURE}.{name}", default)
        return float(str(np.float32(found))) if isinstance(found, float) else found  # 1e-05, which 32 bits round

    tensors = {tensor.name: _tensor(tensor) for tensor in reader.tensors}
    names = {theirs: ours for ours, theirs in _NAMES.items()}
    factors = tensors.pop("rope_freqs.weight", None)
    if unknown := sorted(set(tensors) - set(names)):
        raise ValueError(f"{path} holds {', '.join(unknown[:5])}, which no drafter has.")
    heads = value("attention.head_count")
    tensors = {names[name]: tensor for name, tensor in tensors.items()}
    size = value("attention.key_length") or value("rope.dimension_count")
    if not size or not heads:
        raise ValueError(f"{path} does not say how many heads of which size it has: it is damaged.")
    for name, tensor in tensors.items():
        if name == "d2t":
            tensors[name] = tensor - torch.arange(len(tensor))
        elif name.endswith(("q_proj.weight", "k_proj.weight")) and tensor.shape[0] % size == 0:
            tensors[name] = _reorder(tensor, size, size // 2)
    _restore_vectors(tensors)
    rope = {"rope_type": "default", "rope_theta": value("rope.freq_base", 10000.0)}
    if value("rope.scaling.type") == "linear":
        rope |= {"rope_type": "linear", "factor": value("rope.scaling.factor")}
    elif value("rope.scaling.type") not in (None, "none"):
        raise ValueError(f"{path}: RoPE scaled by {value('rope.scaling.type')!r} is not supported.")
    if OWN_ROPE in values:
        rope = json.loads(values[OWN_ROPE])
    elif factors is not None:
        rope = _rope_of(target, factors, size, rope["rope_theta"], path)
    config = {
        "architectures": [ARCHITECTURE],
        "num_attention_heads": heads,
        "head_dim": size,
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": value("context_length"),
        "rope_parameters": rope,
        "target_layers": value("target_layers") or value("extract_layers"),
        "norm_before_residual": value("norm_before_residual", False),
        "norm_before_fc": value("norm_before_fc", False),
    }
    return config, tensors


def _tensor(stored: Any) -> torch.Tensor:
    """A tensor of a GGUFReader; its shape there is reversed."""
    kind, shape = stored.tensor_type.name, [int(size) for size in reversed(stored.shape)]
    types = {name: dtype for dtype, name in _STORED.items()}
    if kind not in types:
        raise ValueError(f"{stored.name} is quantized ({kind}); import the file in 16 or 32 bit that it was made from.")
    data = torch.from_numpy(np.ascontiguousarray(stored.data).view(np.uint8).reshape(-1).copy())
    return data.view(types[kind]).reshape(shape)


def _reorder(weight: torch.Tensor, size: int, groups: int) -> torch.Tensor:
    """Rows (A * d, N) of heads of ``size``: pairs of halves (2) to neighbours, or (d / 2) neighbours to halves."""
    rows = weight.reshape(-1, groups, size // groups, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape).contiguous()


def _restore_vectors(tensors: Tensors) -> None:
    """Give vectors the matrices' type again, which they were stored without, if no digit is lost."""
    matrices = {tensor.dtype for tensor in tensors.values() if tensor.dim() == 2}
    vectors = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 1 and tensor.is_floating_point()}
    if len(matrices) == 1:
        dtype = matrices.pop()
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in vectors.values()):
            tensors |= {name: tensor.to(dtype) for name, tensor in vectors.items()}


def _factors(config: PreTrainedConfig | PPOWConfig) -> torch.Tensor:
    """(d / 2,) by which RoPE of type llama3 divides each frequency, float32."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    size, theta = 2 * len(scaled), (config.rope_parameters or {})["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / scaled


def _rope_of(target: PreTrainedConfig, factors: torch.Tensor, size: int, theta: float, path: str) -> dict:
    """The target's RoPE, which a converted drafter's usually is: its file has the factors and no parameters."""
    rope = getattr(target.get_text_config(decoder=True), "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        rope = {**rope, "rope_theta": theta}
        like = LlamaConfig(head_dim=size, hidden_size=size, num_attention_heads=1, rope_parameters=rope)
        if torch.allclose(_factors(like), factors, rtol=1e-4):
            return rope
    raise ValueError(f"{path} holds RoPE factors that are not the target's, and no parameters to make them from.")
