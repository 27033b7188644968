"""The PPOW drafter: EAGLE-3's feature drafter, tensor-compatible with the published checkpoints.

    h = fc(cat(tapped hidden states of the target))          # (.., n_taps * Ht) -> (.., H)
    layer 0: attention over cat(norm(embedding), norm(h)), residual h, MLP
    layers 1..: ordinary pre-norm decoder layers
    logits = lm_head(norm(out)) over the draft vocabulary; ``out`` itself is what the next draft step gets as ``h``.
             With ``share_target_head`` it is the target's head, its rows of the draft vocabulary, and not in the
             checkpoint

The pair at position t is (taps of x_t, embedding of x_{t+1}) and predicts x_{t+2}. After the first drafted token the
target's taps are not known yet and the drafter continues on its own output.

How queries find keys differs between decoding (a cache), training-time test and rollouts (a shared prefix plus each
window's own steps), so the layers take an ``attend`` callable and stay free of bookkeeping.

Not included: dropout, gradient checkpointing, tied heads. Architecture: EAGLE-3 (arXiv 2503.01840).
"""

import dataclasses
import importlib
import inspect
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils import ModelOutput

from .attention_ppow import attend_window
from .cache_ppow import SlotCache
from .configuration_ppow import PPOWConfig
from .drafting_ppow import DEFAULT_WINDOW_SIZE, DrafterState, DraftOptions, highest_probability
from .entrances_ppow import register_assisted_decoding
from .generation_ppow import PPOWGenerateOutput, decode
from .graphs_ppow import GraphDrafter
from .lossless_ppow import Difference, explain
from .masks_ppow import additive_mask
from .paths_ppow import check_path
from .target_ppow import read_taps
from .words_ppow import TargetWords

CUSTOM_GENERATE = """# Entry point of generate(custom_generate=<this repository>); it can only import files beside it.
from .entrances_ppow import generate  # noqa: F401
"""

AUTO_CLASSES = "AutoModel", "AutoModelForCausalLM"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
MANY_SCORES = 1 << 20  # queries times keys

