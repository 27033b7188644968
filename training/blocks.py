"""Blocks of a block drafter along texts, with gradients: many anchors of every text in one forward.

A block attends to the context strictly before its anchor, whose own taps do not exist when it is drafted from, and to
itself (DFlash, arXiv 2602.06036). :class:`Blocks` answers to the names of :class:`ppow.training.unrolled.Unrolled`, so
what learns from windows, or measures them, does not ask which drafter it has.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ppow import PPOWBlockDrafter, PPOWDrafter
from ppow.attention_ppow import without_cudnn_attention
from ppow.words_ppow import TargetWords

from .unrolled import Unrolled

ROWS = 1024  # block rows that attend together: each sees a text's context and, masked or not, all of these rows


class BlockAttention:
    """``attend`` of :meth:`PPOWBlockDrafter.step` for R blocks of N rows of each text.

    Args:
        context: of every layer, keys and values (B, heads, T, d) of the texts.
        anchors: (B, R) places of the anchors; a block sees the context before its anchor.
        size: N.
    """

    def __init__(self, context: list[tuple[torch.Tensor, torch.Tensor]], anchors: torch.Tensor, size: int):
        self.context, self.parts = context, []
        place = torch.arange(context[0][0].shape[2], device=anchors.device)
        each = max(1, ROWS // size)  # blocks
        for first in range(0, anchors.shape[1], each):
            some = anchors[:, first : first + each]
            before = (place < some[:, :, None]).repeat_interleave(size, dim=1)  # (B, r * N, T)
            block = torch.arange(before.shape[1], device=anchors.device) // size
            own = (block[:, None] == block).expand(len(anchors), -1, -1)
            rows = slice(first * size, first * size + before.shape[1])
            self.parts.append((rows, torch.cat((before, own), -1)[:, None]))

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend in one layer: query (B, A, R * N, d), key and value (B, K, R * N, d) -> (B, A, R * N, d)."""
        groups, found = query.shape[1] // key.shape[1], []
        query, key = query.to(value.dtype), key.to(value.dtype)
        context = [entries.to(value.dtype) for entries in self.context[layer]]
        for rows, mask in self.parts:
            keys, values = (
                torch.cat((before, own[:, :, rows]), 2).repeat_interleave(groups, dim=1)
                for before, own in zip(context, (key, value))
            )
            part = query[:, :, rows]
            with without_cudnn_attention():  # every batch has another length
                found.append(nn.functional.scaled_dot_product_attention(part, keys, values, attn_mask=mask))
        return torch.cat(found, 2)


class Blocks:
    """A block drafter over texts x (B, T); see :class:`ppow.training.unrolled.Unrolled`.

    Window s has x_{s+1} as its anchor and drafts x_{s+2}, x_{s+3}, ... Its features come from one forward; a step only
    tells which token the next one follows.
    """

    starts: torch.Tensor
    steps: int
    slots: torch.Tensor  # (B, R, K, H) features of the open windows
    previous: torch.Tensor  # (B, R) tokens before those that the present step predicts

    def __init__(self, drafter: PPOWBlockDrafter, words: TargetWords, input_ids: torch.Tensor, taps: torch.Tensor):
        self.drafter, self.words, self.input_ids = drafter, words, input_ids
        fused = drafter.fuse(taps.to(drafter.dtype))
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        self.context = drafter.context(fused, drafter.rotary(fused, positions))

    def begin(self, starts: torch.Tensor) -> torch.Tensor:
        """Draft the blocks of windows ``starts`` (B, R): -> features (B, R, H) of each first slot."""
        self.starts, self.steps = starts, 0
        self.previous = self.input_ids.gather(1, starts + 1)
        block = self.drafter.block(self.previous, self.words)  # (B, R, N, H)
        size = block.shape[2]
        positions = (starts + 1)[:, :, None] + torch.arange(size, device=starts.device)
        rows = block.flatten(1, 2)
        rotary = self.drafter.rotary(rows, positions.flatten(1))
        features = self.drafter.step(None, rows, rotary, BlockAttention(self.context, starts + 1, size))
        self.slots = self.drafter.drafting_rows(features.unflatten(1, (-1, size)))
        return self.slots[:, :, 0]

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Give each window its next token (B, R): -> features (B, R, H) of the slot behind it.

        Raises:
            ValueError: behind the last slot of the blocks.
        """
        self.steps, self.previous = self.steps + 1, tokens
        if self.steps == self.slots.shape[2]:
            raise ValueError(
                f"This block drafter drafts {self.steps} tokens at once, and more were asked for: lower the window."
            )
        return self.slots[:, :, self.steps]

    def logits(self, features: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Features (.., H) and the tokens (..) before what they predict -> logits (.., V)."""
        return self.drafter.conditioned(self.drafter.logits(features, self.words), previous)


def unroll(
    drafter: PPOWDrafter, target: PreTrainedModel, input_ids: torch.Tensor, taps: torch.Tensor
) -> Unrolled | Blocks:
    """A drafter of either kind over texts (B, T) with their taps (B, T, n_taps * Ht), to open windows along them."""
    kind: Any = Blocks if drafter.config.is_block else Unrolled
    return kind(drafter, drafter.embedding_for(target), input_ids, taps)
