"""SGLang's own drafter class, run on the CPU: its source with the layers below in place of SGLang's, which need a GPU.

SGLang's are ``models/llama_eagle3.py`` and ``models/llama.py`` of its wheel, with their loader. Stand-ins are linear
layers, norms, RoPE, attention over a cache, and everything that is about parallel or quantized layers.
"""

import builtins
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig

from reference_eagle3 import SpecForge, rms_norm, rotate


class Linear(nn.Linear):
    """Matrices one above the other; ``rows`` of each, by the name under which the loader gives it."""

    def __init__(self, width: int, rows: dict, bias: bool):
        super().__init__(width, sum(rows.values()), bias=bias)
        self.rows, self.weight.weight_loader = rows, self.take

    def take(self, parameter: nn.Parameter, tensor: torch.Tensor, name=None) -> None:
        parts = dict(zip(self.rows, parameter.data.split(list(self.rows.values()))))
        parts[name].copy_(tensor)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm(x + residual, self.weight, self.eps), x + residual


class Attention:
    """Of one text: queries (N, heads * size) over what ``batch.memory`` holds of this layer and the new keys."""

    def __init__(self, heads: int, size: int, scaling: float, num_kv_heads: int, layer_id: int, **_):
        self.heads, self.size, self.scaling, self.layer = heads, size, scaling, layer_id

    def __call__(self, query, key, value, batch):
        query, key, value = (part.unflatten(-1, (-1, self.size)).transpose(0, 1) for part in (query, key, value))
        past = batch.memory.get(self.layer, (key[:, :0], value[:, :0]))
        key, value = batch.memory[self.layer] = [torch.cat(parts, 1) for parts in zip(past, (key, value))]
        key, value = (part.repeat_interleave(self.heads // len(part), 0) for part in (key, value))
        seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(past[0].shape[1])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scaling)
        return out.transpose(0, 1).flatten(-2)


def get_rope(size: int, rotary_dim: int, max_position: int, base: float, rope_scaling: dict, is_neox_style: bool):
    assert rotary_dim == size and is_neox_style
    scaling = None if rope_scaling["rope_type"] == "default" else rope_scaling
    own = SimpleNamespace(head_dim=size, config={"rope_theta": base, "rope_scaling": scaling})
    frequencies = SpecForge.rope(own)

    def rope(positions, *parts):
        heads = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in parts)
        return [rotate(part, positions, frequencies).transpose(0, 1).flatten(-2) for part in heads]

    return rope


class SGLang:
    """Its drafter, made and loaded as its model runner does.

    Args:
        llama, llama_eagle3: source of its two modules.
        config, tensors: of a checkpoint.
        embeddings: (V, Ht) the target's, which it puts in place of a drafter's where the widths are equal.
    """

    def __init__(self, llama: str, llama_eagle3: str, config: dict, tensors: dict, embeddings: torch.Tensor):
        parts = MagicMock(  # whatever else they import is made and never asked
            RMSNorm=RMSNorm,
            RadixAttention=Attention,
            get_rope=get_rope,
            QKVParallelLinear=lambda width, size, heads, kv_heads, bias, **_: Linear(
                width, {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}, bias
            ),
            MergedColumnParallelLinear=lambda width, rows, bias, **_: Linear(width, dict(enumerate(rows)), bias),
            RowParallelLinear=lambda width, rows, bias, **_: Linear(width, {None: rows}, bias),
            VocabParallelEmbedding=lambda count, width, **_: nn.Embedding(count, width),
            ParallelLMHead=lambda count, width, **_: nn.Linear(width, count, bias=False),
            SiluAndMul=lambda: lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
            default_weight_loader=lambda parameter, tensor: parameter.data.copy_(tensor),
            get_parallel=lambda: SimpleNamespace(tp_size=1, pp_group=None),
            get_spec=lambda: SimpleNamespace(speculative_draft_window_size=None),
            is_npu=lambda: False,
            is_xpu=lambda: False,
        )
        parts.DualGemm.return_value.can_run.return_value = False

        def imported(name, *rest):
            return parts if name.startswith("sglang") else builtins.__import__(name, *rest)

        for source in (llama, llama_eagle3):
            scope = {"__name__": "sglang", "__builtins__": {**vars(builtins), "__import__": imported}}
            exec(compile(source, "sglang", "exec"), scope)
            for name in ("LlamaDecoderLayer", "LlamaForCausalLM", "LlamaMLP"):
                setattr(parts, name, scope[name])
        self.model = scope["LlamaForCausalLMEagle3"](LlamaConfig(**config)).eval()
        self.model.load_weights(tensors.items())
        if self.model.model.embed_tokens.weight.shape == embeddings.shape:
            self.model.model.embed_tokens.weight.data.copy_(embeddings)

    @torch.no_grad()
    def chain(self, text: torch.Tensor, taps: torch.Tensor, drafted: torch.Tensor) -> list[torch.Tensor]:
        """Logits (D,) for the token after ``text`` (T,), and after each of ``drafted`` (N,).

        ``taps`` (T - 1, n_taps * Ht) are those of all tokens but the last; each is paired with the token after it.
        """
        batch = MagicMock(memory={}, mm_input_embeds=None)
        hidden, first, found = taps, 0, []
        for tokens in (text[1:], *drafted.split(1)):
            batch.spec_info.hidden_states = hidden
            normed, (fed,) = self.model.model(tokens, torch.arange(first, first + len(tokens)), batch)
            found.append(self.model.lm_head(normed[-1]))
            hidden, first = fed[-1:], first + len(tokens)
        return found
