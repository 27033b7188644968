"""A target's own answers to prompts, in batches of ``generate``."""

import torch
from transformers import GenerationConfig, PreTrainedModel

from ppow.attention_ppow import without_cudnn_attention


def padded_left(prompts: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts as one batch: ``input_ids`` and ``attention_mask`` (B, P) of the longest."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


@without_cudnn_attention()  # every token meets another number of keys
def answer(target: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """One batch of answers, end-of-text token included and padding cut; ``config`` names what to pad with."""
    inputs = padded_left(prompts, config.pad_token_id, target.device)
    out = target.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = target.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in out]
