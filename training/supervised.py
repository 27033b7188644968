"""Stage 1: supervised initialisation of a drafter with EAGLE-3's training-time test.

    ppow supervised --target TARGET --data CHATS --output-dir runs/stage1

From every position of the target's own text whose window meets an answer the drafter drafts ``ttt_steps`` tokens on its
own features, given the text's tokens, and learns the target's distribution over the draft vocabulary at each of them;
step i weighs ``step_weight ** i`` (EAGLE-3, arXiv 2503.01840). The target runs along ("online"): nothing is stored on
disk.

Taken from EAGLE-3: the unrolling, the soft labels, the weights. Ours: a fresh drafter starts from the target's
embedding and from the rows of its head that belong to the draft vocabulary; the learning-rate schedule.
"""

import contextlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ppow import PPOWConfig, PPOWDrafter
from ppow.drafting_ppow import DEFAULT_WINDOW_SIZE
from ppow.probe_ppow import check_target
from ppow.target_ppow import check_pair

from . import plan
from .config import SupervisedConfig
from .data import BadRows, draft_vocabulary, encode, load_rows
from .files import claim_folder
from .loading import check_model, named, positions
from .loop import Batch, Trainer, make_batch, on_main
from .objectives import supervised_step_loss
from .target import FrozenTarget
from .unrolled import Unrolled
from .windows import chosen_windows

EVAL_WINDOW = DEFAULT_WINDOW_SIZE  # the same in both stages, so that their curves compare


def main(config: SupervisedConfig) -> None:
    if config.plan is not None:
        plan.show(config, *configs(config))
        return
    run(config, train)


