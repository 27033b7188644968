"""Stage 2: PPOW, window-level reinforcement learning of a supervised drafter (arXiv 2605.14978).

    ppow reinforce --target TARGET --drafter runs/stage1 --data CHATS --output-dir runs/stage2

Each step draws windows from the target's own texts, drafts a group of continuations from each, lets the target verify
all of them in one forward, rewards accepted prefixes per unit of cost, and moves the drafter by group-relative
advantages under a clipped objective, held near the *target* by a KL term.

From the paper: both rewards, ADAW and its switch, groups of 8 windows of 10, group-relative advantages, the clipped
objective, the anchor. The paper leaves open and we chose (see ``ReinforceConfig`` for the values): learning rate and
schedule, clip range, KL weight and its direction, the scale of the proximity reward, rollout temperature, the switch
step and the sampling formula, greedy verification in training, and that advantage and anchor act on reachable tokens
only (those up to the first rejection).
"""

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from ppow import PPOWDrafter
from ppow.target_ppow import check_pair

from .config import ReinforceConfig
from .loop import Trainer
from .objectives import Rollouts, ppow_loss
from .rollout import Rollout, policy_logits, roll_out
from .supervised import EVAL_WINDOW, evaluate, freeze_embedding, load_examples, pad_token
from .target import FrozenTarget


def main(config: ReinforceConfig) -> None:
    torch.manual_seed(config.seed)
    accelerator = Accelerator(log_with=config.trackers or None, project_dir=config.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(config.target)
    examples = load_examples(config, config.data, tokenizer, config.window_size, answer=config.window_size)
    held_out = load_examples(config, config.eval_data, tokenizer, EVAL_WINDOW) if config.eval_data else []
    target = FrozenTarget.load(config.target, config.dtype, accelerator.device)
    drafter = PPOWDrafter.from_pretrained(config.drafter, dtype=torch.float32).to(accelerator.device).train()
    freeze_embedding(drafter)
    check_pair(target.model, drafter)
    target.taps = drafter.config.target_taps
    pad = pad_token(tokenizer)
    trainer = Trainer(config, drafter, examples, pad, accelerator)

    for step in trainer.steps():
        with trainer.autocast():
            rollouts = [roll_out(config, target, drafter, batch, step) for batch in trainer.batches(step)]
        for _ in range(config.updates_per_rollout):
            metrics = trainer.update(step, [lambda r=r: loss(config, target, drafter, r) for r, _ in rollouts])
        metrics |= trainer.average([found for _, found in rollouts])
        if held_out and (step % config.eval_every == 0 or step == config.steps):
            metrics |= evaluate(target, drafter, held_out, pad, trainer)
        trainer.record(step, metrics)


def loss(config: ReinforceConfig, target: FrozenTarget, drafter: PPOWDrafter, rollout: Rollout):
    """The PPOW objective on one rollout: -> loss (), metrics."""
    logits = policy_logits(config, target, drafter, rollout)
    flat = Rollouts(
        draft_ids=rollout.draft_ids.flatten(0, 1),
        draft_logits=logits.flatten(0, 1),
        old_logprobs=rollout.old_logprobs.flatten(0, 1),
        target_logits=rollout.target_logits.flatten(0, 1),
        advantages=rollout.advantages.flatten(0, 1),
        accepted=rollout.accepted.flatten(0, 1),
        window_mask=rollout.window_mask.flatten(),
        temperature=config.rollout_temperature,
    )
    return ppow_loss(flat, config.clip_range, config.kl_coef)
