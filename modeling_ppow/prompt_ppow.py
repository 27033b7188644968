"""What a call of ``generate`` gives the target to read, checked before anything is computed."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel

from .cache_ppow import CACHE_NAME, cache_obstacle


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs: where its embeddings lie, or where accelerate brings offloaded ones to run."""
    embeddings = model.get_input_embeddings()
    for module in (embeddings, model):
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.empty(0, device=device).device
    return embeddings.weight.device if embeddings is not None else model.device


@dataclass
class Prompt:
    """What the target still has to read.

    Attributes:
        ids: (B, n) new tokens, int64, where the target takes them; the ``start`` tokens before them are in ``past``.
        attention_mask: (B, start + n) or None when nothing is padded.
        position_ids: (B, n).
        past: the cache of the call, None where the target's class brings none.
        start: tokens that it holds.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    past: Cache | None
    start: int

    @property
    def end(self) -> int:
        """Tokens of the whole prompt, those in the cache included."""
        return self.start + self.ids.shape[1]

    @property
    def valid(self) -> torch.Tensor | None:
        """The mask as bool, or None."""
        return None if self.attention_mask is None else self.attention_mask.bool()

    @classmethod
    def read(
        cls, target: PreTrainedModel, input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> "Prompt":
        """Split off what a passed cache already holds; ids may be the whole conversation or only its new part.

        Raises:
            ValueError: for ids, mask, positions and cache that do not fit together.
        """
        check_ids(target, input_ids)
        past, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        start = 0 if past is None else int(past.get_seq_length())
        check_cache(past, start, input_ids)
        given = input_ids.shape[1]
        covered = mask.shape[-1] if mask is not None else getattr(config, "_mask_length", given)
        if covered not in (given, start + given):
            raise ValueError(
                f"attention_mask covers {covered} tokens, input_ids has {given} and {CACHE_NAME} holds {start}: a mask "
                f"covers the whole text, cached tokens included ({given} if input_ids repeats them, else "
                f"{start + given})."
            )
        ids = input_ids[:, start:] if covered == given else input_ids
        if ids.shape[1] == 0:
            raise ValueError(
                f"{CACHE_NAME} already holds {start} tokens, the prompt has {given}: nothing is left to continue "
                "from. Pass a longer prompt, or crop the cache by one token."
            )
        device = device_of(target)
        mask = None if mask is None else checked_mask(mask, ids.shape[0], device)
        positions = checked_positions(model_kwargs.get("position_ids"), ids, start, mask).to(device)
        return cls(ids.to(device, torch.long), mask, positions, past, start)


def check_ids(target: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Raise a ValueError for what the target's embeddings cannot look up."""
    kind = input_ids.dtype
    if input_ids.dim() != 2 or 0 in input_ids.shape or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise ValueError(
            f"A drafter needs a prompt of at least one token id in input_ids, integers of shape (batch, tokens); got "
            f"input_ids {tuple(input_ids.shape)} of {kind}."
        )
    known = getattr(target.get_input_embeddings(), "num_embeddings", None)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or (known is not None and high >= known):
        raise ValueError(
            f"input_ids holds token ids from {low} to {high}, the target's embeddings know 0 to "
            f"{'..' if known is None else known - 1}. Tokenize with the target's own tokenizer."
        )


def check_cache(past: Cache | None, start: int, input_ids: torch.Tensor) -> None:
    """Raise a ValueError for a cache of ``start`` entries that does not serve a drafter or does not belong to ids."""
    obstacle = None if past is None else cache_obstacle(past)
    if past is not None and obstacle is None and start:
        rows = next(layer.keys.shape[0] for layer in past.layers if layer.is_initialized)
        if rows != input_ids.shape[0]:
            obstacle = f"holds {rows} rows and input_ids has {input_ids.shape[0]}"
    if obstacle is not None:
        raise ValueError(f"{CACHE_NAME} {obstacle}. Pass a DynamicCache (empty or of an earlier call), or none.")


def checked_mask(mask: torch.Tensor, batch: int, device: torch.device) -> torch.Tensor | None:
    """A mask of the whole text (B, n) as int64 on ``device``, None when it hides nothing."""
    if mask.dim() != 2 or mask.shape[0] != batch:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, tokens) of 0 and 1.")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask holds other values than 0 (padding) and 1 (a token of the text).")
    mask = mask.long()
    if not bool(mask.any(1).all()):
        raise ValueError("attention_mask hides every token of a row: there is nothing to continue from.")
    return None if bool(mask.all()) else mask.to(device)


def checked_positions(
    positions: torch.Tensor | None, ids: torch.Tensor, start: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """Positions (B, n) int64 of the new tokens, from what the caller or transformers passes, else from the mask."""
    batch, count = ids.shape
    if positions is None:
        whole = torch.ones(1, start + count, dtype=torch.long) if mask is None else mask
        positions = (whole.cumsum(-1) - 1).clamp(min=0)
    elif positions.dtype.is_floating_point or positions.dtype == torch.bool:
        raise ValueError(f"position_ids holds {positions.dtype}, expected integers.")
    if positions.dim() == 3 and bool((positions == positions[:1]).all()):
        positions = positions[0]  # one plane per axis of an image; for text they are alike
    fits = positions.dim() == 2 and positions.shape[0] in (1, batch) and positions.shape[1] in (count, start + count)
    if not fits:
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)}, expected ({batch}, {count}) for the new tokens or "
            f"({batch}, {start + count}) for the whole text, the same on every axis where there are several."
        )
    return positions[:, -count:].long().expand(batch, -1)
