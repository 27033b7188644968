"""What both stages do before their first step: claim the folder, load target and drafter, encode the texts."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ppow import PPOWBlockDrafter, PPOWConfig, PPOWDrafter
from ppow.probe_ppow import check_target
from ppow.target_ppow import check_pair

from . import plan
from .config import BLOCK_SHAPE, ReinforceConfig, StageConfig, SupervisedConfig
from .data import BadRows, Example, draft_vocabulary, encode, load_rows, rarest_token
from .files import claim_folder
from .loading import check_model, load_tokenizer, named, place_of, positions
from .loop import on_main
from .target import FrozenTarget


def run(
    config: SupervisedConfig | ReinforceConfig, train: Callable[[Any, Accelerator, PreTrainedTokenizerBase], None]
) -> None:
    """What either stage does first; then ``train``, given this run's processes and the target's tokenizer.

    The output folder is this run's alone meanwhile. With ``--plan`` only the plan is shown.

    Raises:
        ValueError: a name that is no model or repository, a folder that is no folder or another run's.
    """
    if config.plan is not None:
        plan.show(config, *configs(config))
        return
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
            tokenizer = load_tokenizer(config.target)
        train(config, accelerator, tokenizer)


def load_target(config: StageConfig, accelerator: Accelerator) -> FrozenTarget:
    """The target of either stage, whole on every process or spread over them."""
    with named("target", config.target):
        if config.shard_target:
            target = FrozenTarget.load_sharded(config.target, config.dtype, accelerator)
        else:
            target = FrozenTarget.load(config.target, config.dtype, accelerator.device)
        # what decoding would refuse is not worth training for
        check_target(target.model, end=config.max_length, ahead=getattr(config, "max_forest_nodes", 0))
        return target


class Examples(list[Example]):
    """Encoded texts to learn from. ``dropped`` counts the rows and texts that were left out, by the reason."""

    def __init__(self, examples: list[Example], dropped: dict[str, int]):
        super().__init__(examples)
        self.dropped = {reason: count for reason, count in dropped.items() if count}


def load_examples(
    config: StageConfig, source: str, tokenizer: PreTrainedTokenizerBase, steps: int, answer: int = 1
) -> Examples:
    """Encoded texts long enough for ``steps`` draft steps, with ``answer`` tokens in a row that a drafter can predict.

    x_0 and x_1 have no drafter pair before them, so a text needs ``steps`` + 2 tokens.
    """
    bad = BadRows(config.skip_bad_rows)
    rows = load_rows(source, config.split, config.limit, bad)
    with named("target", config.target):
        room = positions(AutoConfig.from_pretrained(**place_of(config.target)))
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


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Something to pad with; masked everywhere, so any token does."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def configs(config: SupervisedConfig | ReinforceConfig) -> tuple[PreTrainedConfig, PPOWConfig]:
    """Of the target and of the drafter that a stage would train, without their weights."""
    with named("target", config.target):
        target = AutoConfig.from_pretrained(**place_of(config.target))
    if config.drafter is None:
        return target, fresh_config(config, target)
    with named("drafter", config.drafter):
        return target, PPOWConfig.from_pretrained(config.drafter)


def prepare_drafter(
    config: SupervisedConfig | ReinforceConfig, target: PreTrainedModel, examples: list[Example]
) -> PPOWDrafter:
    """The drafter to train, in float32: a given one, or a fresh one in the shape of the target."""
    if config.drafter is not None:
        with named("drafter", config.drafter):
            drafter = PPOWDrafter.from_pretrained(config.drafter, dtype=torch.float32)
        check_pair(target, drafter)
        if drafter.config.confidence_head and not drafter.config.is_block:  # stage 2 alone knows what it is to say
            drafter.confidence_head.requires_grad_(False)
        return freeze_embedding(drafter)
    shape = fresh_config(config, target.config)
    if shape.is_block and config.mask_token_id is None:
        shape.mask_token_id = rarest_token(examples, shape.vocab_size)
    drafter = (PPOWBlockDrafter if shape.is_block else PPOWDrafter)(shape)
    if drafter.pruned:
        drafter.set_draft_vocabulary(
            *draft_vocabulary(examples, drafter.config.draft_vocab_size, drafter.config.vocab_size)
        )
    if not shape.is_block and shape.hidden_size == shape.target_hidden_size:
        with torch.no_grad():
            if drafter.get_input_embeddings() is not None:
                drafter.embed_tokens.weight.copy_(_values(target.get_input_embeddings().weight))
            if not shape.share_target_head:
                drafter.lm_head.weight.copy_(_values(target.get_output_embeddings().weight)[drafter.draft_columns()])
    return freeze_embedding(drafter)


def _values(weight: torch.Tensor) -> torch.Tensor:
    """(V, H) of a target's embeddings or head as numbers, of torchao's kinds too."""
    if is_traceable_wrapper_subclass(weight):
        return weight.dequantize()
    if not weight.is_floating_point():
        raise ValueError(
            f"The target's embeddings or head are quantized to {weight.dtype}, and a drafter begins with their values. "
            'Leave them out (bitsandbytes: llm_int8_skip_modules=["lm_head"]).'
        )
    return weight


def fresh_config(config: SupervisedConfig, target_config: PreTrainedConfig) -> PPOWConfig:
    """Of a drafter in the shape of the target, but for what the options say."""
    block = config.architecture == "block"
    chosen = {
        "architecture": config.architecture,
        "draft_vocab_size": config.draft_vocab_size,
        "num_hidden_layers": config.num_layers or (3 if block else None),
        "target_taps": config.taps,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        **{name: True for name in ("norm_before_fc", "norm_output", "qk_norm") if getattr(config, name)},
        "share_target_embeddings": config.share_embeddings or config.share_head or None,
        "share_target_head": config.share_head or None,
    }
    if block:
        chosen |= {name: getattr(config, name) for name in BLOCK_SHAPE}
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
