"""Stage 2: PPOW, window-level reinforcement learning of a supervised drafter (arXiv 2605.14978).

    ppow reinforce --target TARGET --drafter runs/stage1 --data CHATS --output-dir runs/stage2

With ``--estimator rollout`` as published: each step draws windows from the target's own texts, drafts a group of
continuations from each, lets the target verify all of them in one forward, rewards accepted prefixes per unit of cost,
and moves the drafter by group-relative advantages under a clipped objective, held near the *target* by a KL term.
With ``--estimator exact`` (the default, ours) each step takes the same reward's expectation in closed form along the
texts (``objectives.exact_loss``), beside LK's loss.

From the paper: both rewards, ADAW and its switch, groups of 8 windows of 10, group-relative advantages, the clipped
objective, the anchor. The paper leaves open and we chose (see ``ReinforceConfig`` for the values): learning rate and
schedule, clip range, KL weight and its direction, the scale of the proximity reward, rollout temperature, the switch
step and the sampling formula, greedy verification in training, and that advantage and anchor act on reachable tokens
only (those up to the first rejection).
"""

import copy

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ppow import PPOWDrafter
from ppow.target_ppow import check_pair

from . import plan, supervised
from .config import ReinforceConfig
from .loading import named
from .loop import Batch, Trainer
from .objectives import OBJECTIVES, Rollouts, objective_of
from .rollout import Rollout, policy_logits, roll_out, window_reward
from .supervised import EVAL_WINDOW, evaluate, freeze_embedding, load_examples, load_target, pad_token
from .target import FrozenTarget
from .text_windows import read_windows


def main(config: ReinforceConfig) -> None:
    if config.plan is not None:
        plan.show(config, *supervised.configs(config))
        return
    supervised.run(config, train)


def train(config: ReinforceConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> None:
    examples = load_examples(config, config.data, tokenizer, config.window_size, answer=config.window_size)
    held_out = load_examples(config, config.eval_data, tokenizer, EVAL_WINDOW) if config.eval_data else []
    target = load_target(config, accelerator)
    with named("drafter", config.drafter):
        drafter = PPOWDrafter.from_pretrained(config.drafter, dtype=torch.float32).to(accelerator.device).train()
    freeze_embedding(drafter)
    check_pair(target.model, drafter)
    target.taps = drafter.config.target_taps
    pad = pad_token(tokenizer)
    trainer = Trainer(config, drafter, examples, pad, accelerator, held_out)
    trainer.announce(target.model, held_out)
    reference = frozen_reference(config, drafter)
    rolls = objective_of(config).batch == "rollouts"

    for step in trainer.steps():
        batches, rollouts = trainer.batches(step), []
        if rolls:
            with trainer.autocast():
                rollouts = [roll_out(config, target, drafter, batch, step, reference) for batch in batches]
        given = [(step, batch, rollout) for batch, (rollout, _) in zip(batches, rollouts)]
        given = given or [(step, batch) for batch in batches]
        losses = [lambda g=g: loss(config, target, drafter, *g) for g in given]
        metrics = trainer.update(step, losses, times=config.updates_per_rollout if rolls else 1)
        if rolls:
            metrics |= trainer.average([found for _, found in rollouts])
        if held_out and (step % config.eval_every == 0 or step == config.steps):
            metrics |= evaluate(target, drafter, held_out, pad, trainer)
        trainer.record(step, metrics)


def frozen_reference(config: ReinforceConfig, drafter: PPOWDrafter) -> PPOWDrafter | None:
    """The drafter as it starts, for GTO, which rewards a tree by what it gains over this one's; else None."""
    if config.objective != "gto":
        return None
    return copy.deepcopy(drafter).eval().requires_grad_(False)


def loss(
    config: ReinforceConfig,
    target: FrozenTarget,
    drafter: PPOWDrafter,
    step: int,
    batch: Batch,
    rollout: Rollout | None = None,
) -> tuple[torch.Tensor, dict]:
    """The configured objective on a batch of texts, or on what was rolled out from them: -> loss (), metrics."""
    objective = objective_of(config)
    k = torch.arange(config.window_size + 1, device=batch.input_ids.device)
    rewards = window_reward(config, k)  # (K + 1,)
    if objective.batch == "text":
        windows, metrics = read_windows(config, target, drafter, batch, step)
        value, found = objective.function(windows, config, rewards)
        if config.supervised_coef:
            taught = OBJECTIVES[config.supervised_loss].function(windows, config, rewards)[0]
            value = value + config.supervised_coef * taught
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
        taught = supervised.loss(target, drafter, batch, config.window_size, config.step_weight)[0]
        value = value + config.supervised_coef * taught
    return value, metrics