# (layer index, queries (B, A, N, d), keys (B, K, N, d), values (B, K, N, d)) -> attended (B, A, N, d)
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class CachedAttention:
    """Attention over a :class:`SlotCache`: writes the new entries, then reads everything the mask allows.

    Args:
        cache: the drafter's cache, opened for a window or appending.
        mask: additive (B, 1, N, view) mask, or one of ``pack_window``; None where a single new entry sees everything,
            or several start a text and each sees those before it.
    """

    def __init__(self, cache: SlotCache, mask: torch.Tensor | None = None):
        self.cache, self.mask = cache, mask

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See :data:`Attend`."""
        key, value = self.cache.update(key, value, layer)
        if self.mask is not None and self.mask.dtype == torch.int32:  # on the fast path: see attention_ppow
            return attend_window(query, key, value, self.mask, query.shape[-1] ** -0.5).transpose(1, 2)
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and query.shape[2] * key.shape[2] > MANY_SCORES:
            # with a mask or in float32, torch writes all scores of grouped heads out; repeated keys take far less
            key, value = (entries.repeat_interleave(groups, dim=1) for entries in (key, value))
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self.mask,
            is_causal=self.mask is None and query.shape[2] > 1,
            enable_gqa=key.shape[1] != query.shape[1],
        )


class PPOWRMSNorm(nn.Module):
    """Root mean square norm with a gain; statistics in float32 as in Llama."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(.., size) -> (.., size), in the dtype of ``x``."""
        if x.dtype in (torch.float32, torch.float64):
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * nn.functional.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class PPOWAttention(nn.Module):
    """Self-attention of a decoder layer; the first layer's reads vectors of twice the width."""

    def __init__(self, config: PPOWConfig, layer_index: int):
        super().__init__()
        assert config.num_key_value_heads is not None and config.head_dim is not None
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        width_in = config.hidden_size * (2 if layer_index == 0 and not config.is_block else 1)
        width_q = config.num_attention_heads * config.head_dim
        width_kv = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width_in, width_q, bias=config.attention_bias)
        self.k_proj = nn.Linear(width_in, width_kv, bias=config.attention_bias)
        self.v_proj = nn.Linear(width_in, width_kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(width_q, config.hidden_size, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = PPOWRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = PPOWRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> torch.Tensor:
        """Inputs (B, N, H or 2H), cos and sin (B, N, d) -> (B, N, H)."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (proj(x).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, heads, N, d)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        out = attend(self.layer_index, query, key, value)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class PPOWMLP(nn.Module):
    """Gated MLP of a decoder layer."""

    def __init__(self, config: PPOWConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(.., H) -> (.., H)."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class PPOWDecoderLayer(nn.Module):
    """Pre-norm decoder layer; the first one attends over embedding and features side by side."""

    def __init__(self, config: PPOWConfig, layer_index: int):
        super().__init__()
        self.first = layer_index == 0 and not config.is_block
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = PPOWAttention(config, layer_index)
        self.mlp = PPOWMLP(config)
        self.input_layernorm = PPOWRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = PPOWRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.first:
            self.hidden_norm = PPOWRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        """Embeddings (only the first layer reads them) and features (B, N, H), cos and sin (B, N, d) -> (B, N, H)."""
        residual = hidden
        if self.first:
            normed = self.hidden_norm(hidden)
            residual = normed if self.norm_before_residual else hidden
            x = torch.cat((self.input_layernorm(embeds), normed), dim=-1)  # (B, N, 2H)
        else:
            x = self.input_layernorm(hidden)
        hidden = residual + self.self_attn(x, rotary, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@dataclass
class PPOWDrafterOutput(ModelOutput):
    """``logits`` (B, T, D) over the draft vocabulary and ``hidden_states`` (B, T, H), the features fed forward."""

    logits: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None


class PPOWDrafter(PreTrainedModel, GenerationMixin):
    """An EAGLE-3 style drafter for one target.

    Use it through the target: ``target.generate(**inputs, assistant_model=drafter)``. Its ``generation_config`` holds
    how it drafts: ``window_size`` (chain) or ``tree_depth``, ``tree_top_k``, ``tree_nodes``.
    """

    config_class = PPOWConfig
    base_model_prefix = "ppow"
    input_modalities = ("text",)
    _no_split_modules = ["PPOWDecoderLayer"]
    _supports_sdpa = True
    _vocabulary_is_right: int | None = None  # where the d2t lies that was found to be right
    draft_options = tuple(field.name for field in dataclasses.fields(DraftOptions))  # what custom_generate= also takes
    state_kind, graph_kind = DrafterState, GraphDrafter  # its side of a running generation, on either path

    def __init__(self, config: PPOWConfig):
        super().__init__(config)
        if config.is_block:
            raise ValueError("This configuration is a block drafter's: use PPOWBlockDrafter, or from_pretrained.")
        assert config.target_hidden_size is not None and config.target_taps is not None
        assert config.draft_vocab_size is not None
        width = config.target_hidden_size
        taps = len(config.target_taps)
        if not config.share_target_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(taps * width, config.hidden_size, bias=False)
        if config.norm_before_fc:
            self.input_norm = PPOWRMSNorm(taps * width, config.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList([PPOWRMSNorm(width, config.rms_norm_eps) for _ in range(taps)])
        self.layers = nn.ModuleList([PPOWDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = PPOWRMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.share_target_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        if config.confidence_head:
            self.confidence_head = nn.Linear(config.hidden_size + 1, 2)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.open_draft_vocabulary()
        self.post_init()
        # a fresh one: transformers drops unknown fields of generation configs that it derived from a model's config
        self.generation_config = GenerationConfig(window_size=DEFAULT_WINDOW_SIZE)

    def open_draft_vocabulary(self) -> None:
        """Make the buffers that name the draft vocabulary, where it is not the whole: at first the lowest ids."""
        size, whole = int(self.config.draft_vocab_size or 0), self.config.vocab_size
        self.pruned = size < whole
        if self.pruned:
            self.register_buffer("d2t", torch.zeros(size, dtype=torch.long))
            self.register_buffer("t2d", torch.arange(whole) < size)

    # -- the network -------------------------------------------------------------------------------------------------

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """Target taps (.., n_taps * Ht), concatenated in tap order -> fused features (.., H)."""
        if self.config.fc_norm:
            parts = taps.split(self.config.target_hidden_size, dim=-1)
            taps = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts)], dim=-1)
        if self.config.norm_before_fc:
            taps = self.input_norm(taps)
        return self.fc(taps)

    def rotary(self, like: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B, N, d) of RoPE for positions (B, N), in the dtype of ``like``."""
        return self.rotary_emb(like, position_ids)

    def step(
        self,
        inputs_embeds: torch.Tensor,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        """One pass through the layers: embeddings and features (B, N, H) -> next features (B, N, H)."""
        for layer in self.layers:
            hidden = layer(inputs_embeds, hidden, rotary, attend)
        return self.norm(hidden) if self.config.norm_output else hidden

    def logits(self, hidden: torch.Tensor, words: Any = None) -> torch.Tensor:
        """Features (.., H) -> logits (.., D) over the draft vocabulary.

        Args:
            hidden: (.., H).
            words: of :meth:`embedding_for`; needed with ``share_target_head``.
        """
        if not (self.config.norm_output or self.config.is_block):  # else they are normed
            hidden = self.norm(hidden)
        if self.config.share_target_head:
            if not isinstance(words, TargetWords):
                raise ValueError(
                    "This drafter reads tokens off with its target's head: pass drafter.embedding_for(target), too."
                )
            return words.logits(hidden).to(hidden.device)
        return self.lm_head(hidden)

    def acceptance_logits(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """How likely the draft at a state is accepted, by the confidence head; needs ``config.confidence_head``.

        The head reads the features, normed without a gain, and the log odds of the most probable draft. A fresh head
        says what those odds say.

        Args:
            hidden: (.., H) features.
            logits: (.., D) of :meth:`logits` for them.

        Returns:
            (.., 2) float32 log odds: that the most probable draft is the target's argmax (what counts at temperature
            0), and that rejection sampling accepts a draft drawn at temperature 1, sum_v min(P, Q).
        """
        hidden = nn.functional.rms_norm(hidden.float(), hidden.shape[-1:])
        best = highest_probability(logits).clamp(1e-6, 1 - 1e-6)
        state = torch.cat((hidden, best.logit()[..., None]), -1)
        return nn.functional.linear(state, self.confidence_head.weight.float(), self.confidence_head.bias.float())

    def add_confidence_head(self) -> None:
        """Give a drafter that has none a fresh confidence head, on its own device and in its dtype."""
        if not self.config.confidence_head:
            self.config.confidence_head = True
            self.confidence_head = nn.Linear(self.config.hidden_size + 1, 2, device=self.device, dtype=self.dtype)
            self._init_head()

    def forward(
        self,
        input_ids: torch.Tensor,
        taps: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PPOWDrafterOutput:
        """Teacher-forced first draft step over a text.

        Args:
            input_ids: (B, T) tokens x_1 .. x_T, i.e. the text shifted left by one against ``taps``.
            taps: (B, T, n_taps * Ht) tapped hidden states of x_0 .. x_{T-1}, concatenated in tap order.
            attention_mask: (B, T), 0 for pairs to ignore (padding).
            position_ids: (B, T), default 0 .. T-1.
            inputs_embeds: (B, T, H), instead of ``input_ids``; needed with ``share_target_embeddings``.

        Returns:
            logits (B, T, D); entry t predicts x_{t+2}. None with ``share_target_head``: see :meth:`logits`.

        Raises:
            ValueError: for taps of the wrong width, or tokens without an embedding.
        """
        if taps.shape[-1] != self.fc.in_features:
            raise ValueError(
                f"taps have width {taps.shape[-1]}, expected {self.fc.in_features} = "
                f"{len(self.config.target_taps)} taps x target_hidden_size {self.config.target_hidden_size}."
            )
        if inputs_embeds is None:
            if self.config.share_target_embeddings:
                raise ValueError("This drafter shares its target's embeddings: pass inputs_embeds, not input_ids.")
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(length, device=taps.device)[None].expand(batch, -1)
        hidden = self.fuse(taps.to(self.dtype))
        mask = None
        if attention_mask is not None:
            seen = torch.ones(length, length, dtype=torch.bool, device=taps.device).tril()
            seen = seen & attention_mask[:, None, None, :].bool()
            mask = additive_mask(seen, hidden.dtype)
        attend = CachedAttention(SlotCache(len(self.layers), length), mask)
        hidden = self.step(inputs_embeds, hidden, self.rotary(hidden, position_ids), attend)
        logits = None if self.config.share_target_head else self.logits(hidden)
        return PPOWDrafterOutput(logits=logits, hidden_states=hidden)

    # -- vocabulary and embeddings -----------------------------------------------------------------------------------

    def read_target(self, target: PreTrainedModel, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the target on ``inputs``: -> its logits, and the taps (B, T, n_taps * Ht) that this drafter reads."""
        return read_taps(target, self.config.target_taps, **inputs)

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Ids in the draft vocabulary -> ids in the target's. ``d2t`` holds offsets: target id = i + d2t[i]."""
        return draft_ids + self.d2t[draft_ids] if self.pruned else draft_ids

    def draft_columns(self) -> torch.Tensor:
        """(D,) the target ids of the draft vocabulary, ascending."""
        ids = torch.arange(self.config.draft_vocab_size, device=self.device)
        return self.to_target_ids(ids)

    def set_draft_vocabulary(self, d2t: torch.Tensor, t2d: torch.Tensor) -> None:
        """Choose which tokens can be drafted.

        Args:
            d2t: (D,) int64 offsets, target id = i + d2t[i].
            t2d: (V,) bool membership.

        Raises:
            ValueError: when the two disagree, or hold absolute ids instead of offsets.
        """
        config = self.config
        if not self.pruned:
            raise ValueError(f"draft_vocab_size equals vocab_size={config.vocab_size}: there is nothing to choose.")
        ids = torch.arange(config.draft_vocab_size) + d2t.cpu()
        member = torch.zeros(config.vocab_size, dtype=torch.bool)
        inside = d2t.shape == (config.draft_vocab_size,) and 0 <= int(ids.min()) and int(ids.max()) < config.vocab_size
        if inside:
            member[ids] = True
        if not inside or int(member.sum()) != config.draft_vocab_size or not torch.equal(member, t2d.cpu().bool()):
            raise ValueError(
                f"d2t {tuple(d2t.shape)} and t2d {tuple(t2d.shape)} do not describe {config.draft_vocab_size} distinct "
                f"tokens of a vocabulary of {config.vocab_size}. d2t holds offsets (target id = i + d2t[i]), "
                "t2d membership."
            )
        self.d2t.copy_(d2t)
        self.t2d.copy_(t2d.bool())

    def check_draft_vocabulary(self) -> None:
        """Raise a ValueError where ``d2t`` and ``t2d`` name different tokens; looked at until they agree.

        So they do in a checkpoint whose tensors were all converted to a 16-bit dtype: its offsets are rounded.
        """
        if not self.pruned or self.d2t.is_meta or self._vocabulary_is_right == self.d2t.data_ptr():
            return
        ids, size, vocabulary = self.draft_columns().long(), self.config.draft_vocab_size, self.config.vocab_size
        inside = ids[(ids >= 0) & (ids < vocabulary)]
        named = torch.zeros_like(self.t2d, dtype=torch.bool).index_fill(0, inside, True)
        found = int((named & self.t2d.bool()).sum())
        if not found == int(named.sum()) == int(self.t2d.sum()) == size:
            raise ValueError(
                f"This drafter drafts {size} tokens of {vocabulary}, but d2t (target id = i + d2t[i], int64) and t2d "
                f"(membership) agree on {found} of them: the checkpoint is damaged, as by converting every tensor to a "
                "16-bit dtype. Convert it again without these two; `ppow doctor` says whether t2d alone can fix it."
            )
        self._vocabulary_is_right = self.d2t.data_ptr()

    def embedding_for(self, target: PreTrainedModel) -> nn.Module:
        """The module that embeds tokens: the drafter's own, or the target's when they are shared, with its head."""
        if not self.config.share_target_head:
            return target.get_input_embeddings() if self.config.share_target_embeddings else self.embed_tokens
        return TargetWords(target, self.draft_columns() if self.pruned else None)

    def attend(self, cache: SlotCache, mask: torch.Tensor | None) -> Attend:
        """Attention over ``cache`` for :meth:`step`, under an additive mask or none."""
        return CachedAttention(cache, mask)

    def get_input_embeddings(self) -> nn.Module | None:
        """The drafter's own embeddings; None when it reads its target's."""
        return getattr(self, "embed_tokens", None)

    # -- the drafter as an assistant ---------------------------------------------------------------------------------

    def assisted_decoding(
        self, target: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any
    ) -> PPOWGenerateOutput | torch.Tensor:
        """What ``target.generate(..., assistant_model=drafter)`` runs; arguments as transformers' decoding methods."""
        return decode(target, input_ids, assistant_model=self, **kwargs)

    def explain(
        self,
        target: PreTrainedModel,
        prompt: torch.Tensor,
        answer: list[int],
        expected: list[int],
        config: GenerationConfig | None = None,
    ) -> list[Difference]:
        """Why a greedy answer with this drafter is not stock ``generate``'s: see :func:`lossless_ppow.explain`."""
        return explain(target, self, prompt, answer, expected, config)

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError: a drafter cannot generate alone."""
        raise ValueError(
            "A PPOW drafter drafts for its target and cannot generate alone. "
            "Call target.generate(**inputs, assistant_model=drafter)."
        )

    @staticmethod
    def class_for(architecture: str | None) -> "type[PPOWDrafter]":
        """The class of drafters of an architecture."""
        if architecture != "block":
            return PPOWDrafter
        from .block_ppow import PPOWBlockDrafter  # which builds on this module

        return PPOWBlockDrafter

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        target: PreTrainedModel | PreTrainedConfig | str | None = None,
        **kwargs: Any,
    ) -> "PPOWDrafter":
        """As in transformers; also takes an EAGLE-3 drafter of another trainer, where the package `ppow` is installed.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            target: the drafter's target (model, configuration, folder or Hub id). Needed for a drafter of another
                trainer, whose checkpoint leaves things to its target; otherwise not looked at.
            **kwargs: as in transformers.

        Raises:
            ValueError: a path to nothing, another trainer's drafter without the package or a target, or one that cannot
                be imported.
        """
        source, hub = pretrained_model_name_or_path, {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        if source is None or kwargs.get("config"):
            return super().from_pretrained(source, *args, **kwargs)
        check_path(source)
        config, _ = PPOWConfig.get_config_dict(source, **hub)
        kind = cls.class_for(config.get("architecture"))
        if not issubclass(cls, kind):
            return kind.from_pretrained(source, *args, target=target, **kwargs)
        if not config or config.get("model_type") == PPOWConfig.model_type:  # without one, transformers says so
            return super().from_pretrained(source, *args, **kwargs)
        try:  # by name: a drafter's repository carries no other trainers' formats, and must not ask for the package
            foreign = importlib.import_module("ppow.training.convert")
        except ImportError as error:
            raise ValueError(
                f"{source} is no PPOW drafter (model_type {config.get('model_type')!r} in its config.json). An EAGLE-3 "
                f"drafter of another trainer is read by the package `ppow`, which is not installed here ({error}): "
                "`pip install .` in a clone of PPOW's repository, or `ppow import` it where the package is."
            ) from error
        if target is None:
            raise ValueError(
                f"{source} is no PPOW drafter. If it is an EAGLE-3 drafter of another trainer, say for which target: "
                "PPOWDrafter.from_pretrained(..., target=<model, Hub id or folder>), or `ppow import` it first."
            )
        imported = foreign.import_checkpoint(str(source), target, PPOWDrafter, **hub)
        rest = {key: value for key, value in kwargs.items() if key not in hub}
        kind = cls.class_for(imported.config.architecture)
        return super(PPOWDrafter, kind).from_pretrained(
            None, *args, config=imported.config, state_dict=imported.tensors, **rest
        )

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save weights, configuration, code, and ``custom_generate/``, so that the folder serves every entry point."""
        if is_main_process:
            folder = Path(save_directory) / "custom_generate"
            folder.mkdir(parents=True, exist_ok=True)
            entrances = Path(inspect.getfile(register_assisted_decoding))
            shutil.copyfile(entrances, folder / entrances.name)
            (folder / "generate.py").write_text(CUSTOM_GENERATE)
        kind = type(self)
        place = f"{kind.__module__.rsplit('.', 1)[-1]}.{kind.__name__}"
        # assistants are loaded by either class, and transformers would write one of them only
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **dict.fromkeys(AUTO_CLASSES, place)}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def _init_head(self) -> None:
        weight = torch.zeros_like(self.confidence_head.weight)
        weight[:, -1] = 1.0
        initialization.copy_(self.confidence_head.weight, weight)
        initialization.zeros_(self.confidence_head.bias)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PPOWDrafter) and module.config.confidence_head:
            module._init_head()
        if isinstance(module, PPOWDrafter) and module.pruned:
            # through `initialization`, which leaves tensors alone that a checkpoint has filled
            initialization.zeros_(module.d2t)
            initialization.copy_(module.t2d, torch.arange(module.config.vocab_size) < module.config.draft_vocab_size)


PPOWDrafter.register_for_auto_class("AutoModel")
PPOWConfig.register_for_auto_class("AutoConfig")
register_assisted_decoding()
