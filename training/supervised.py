"""Stage 1: supervised initialisation of a drafter with EAGLE-3's training-time test.

    ppow supervised --target TARGET --data CHATS --output-dir runs/stage1

From every position of the target's own text whose window meets an answer the drafter drafts ``ttt_steps`` tokens on its
own features, given the text's tokens, and learns the target's distribution over the draft vocabulary at each of them;
step i weighs ``step_weight ** i`` (EAGLE-3, arXiv 2503.01840). The target runs along ("online"): nothing is stored on
disk.

Taken from EAGLE-3: the unrolling, the soft labels, the weights. Ours: a fresh drafter starts from the target's
embedding and from the rows of its head that belong to the draft vocabulary; the learning-rate schedule.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ppow import PPOWDrafter
from ppow.drafting_ppow import DEFAULT_WINDOW_SIZE

from . import preparation
from .config import SupervisedConfig
from .data import Batch, Example, make_batch, to_device
from .loop import Trainer
from .objectives import batch_mean, block_loss, supervised_step_loss
from .preparation import load_examples, load_target, pad_token, prepare_drafter
from .target import FrozenTarget
from .text_windows import drawn_windows, read_windows
from .unrolled import Unrolled
from .windows import sample_windows, wanted_windows

EVAL_WINDOW = DEFAULT_WINDOW_SIZE  # the same in both stages, so that their curves compare


@functools.cache
def compiled() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """:func:`supervised_step_loss`, compiled once for any number of positions."""
    return torch.compile(supervised_step_loss, dynamic=True)


def main(config: SupervisedConfig) -> None:
    """The command: see :func:`ppow.training.preparation.run`, then :func:`train`."""
    preparation.run(config, train)


def train(config: SupervisedConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> None:
    """All steps of the run, or those that a resumed one still has to do.

    Raises:
        ValueError: data, target, drafter and options that do not fit each other, or a run that diverges.
    """
    examples = load_examples(config, config.data, tokenizer, config.ttt_steps)
    held_out = load_examples(config, config.eval_data, tokenizer, EVAL_WINDOW) if config.eval_data else []
    target = load_target(config, accelerator)
    drafter = prepare_drafter(config, target.model, examples).to(accelerator.device).train()
    target.taps = drafter.config.target_taps
    pad = pad_token(tokenizer)
    trainer = Trainer(config, drafter, examples, pad, accelerator, held_out)
    trainer.announce(target.model, held_out)

    for step in trainer.steps():
        losses = [functools.partial(loss_of, config, target, drafter, batch) for batch in trainer.batches(step)]
        metrics = trainer.update(step, losses)
        if held_out and (step % config.eval_every == 0 or step == config.steps):
            metrics |= evaluate(target, drafter, held_out, pad, trainer, config.step_weight)
        trainer.record(step, metrics)


def loss_of(
    config: SupervisedConfig, target: FrozenTarget, drafter: PPOWDrafter, batch: Batch
) -> tuple[torch.Tensor, dict]:
    """The configured loss of a drafter of either kind on one batch: -> loss (), metrics."""
    anchors, fused = config.windows_of(drafter.config.is_block), config.compile_loss
    if drafter.config.is_block:
        return block_step(target, drafter, batch, config.step_weight, config.block_loss, anchors, fused=fused)
    return loss(target, drafter, batch, config.ttt_steps, config.step_weight, anchors, fused)


def block_step(
    target: FrozenTarget,
    drafter: PPOWDrafter,
    batch: Batch,
    step_weight: float,
    kind: str = "dspark",
    anchors: int | None = None,
    size: int | None = None,
    fused: bool = False,
) -> tuple[torch.Tensor, dict]:
    """Blocks of a block drafter along one batch of texts: -> loss (), metrics as of :func:`loss`.

    Args:
        kind: see :func:`ppow.training.objectives.block_loss`.
        anchors: windows drawn from each text; None: all that begin at an answer's token.
        size: K, slots that learn; None: all.
        fused: see :func:`ppow.training.text_windows.read_windows`.
    """
    chosen = drawn_windows(batch, anchors)
    windows, _ = read_windows(target, drafter, batch, size or drafter.config.longest_window, chosen, fused)
    value, metrics = block_loss(windows, kind, step_weight)
    hit, count = windows.states.hit & windows.mask, windows.mask.sum(0).clamp(min=1)
    reached = hit.long().cumprod(-1).sum(0) / count  # (K,)
    return value, metrics | {"agreement": hit.sum(0) / count, "acceptance_length": 1 + reached.sum()}


def _drafted(
    answers: torch.Tensor, steps: int, anchors: int | None, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[int]]:
    """Which windows a step of training drafts, and which of their states count, from the loss mask (B, T) on the host.

    Returns:
        starts (B, R); place (B, R, steps) of the drafted tokens in the texts behind each other; of each step the n
        states that count, as places in (B * R), and where the target says the word that each is to draft; of each step
        how many windows from an answer's token reach so far.
    """
    length = answers.shape[1]
    asked = answers[:, 2:].clone()  # window s drafts x_{s+2}, x_{s+3}, ..; those that meet an answer count
    for i in range(1, steps):
        asked[:, :-i] |= answers[:, 2 + i :]
    if anchors is None:
        starts, exists = wanted_windows(asked)
    else:
        starts, exists = sample_windows(None, asked, anchors, batch.generator(), adaptive=False)
    place = starts[:, :, None] + 2 + torch.arange(steps)
    inside, place = place < length, place.clamp(max=length - 1)
    masks = answers.gather(1, place.flatten(1)).view(place.shape) & inside & exists[:, :, None]
    begun = (masks[:, :, :1] & inside).sum((0, 1)).tolist()
    place += length * torch.arange(len(answers))[:, None, None]
    states = [masks[:, :, i].flatten().nonzero()[:, 0] for i in range(steps)]
    said = [place[:, :, i].flatten()[here] - 1 for i, here in enumerate(states)]
    return starts, place, states, said, begun


def loss(
    target: FrozenTarget,
    drafter: PPOWDrafter,
    batch: Batch,
    ttt_steps: int,
    step_weight: float,
    anchors: int | None = None,
    fused: bool = False,
) -> tuple[torch.Tensor, dict]:
    """The training-time test on one batch of texts of at least ``ttt_steps`` + 2 tokens: -> loss (), metrics.

    ``agreement`` (steps,) is how often the drafter's first choice is the target's at each draft step;
    ``acceptance_length`` what that means for greedy windows of ``ttt_steps`` tokens along the text, bonus included.
    A block drafter takes :func:`block_step` instead, of so many slots or as many as it has.
    """
    if drafter.config.is_block:
        size = min(ttt_steps, drafter.config.longest_window)
        return block_step(target, drafter, batch, step_weight, anchors=anchors, size=size, fused=fused)
    ids, words = batch.input_ids, drafter.embedding_for(target.model)
    answers = batch.loss_mask.cpu()  # before the device has anything to be waited for
    reading = target.read(ids)
    labels = reading.logits.index_select(-1, drafter.draft_columns()).flatten(0, 1)  # (B * T, D)
    best = reading.logits.argmax(-1).flatten()  # (B * T,), of the whole vocabulary: what verification compares with
    starts, place, states, said, begun = _drafted(answers, ttt_steps, anchors, batch)
    starts, place, *found = to_device([starts, place, *states, *said], ids.device)
    states, said = found[:ttt_steps], found[ttt_steps:]
    tokens = ids.flatten()[place]  # (B, R, steps)

    unrolled = Unrolled(drafter, words, ids, reading.taps)
    features, total, weights = unrolled.begin(starts), torch.zeros((), device=ids.device), 0.0
    losses, agreements, lengths = [], [], torch.ones((), device=ids.device)
    unbroken = torch.ones(starts.numel(), dtype=torch.bool, device=ids.device)
    for i, (here, word) in enumerate(zip(states, said)):
        if i:
            features = unrolled.advance(tokens[:, :, i - 1])
        logits = drafter.logits(features.flatten(0, 1).index_select(0, here), words)  # (n, D)
        losses_of = compiled() if fused and len(here) > 1 else supervised_step_loss  # one row would be compiled anew
        step_loss = batch_mean(losses_of(logits, labels.index_select(0, word)))
        total = total + step_weight**i * step_loss
        weights += step_weight**i
        right = drafter.to_target_ids(logits.detach().argmax(-1)) == best[word]
        unbroken = unbroken & torch.zeros_like(unbroken).index_copy(0, here, right)
        lengths = lengths + unbroken.sum() / max(1, begun[i])
        losses.append(step_loss.detach())
        agreements.append(right.sum() / max(1, len(here)))
    metrics = {
        "step_losses": torch.stack(losses),
        "agreement": torch.stack(agreements),
        "acceptance_length": lengths,
    }
    return total / weights, metrics


@torch.no_grad()
def evaluate(
    target: FrozenTarget,
    drafter: PPOWDrafter,
    examples: Sequence[Example],
    pad: int,
    trainer: Trainer,
    step_weight: float = 1.0,
) -> dict[str, torch.Tensor]:
    """The same figures for windows of 10 on the first 64 held-out texts, named eval_*; the same on every process.

    Of a block drafter the loss is DSpark's, whatever it learns from, and every window of an answer counts.
    """
    size, examples = trainer.config.batch_size, examples[:64]  # the same ones whatever the batch
    drafter.eval()
    collected = []
    with trainer.mean_weights(), trainer.autocast():
        for first in range(0, len(examples), size):
            batch = make_batch(examples[first : first + size], pad, trainer.accelerator.device, seed=0)
            value, metrics = loss(target, drafter, batch, EVAL_WINDOW, step_weight)
            collected.append({"loss": value, **metrics})
    drafter.train()
    return {f"eval_{key}": torch.stack([m[key].float() for m in collected]).mean(0) for key in collected[0]}
