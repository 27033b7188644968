"""The block drafter: a whole window in one forward, in the layout of DFlash (arXiv 2602.06036).

    c = hidden_norm(fc(cat(tapped hidden states of the target)))      # (.., n_taps * Ht) -> (.., H), once
    block = embedding of the anchor x_n, and of ``mask_token_id`` at the places behind it
    every layer: queries of the block attend to keys and values of c at the places before x_n and of the whole block
    logits = the target's own head over norm(out)

Context rows have keys and values only: no queries, no MLP. Embedding and head are the target's, frozen, and not in the
checkpoint. Slots cannot see each other's tokens, so a head of low rank may condition each on the token before it
(DSpark, arXiv 2607.05147): its bias is ``markov_out(markov_in(x_prev))``.

With ``predict_from_anchor`` row j of the block predicts the token behind its own place (DSpark), else the token at it,
and the anchor's row predicts nothing (DFlash). The first is the default: no row is without use.
"""

from typing import Any, NoReturn

import torch
from torch import nn
from transformers import GenerationConfig, initialization
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from .configuration_ppow import PPOWConfig
from .drafting_ppow import DrafterState, Steps
from .graphs_ppow import GraphDrafter
from .modeling_ppow import Attend, PPOWDecoderLayer, PPOWDrafter, PPOWRMSNorm
from .words_ppow import TargetWords

Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin (B, N, d)


class PPOWBlockDrafter(PPOWDrafter):
    """A block drafter for one target; used as every :class:`PPOWDrafter`."""

    def __init__(self, config: PPOWConfig):
        super(PPOWDrafter, self).__init__(config)
        if not config.is_block:
            raise ValueError(f"architecture={config.architecture!r} is no block drafter's: expected 'block'.")
        assert config.target_hidden_size is not None and config.target_taps is not None
        assert config.draft_vocab_size is not None
        self.fc = nn.Linear(len(config.target_taps) * config.target_hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = PPOWRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList([PPOWDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = PPOWRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.markov_rank:
            self.markov_in = nn.Embedding(config.vocab_size, config.markov_rank)
            self.markov_out = nn.Linear(config.markov_rank, config.draft_vocab_size, bias=False)
        if config.confidence_head:
            self.confidence_head = nn.Linear(config.hidden_size + 1, 2)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.open_draft_vocabulary()
        self.post_init()
        self.generation_config = GenerationConfig(window_size=config.longest_window)

    # -- the network -------------------------------------------------------------------------------------------------

    def fuse(self, taps: torch.Tensor) -> torch.Tensor:
        """Target taps (.., n_taps * Ht), concatenated in tap order -> context rows (.., H)."""
        return self.hidden_norm(self.fc(taps))

    def context(self, fused: torch.Tensor, rotary: Rotary) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Context rows (B, N, H) -> every layer's keys and values (B, heads, N, d)."""
        found = []
        for layer in self.layers:
            own: Any = layer.self_attn
            key, value = (proj(fused).unflatten(-1, (-1, own.head_dim)) for proj in (own.k_proj, own.v_proj))
            key = own.k_norm(key).transpose(1, 2)
            cos, sin = (part[:, None] for part in rotary)
            found.append((key * cos + rotate_half(key) * sin, value.transpose(1, 2)))
        return found

    def block(self, anchors: torch.Tensor, words: TargetWords) -> torch.Tensor:
        """Anchor tokens (..) -> the rows (.., block_size, H) that their blocks begin with."""
        known = words(anchors).to(self.dtype)[..., None, :]
        mask = words(anchors.new_full((1,), self.config.mask_token_id)).to(self.dtype)
        return torch.cat((known, mask.expand(*anchors.shape, self.config.block_size - 1, -1)), -2)

    def step(
        self, inputs_embeds: torch.Tensor | None, hidden: torch.Tensor, rotary: Rotary, attend: Attend
    ) -> torch.Tensor:
        """One pass of block rows (B, N, H) through the layers -> features (B, N, H) for the head.

        ``inputs_embeds`` is not looked at: the rows begin with their embeddings.
        """
        for layer in self.layers:
            hidden = layer(hidden, hidden, rotary, attend)
        return self.norm(hidden)

    def drafting_rows(self, features: torch.Tensor) -> torch.Tensor:
        """Of a block's rows (.., block_size, H) those that predict, in the order of the tokens drafted."""
        return features if self.config.predict_from_anchor else features[..., 1:, :]

    def conditioned(self, logits: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Logits (.., D) given the tokens (..), target ids, before those that they predict."""
        if not self.config.markov_rank:
            return logits
        return logits + self.markov_out(self.markov_in(previous)).to(logits)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a ValueError: a block drafter is run by its target's ``generate``, and by training."""
        raise ValueError(
            "A block drafter drafts whole blocks for its target: call target.generate(..., assistant_model=drafter)."
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "markov_out", None):
            initialization.zeros_(module.weight)  # no bias at first


class BlockState(DrafterState):
    """The block drafter's side of a running generation: keys and values of the context, one for every slot kept."""

    def extend(self, taps: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, counts: torch.Tensor) -> None:
        """As in :class:`DrafterState`; the block's own entries are written behind and never kept."""
        drafter = self.drafter
        fused = drafter.fuse(taps.to(device=drafter.device, dtype=drafter.dtype))
        width = positions.shape[1]
        self.cache.open_window(self.lengths[:, None] + torch.arange(width, device=positions.device), self._view(width))
        for index, entries in enumerate(drafter.context(fused, drafter.rotary(fused, positions))):
            self.cache.update(*entries, index)
        self.hidden = fused[:, :0]
        self.positions = positions.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        self.lengths, self._longest = self.lengths + counts, None

    def _slots(self, root: torch.Tensor) -> torch.Tensor:
        """One forward of the block behind ``root`` (B,): -> features (B, K, H) of every slot."""
        block = self.drafter.block(root, self.embed)
        place = torch.arange(block.shape[1], device=root.device)
        rotary = self.drafter.rotary(block, self.positions[:, None] + 1 + place)
        seen = torch.ones(len(root), len(place), len(place), dtype=torch.bool, device=root.device)
        slots = self.lengths[:, None] + place
        return self.drafter.drafting_rows(self._step(block, block, rotary, slots, self.lengths, seen, len(place)))

    def _chain_steps(self, root: torch.Tensor, size: int) -> Steps:
        features = self._slots(root)[:, :size]
        logits = self.drafter.logits(features, self.embed)  # unconditioned
        for i in range(size):
            self.standing = features[:, i]
            root = yield self.drafter.conditioned(logits[:, i], root)

    def _tree_steps(self, root: torch.Tensor, depth: int, width: int) -> Steps:
        logits, tokens = self.drafter.logits(self._slots(root)[:, :depth], self.embed), root[:, None]
        for i in range(depth):
            slot = logits[:, i : i + 1].expand(-1, tokens.shape[1], -1)
            tokens, _ = yield self.drafter.conditioned(slot, tokens)


class GraphBlock(GraphDrafter, BlockState):
    """The same, replayed from graphs: one for what is kept, one for the next window."""


PPOWBlockDrafter.state_kind, PPOWBlockDrafter.graph_kind = BlockState, GraphBlock
PPOWBlockDrafter.register_for_auto_class("AutoModel")