def train(config: SupervisedConfig, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> None:
    examples = load_examples(config, config.data, tokenizer, config.ttt_steps)
    held_out = load_examples(config, config.eval_data, tokenizer, EVAL_WINDOW) if config.eval_data else []
    target = load_target(config, accelerator)
    drafter = prepare_drafter(config, target.model, examples).to(accelerator.device).train()
    target.taps = drafter.config.target_taps
    pad = pad_token(tokenizer)
    trainer = Trainer(config, drafter, examples, pad, accelerator, held_out)
    trainer.announce(target.model, held_out)

    for step in trainer.steps():
        metrics = trainer.update(
            step,
            [lambda b=b: loss(target, drafter, b, config.ttt_steps, config.step_weight) for b in trainer.batches(step)],
        )
        if held_out and (step % config.eval_every == 0 or step == config.steps):
            metrics |= evaluate(target, drafter, held_out, pad, trainer, config.step_weight)
        trainer.record(step, metrics)


def loss(target: FrozenTarget, drafter: PPOWDrafter, batch: Batch, ttt_steps: int, step_weight: float):
    """The training-time test on one batch of texts of at least ``ttt_steps`` + 2 tokens: -> loss (), metrics.

    ``agreement`` (steps,) is how often the drafter's first choice is the target's at each draft step;
    ``acceptance_length`` what that means for greedy windows of ``ttt_steps`` tokens along the text, bonus included.
    """
    ids, length = batch.input_ids, batch.input_ids.shape[1]
    reading = target.read(ids)
    labels = reading.logits.index_select(-1, drafter.draft_columns())  # (B, T, D)
    best = reading.logits.argmax(-1)  # (B, T), of the whole vocabulary: what verification will compare with
    asked = batch.loss_mask[:, 2:].clone()  # window s drafts x_{s+2}, x_{s+3}, ..; those that meet an answer count
    for i in range(1, ttt_steps):
        asked[:, :-i] |= batch.loss_mask[:, 2 + i :]
    starts, exists = chosen_windows(asked)
    place = starts[:, :, None] + 2 + torch.arange(ttt_steps, device=ids.device)  # (B, R, steps) of the drafted tokens
    inside, place = place < length, place.clamp(max=length - 1)
    tokens, answers = (values.gather(1, place.flatten(1)).view(place.shape) for values in (ids, batch.loss_mask))
    masks = answers & inside & exists[:, :, None]
    begun = answers[:, :, :1] & inside & exists[:, :, None]  # windows from an answer's token that reach so far
    text = torch.arange(len(ids), device=ids.device)[:, None].expand(starts.shape)
    # the n states of each step that count; found before the drafter runs, since that waits for the device
    states = [masks[:, :, i].flatten().nonzero()[:, 0] for i in range(ttt_steps)]

    unrolled = Unrolled(drafter, drafter.embedding_for(target.model), ids, reading.taps)
    features, total, weights = unrolled.begin(starts), 0.0, 0.0
    losses, agreements, lengths = [], [], 1.0
    unbroken = torch.ones_like(exists)
    for i, here in enumerate(states):
        if i:
            features = unrolled.advance(tokens[:, :, i - 1])
        row, column = text.flatten()[here], place[:, :, i].flatten()[here] - 1  # of the target's word
        logits = drafter.logits(features.flatten(0, 1).index_select(0, here))  # (n, D)
        step_loss = supervised_step_loss(logits, labels[row, column])
        total = total + step_weight**i * step_loss
        weights += step_weight**i
        right = drafter.to_target_ids(logits.detach().argmax(-1)) == best[row, column]
        hit = torch.zeros_like(exists).flatten().index_copy(0, here, right).view_as(exists)
        unbroken = unbroken & hit
        lengths = lengths + unbroken.sum() / begun[:, :, i].sum().clamp(min=1)
        losses.append(step_loss.detach())
        agreements.append(hit.sum() / masks[:, :, i].sum().clamp(min=1))
    metrics = {
        "step_losses": torch.stack(losses),
        "agreement": torch.stack(agreements),
        "acceptance_length": lengths,
    }
    return total / weights, metrics


@torch.no_grad()
def evaluate(target, drafter, examples, pad: int, trainer: Trainer, step_weight: float = 1.0) -> dict:
    """The same figures for windows of 10 on the first 64 held-out texts, named eval_*; the same on every process."""
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


# -- preparation -------------------------------------------------------------------------------------------------------


def run(config, train: Callable) -> None:
    """What either stage does first; then ``train``, given this run's processes and the target's tokenizer.

    The output folder is this run's alone meanwhile.

    Raises:
        ValueError: a name that is no model or repository, a folder that is no folder or another run's.
    """
    if config.push_to_hub:
        from .hub import check_repository_name

        check_repository_name(config.push_to_hub, "--push-to-hub")
    torch.manual_seed(config.seed)
    accelerator = Accelerator(log_with=config.trackers or None, project_dir=config.output_dir)
    with contextlib.ExitStack() as claimed:
        on_main(accelerator, lambda: claimed.enter_context(claim_folder(config.output_dir)))
        if config.drafter is not None:
            check_model("drafter", config.drafter)
        with named("target", config.target):
            tokenizer = AutoTokenizer.from_pretrained(config.target)
        train(config, accelerator, tokenizer)


def load_target(config, accelerator: Accelerator) -> FrozenTarget:
    """The target of either stage, whole on every process or spread over them."""
    with named("target", config.target):
        if config.shard_target:
            target = FrozenTarget.load_sharded(config.target, config.dtype, accelerator)
        else:
            target = FrozenTarget.load(config.target, config.dtype, accelerator.device)
        # what decoding would refuse is not worth training for
        check_target(target.model, end=config.max_length, ahead=getattr(config, "max_forest_nodes", 0))
        return target


class Examples(list):
    """Encoded texts to learn from. ``dropped`` counts the rows and texts that were left out, by the reason."""

    def __init__(self, examples: list, dropped: dict[str, int]):
        super().__init__(examples)
        self.dropped = {reason: count for reason, count in dropped.items() if count}


def load_examples(config, source: str, tokenizer, steps: int, answer: int = 1) -> Examples:
    """Encoded texts long enough for ``steps`` draft steps, with ``answer`` tokens in a row that a drafter can predict.

    x_0 and x_1 have no drafter pair before them, so a text needs ``steps`` + 2 tokens.
    """
    bad = BadRows(config.skip_bad_rows)
    rows = load_rows(source, config.split, config.limit, bad)
    with named("target", config.target):
        room = positions(AutoConfig.from_pretrained(config.target))
    examples = encode(rows, tokenizer, config.max_length, config.drop_long, bad, room)
    bad.report(source)
    run = "1" * answer
    long = [example for example in examples if len(example.input_ids) >= steps + 2]
    usable = [example for example in long if run in "".join(map(str, map(int, example.loss_mask[2:])))]
    if not usable:
        raise ValueError(
            f"None of the {len(rows)} rows of {source} holds {steps + 2} tokens with an answer of {answer} tokens in "
            "a row to learn from; bring longer answers or raise max_length."
        )
    dropped = {
        **bad.left_out,
        "bad rows": len(bad.found),
        f"fewer than {steps + 2} tokens": len(examples) - len(long),
        f"no answer of {answer} tokens in a row": len(long) - len(usable),
    }
    return Examples(usable, dropped)


def pad_token(tokenizer) -> int:
    """Something to pad with; masked everywhere, so any token does."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def configs(config) -> tuple[PreTrainedConfig, PPOWConfig]:
    """Of the target and of the drafter that a stage would train, without their weights."""
    with named("target", config.target):
        target = AutoConfig.from_pretrained(config.target)
    if config.drafter is None:
        return target, fresh_config(config, target)
    with named("drafter", config.drafter):
        return target, PPOWConfig.from_pretrained(config.drafter)


def prepare_drafter(config: SupervisedConfig, target, examples: list) -> PPOWDrafter:
    """The drafter to train, in float32: a given one, or a fresh one in the shape of the target."""
    if config.drafter is not None:
        with named("drafter", config.drafter):
            drafter = PPOWDrafter.from_pretrained(config.drafter, dtype=torch.float32)
        check_pair(target, drafter)
        return freeze_embedding(drafter)
    drafter = PPOWDrafter(fresh_config(config, target.config))
    if drafter.pruned:
        drafter.set_draft_vocabulary(
            *draft_vocabulary(examples, drafter.config.draft_vocab_size, drafter.config.vocab_size)
        )
    if drafter.config.hidden_size == drafter.config.target_hidden_size:
        with torch.no_grad():
            drafter.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
            drafter.lm_head.weight.copy_(target.get_output_embeddings().weight[drafter.draft_columns()])
    return freeze_embedding(drafter)


def fresh_config(config: SupervisedConfig, target_config) -> PPOWConfig:
    """Of a drafter in the shape of the target, but for what the options say."""
    chosen = {
        "draft_vocab_size": config.draft_vocab_size,
        "num_hidden_layers": config.num_layers,
        "target_taps": config.taps,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
    }
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if {"hidden_size", "num_attention_heads"} & set(chosen):
        chosen.setdefault("head_dim", None)
    return PPOWConfig.from_target(target_config, **chosen)


def freeze_embedding(drafter: PPOWDrafter) -> PPOWDrafter:
    """The embedding stays the target's where the widths allow it, as in EAGLE-3; else it is learned."""
    if drafter.get_input_embeddings() is not None:
        learned = drafter.config.hidden_size != drafter.config.target_hidden_size
        drafter.embed_tokens.weight.requires_grad_(learned)
    return drafter
