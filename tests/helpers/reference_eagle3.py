"""EAGLE's and SpecForge's published drafters, stated again as functions of a checkpoint's own config and tensors.

Written from reading eagle/model/cnets.py (EAGLE cb7e084) and specforge/modeling/draft/llama3_eagle.py with
specforge/algorithms/eagle3/model.py (SpecForge a6b6b02). They share nothing with the package.
"""

import math

import torch
from torch.nn import functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """RoPE in the half-split layout: x (B, heads, N, d), positions (N,), frequencies (d / 2,)."""
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Reference:
    """What both have in common: one layer named ``midlayer`` over embeddings and features side by side."""

    def __init__(self, config: dict, tensors: dict[str, torch.Tensor], embeddings: torch.Tensor):
        self.config, self.tensors = config, tensors
        self.embeddings = tensors.get("embed_tokens.weight", embeddings)  # (V, H)
        self.eps, self.heads = config["rms_norm_eps"], config["num_attention_heads"]
        self.head_dim = self.head_size()
        self.frequencies = self.rope()

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, self.tensors[f"{name}.weight"], self.eps)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"])

    def layer(self, embeds: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, memory: list) -> torch.Tensor:
        """(B, N, H) embeddings and features -> (B, N, H) features, not normed; ``memory`` keeps keys and values."""
        normed = self.norm(hidden, "midlayer.hidden_norm")
        x = torch.cat((self.norm(embeds, "midlayer.input_layernorm"), normed), -1)
        query, key, value = (
            self.linear(x, f"midlayer.self_attn.{part}_proj").unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in "qkv"
        )
        query = rotate(query, positions, self.frequencies)
        key = rotate(key, positions, self.frequencies)
        key, value = (part.repeat_interleave(self.heads // part.shape[1], dim=1) for part in (key, value))
        attended = self.attend(query / math.sqrt(self.head_dim), key, value, memory)
        hidden = hidden + self.linear(attended.transpose(1, 2).flatten(-2), "midlayer.self_attn.o_proj")
        x = self.norm(hidden, "midlayer.post_attention_layernorm")
        gated = F.silu(self.linear(x, "midlayer.mlp.gate_proj")) * self.linear(x, "midlayer.mlp.up_proj")
        return hidden + self.linear(gated, "midlayer.mlp.down_proj")

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(hidden, "norm"), "lm_head")


class Eagle(Reference):
    """EAGLE: heads are hidden_size / heads wide, RoPE is plain, and fc runs when the features are not H wide."""

    def head_size(self) -> int:
        return self.config["hidden_size"] // self.heads

    def rope(self) -> torch.Tensor:
        assert self.config["rope_scaling"] is None
        exponents = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        return 1.0 / self.config.get("rope_theta", 10000) ** exponents

    def attend(self, query, key, value, memory):
        past = memory[0].shape[2] if memory else 0
        if memory:
            key, value = torch.cat((memory[0], key), 2), torch.cat((memory[1], value), 2)
        memory[:] = [key, value]
        allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(diagonal=past)
        scores = (query @ key.transpose(2, 3)).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return scores.softmax(-1) @ value

    def chain(self, text: torch.Tensor, taps: torch.Tensor, drafted: torch.Tensor) -> list[torch.Tensor]:
        """Logits (B, D) for the token after ``text`` (B, T), and after each of ``drafted`` (B, N).

        ``taps`` (B, T - 1, 3 Ht) are those of all tokens but the last; each is paired with the token after it.
        """
        hidden, memory, found = taps, [], []
        for count, tokens in enumerate([text[:, 1:], *drafted.split(1, dim=1)]):
            if hidden.shape[-1] != self.embeddings.shape[1]:
                hidden = self.linear(hidden, "fc")
            first = text.shape[1] - 2 + count if count else 0
            positions = torch.arange(first, first + tokens.shape[1])
            hidden = self.layer(self.embeddings[tokens], hidden, positions, memory)[:, -1:]
            found.append(self.head(hidden[:, 0]))
        return found

    def target_ids(self) -> torch.Tensor:
        """Target ids of the draft vocabulary; the offsets are read only when it is smaller."""
        ids = torch.arange(self.config["draft_vocab_size"])
        return ids if self.config["vocab_size"] == len(ids) else ids + self.tensors["d2t"]


class SpecForge(Reference):
    """SpecForge: training-time test, where a later step sees the first step's prefix and its own diagonal."""

    def head_size(self) -> int:
        return self.config["head_dim"]

    def rope(self) -> torch.Tensor:
        exponents = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        frequencies = 1.0 / self.config["rope_theta"] ** exponents
        scaling = self.config["rope_scaling"]
        if scaling is None:
            return frequencies
        assert scaling["rope_type"] == "llama3"
        longest = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wave = 2 * math.pi / frequencies
        blend = ((longest / wave - low) / (high - low)).clamp(0, 1)  # 0: slow, divided; 1: fast, kept
        return (1 - blend) * frequencies / scaling["factor"] + blend * frequencies

    def attend(self, query, key, value, memory):
        memory.append((key, value))
        keys, values = zip(*memory)
        length = query.shape[2]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = [(query @ keys[0].transpose(2, 3)).masked_fill(future, torch.finfo(torch.float32).min)]
        scores += [(query * later).sum(-1, keepdim=True) for later in keys[1:]]
        weights = torch.cat(scores, -1).softmax(-1)
        out = weights[..., :length] @ values[0]
        for step, later in enumerate(values[1:]):
            out = out + weights[..., length + step, None] * later
        return out

    def training_time_test(self, text: torch.Tensor, taps: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Logits (B, T - 1, D) of each step; at the end of later steps tokens run out and zeros stand in."""
        assert self.config.get("norm_output", True), "SpecForge would leave out the norm before the head"
        parts = taps.chunk(3, dim=-1)
        if self.config.get("fc_norm", False):
            parts = [self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)]
        hidden, memory, found = self.linear(torch.cat(parts, -1), "fc"), [], []
        tokens = text[:, 1:]
        for step in range(steps):
            positions = torch.arange(tokens.shape[1]) + step
            hidden = self.layer(self.embeddings[tokens], hidden, positions, memory)
            found.append(self.head(hidden))
            tokens = torch.cat((tokens[:, 1:], torch.zeros_like(tokens[:, :1])), 1)
        return found
