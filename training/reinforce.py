"""Stage 2: PPOW, window-level reinforcement learning of a supervised drafter (arXiv 2605.14978).

    ppow reinforce --target TARGET --drafter runs/stage1 --data CHATS --output-dir runs/stage2

With ``--preset published``: each step draws windows from the target's own texts, drafts a group of continuations from
each, lets the target verify all of them in one forward, rewards accepted prefixes per unit of cost, and moves the
drafter by group-relative advantages under a clipped objective, held near the *target* by a KL term. With ``--preset
ppow`` (the default, ours) each step takes the same reward's expectation in closed form along the texts
(``objectives.exact_loss``), beside LK's loss.

From the paper: both rewards, ADAW and its switch, groups of 8 windows of 10, group-relative advantages, the clipped
objective, the anchor. The paper leaves open and we chose (the values are in ``ReinforceConfig``, ``objectives`` and
``optimizers``): learning rate and schedule, clip range, KL weight and its direction, the scale of the proximity reward,
rollout temperature, the switch step and the sampling formula, greedy verification in training, and that advantage and
anchor act on reachable tokens only (those up to the first rejection).
"""

import functools

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ppow import PPOWDrafter

from . import preparation, supervised
from .config import ReinforceConfig
from .data import Batch
from .loop import Trainer
from .objectives import STEP_WEIGHT, Rollouts, head_loss, lk_loss, objective_of
from .preparation import load_examples, load_target, pad_token, prepare_drafter
from .rewards import speedup_reward
from .rollout import Rollout, policy_logits, roll_out
from .supervised import EVAL_WINDOW, evaluate
from .target import FrozenTarget
from .text_windows import drawn_windows, read_windows


def main(config: ReinforceConfig) -> None:
    """The command: see :func:`ppow.training.preparation.run`, then :func:`train`."""
    preparation.run(config, train)


def train(config: ReinforceConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> None:
    """All steps of the run, or those that a resumed one still has to do.

    Raises:
        ValueError: data, target, drafter and options that do not fit each other, or a run that diverges.
    """
    examples = load_examples(config, config.data, tokenizer, config.window_size, answer=config.window_size)
    held_out = load_examples(config, config.eval_data, tokenizer, EVAL_WINDOW) if config.eval_data else []
    target = load_target(config, accelerator)
    drafter = prepare_drafter(config, target.model, examples).to(accelerator.device).train()
    longest = drafter.config.longest_window
    if longest is not None and config.window_size > longest:
        raise ValueError(
            f"window_size={config.window_size}, and this block drafter drafts {longest} tokens at once: choose "
            f"--window-size {longest} or less."
        )
    rolls = objective_of(config).batch == "rollouts"
    if config.freeze_drafter:
        drafter.requires_grad_(False)
    if config.confidence_head:
        drafter.add_confidence_head()
    if drafter.config.confidence_head:
        drafter.confidence_head.requires_grad_(not rolls)
    target.taps = drafter.config.target_taps
    pad = pad_token(tokenizer)
    trainer = Trainer(config, drafter, examples, pad, accelerator, held_out)
    trainer.announce(target.model, held_out)
    for step in trainer.steps():
        batches = trainer.batches(step)
        of_batch = functools.partial(loss, config, target, drafter)
        if rolls:
            with trainer.autocast():
                rollouts, found = zip(*(roll_out(config, target, drafter, batch, step) for batch in batches))
            losses = [functools.partial(of_batch, *given) for given in zip(batches, rollouts)]
            metrics = trainer.update(step, losses, times=config.updates_per_rollout) | trainer.average(found)
        else:
            metrics = trainer.update(step, [functools.partial(of_batch, batch) for batch in batches])
        if held_out and (step % config.eval_every == 0 or step == config.steps):
            metrics |= evaluate(target, drafter, held_out, pad, trainer)
        trainer.record(step, metrics)


def loss(
    config: ReinforceConfig,
    target: FrozenTarget,
    drafter: PPOWDrafter,
    batch: Batch,
    rollout: Rollout | None = None,
) -> tuple[torch.Tensor, dict]:
    """The configured objective on a batch of texts, or on what was rolled out from them: -> loss (), metrics."""
    objective = objective_of(config)
    k = torch.arange(config.window_size + 1, device=batch.input_ids.device)
    rewards = speedup_reward(k, config.cost_ratio)  # (K + 1,)
    anchors = config.windows_of(drafter.config.is_block)
    if rollout is None:
        chosen = drawn_windows(batch, anchors)
        windows, metrics = read_windows(target, drafter, batch, config.window_size, chosen, config.compile_loss)
        if config.freeze_drafter:
            return (off := head_loss(windows)), metrics | {"confidence_loss": off.detach()}
        value, found = objective.function(windows, config, rewards)
        if config.supervised_coef:
            value = value + config.supervised_coef * lk_loss(windows)[0]
        if windows.surprise is not None:  # the drafter's own weights meet it in the gradient's norm only
            off = head_loss(windows)
            value, metrics = value + off, metrics | {"confidence_loss": off.detach()}
        return value, metrics | found
    flat = Rollouts(
        draft_ids=rollout.draft_ids.flatten(0, 1),
        draft_logits=policy_logits(config, target, drafter, rollout).flatten(0, 1),
        old_logprobs=rollout.old_logprobs.flatten(0, 1),
        target_logits=rollout.target_logits.flatten(0, 1),
        advantages=rollout.advantages.flatten(0, 1),
        accepted=rollout.accepted.flatten(0, 1),
        window_mask=rollout.window_mask.flatten(),
        temperature=config.rollout_temperature,
    )
    value, metrics = objective.function(flat, config, rewards)
    if config.supervised_coef:
        size, fused = config.window_size, config.compile_loss
        taught, _ = supervised.loss(target, drafter, batch, size, STEP_WEIGHT, anchors, fused)
        value = value + config.supervised_coef * taught
    return value, metrics
