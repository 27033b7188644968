"""Which windows a step of stage 2 rolls out from: criticality along its texts, and the draw by it (ADAW)."""

import torch

from ppow import PPOWDrafter

from .blocks import Blocks
from .config import ReinforceConfig
from .data import Batch
from .target import Reading
from .unrolled import Unrolled
from .windows import adaptive_on, criticality, masked_mean, sample_windows, window_priority

CRITICALITY_LOGITS = 1 << 26  # looked at together; a float32 tensor of them takes 256 MiB


def text_criticality(
    drafter: PPOWDrafter, unrolled: Unrolled | Blocks, reading: Reading, batch: Batch, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Criticality (B, T - 1) of each pair's prediction, and which pairs predict a token of the answers."""
    critical = []
    # pair t predicts x_{t+2}, on which the target's own word is its distribution at t + 1; a few texts at a time, since
    # this takes several float32 tensors of their size times the draft vocabulary
    pairs = batch.input_ids.shape[1] - 1
    texts = max(1, CRITICALITY_LOGITS // (pairs * len(columns)))
    every = unrolled.begin(torch.arange(pairs, device=columns.device).expand(len(batch.input_ids), -1))
    parts = (values.split(texts) for values in (every, unrolled.previous, reading.logits[:, 1:]))
    for features, previous, logits in zip(*parts):
        draft_logprobs = unrolled.logits(features, previous).float().log_softmax(-1)  # (texts, T - 1, D)
        critical.append(criticality(logits.index_select(-1, columns).float().log_softmax(-1), draft_logprobs))
    valid = torch.zeros(every.shape[:2], dtype=torch.bool, device=columns.device)
    valid[:, :-1] = batch.loss_mask[:, 2:]
    return torch.cat(critical), valid


def choose_windows(
    config: ReinforceConfig, step: int, critical: torch.Tensor, valid: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Draw this step's windows of texts with criticality (B, T - 1), by it once ADAW is on.

    Returns:
        window starts (B, W), which of them exist (B, W), and the metrics that tell how they were drawn.
    """
    priority, starts_exist = window_priority(critical, valid, config.window_size)
    adaptive = adaptive_on(step, config.steps, config.adaptive_switch)
    starts, mask = sample_windows(priority, starts_exist, config.windows_per_sequence, generator, adaptive)
    metrics = {
        "window_criticality": masked_mean(critical.gather(1, starts), mask),
        "text_criticality": critical[valid].mean(),
        "adaptive": torch.tensor(float(adaptive), device=critical.device),
    }
    return starts, mask, metrics
