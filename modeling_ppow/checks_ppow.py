"""What a call of ``generate`` may ask of the decoding loop: lists of what is allowed; the rest is refused by name."""

import warnings
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from .cache_ppow import CACHE_NAME
from .drafting_ppow import DraftOptions, asked_size
from .prompt_ppow import device_of
from .target_ppow import is_split

# Arguments of the target's forward that ``generate`` hands on and the loop honours (the others set nothing here).
FORWARD_ARGUMENTS = {"attention_mask", "position_ids", CACHE_NAME, "use_cache", "logits_to_keep"}
FORWARD_ARGUMENTS |= {"inputs_tensor", "tokenizer", "cache_position", "return_dict", "output_attentions"}
FORWARD_ARGUMENTS |= {"output_hidden_states"}
# Zero says "text" in these, where a model tells texts from images.
MODALITIES = {"token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"}
MASKED_ATTENTION = {"eager", "sdpa"}  # takes the masks of windows as they are
# Fields of a generation config that steer other ways of drafting. ``num_assistant_tokens`` is ours too (DraftOptions).
OTHER_DRAFTING = {
    "num_assistant_tokens_schedule": "window_schedule is set, or windows are trees",
    "assistant_confidence_threshold": "draft_threshold ends windows early, by their joint draft probability",
    "assistant_lookbehind": "a drafter shares its target's tokenizer",
    "target_lookbehind": "a drafter shares its target's tokenizer",
    "assistant_early_exit": "the drafter drafts",
    "prompt_lookup_num_tokens": "the drafter drafts",
    "max_matching_ngram_size": "the drafter drafts",
    "use_mtp": "the drafter drafts",
    "speculation_type": "the drafter drafts",
}


def check_call(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    config: GenerationConfig,
    options: DraftOptions,
    processors: LogitsProcessorList,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
    batch: int,
) -> None:
    """Raise a ValueError for what the loop cannot honour, before anything is computed; warn of what it leaves out."""
    if synced_gpus:
        raise ValueError("PPOW decoding does not run under FSDP or ZeRO-3 (synced_gpus=True); gather the target first.")
    if not model_kwargs.get("use_cache", True):
        raise ValueError("PPOW decoding needs use_cache=True: a window is verified against cached keys.")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(f"{name}=True is not available while drafting; run the target on `sequences` afterwards.")
    if config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} cannot hold windows; leave it unset with a drafter."
        )
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        raise ValueError("assistant_ensemble_weight mixes the drafter into the output; PPOW keeps the target's own.")
    if any(type(p).__name__ == "UnbatchedClassifierFreeGuidanceLogitsProcessor" for p in processors):
        raise ValueError("guidance_scale runs the target on its own and cannot be combined with a drafter.")
    given = {"mm_encoder_outputs": "mm_encoder_outputs (images, video or sound)"}  # what transformers makes of them
    unknown = [given.get(name, name) for name, value in model_kwargs.items() if not _harmless(target, name, value)]
    if unknown:
        raise ValueError(
            f"A drafter reads token ids and their mask only, and cannot honour {', '.join(sorted(unknown))}: leave "
            "them out, or generate without a drafter."
        )
    if options.window_schedule == "cost" and is_split(target):
        raise ValueError(
            'window_schedule="cost" follows measured time, by which the processes that share this target would draft '
            'different windows. Leave it unset, or use "gammatune" or "constant".'
        )
    longest = drafter.config.longest_window
    if longest is not None and options.longest > longest:
        raise ValueError(
            f"Windows of {options.longest} tokens were asked for, and this block drafter drafts {longest} at once: set "
            f"{'tree_depth' if options.is_tree else 'window_size'}={longest} or less."
        )
    check_attention(target, options, model_kwargs.get("attention_mask"), batch)
    check_places(target, drafter)
    warn_of_other_drafting(config, drafter.generation_config, options)


def _harmless(target: PreTrainedModel, name: str, value: Any) -> bool:
    """Whether an argument of the forward is one that the loop honours, or says nothing."""
    if name in FORWARD_ARGUMENTS or value is None:
        return True
    if isinstance(value, (dict, list, tuple)):
        held = value.values() if isinstance(value, dict) else value
        if all(each is None for each in held):
            return True
    many = target.config.get_text_config(decoder=True) is not target.config
    return many and name in MODALITIES and not bool(torch.as_tensor(value).any())


def check_attention(target: PreTrainedModel, options: DraftOptions, mask: torch.Tensor | None, batch: int) -> None:
    """Raise a ValueError where the target's attention cannot take the masks of a call's windows."""
    attention = target.config.get_text_config(decoder=True)._attn_implementation or "eager"
    flash = "flash" in attention and "|" not in attention  # a prefix names another way to lay out keys
    if attention not in MASKED_ATTENTION and not flash:
        raise ValueError(
            f"attn_implementation={attention!r} is not known to take the masks of windows. Load the target with "
            'attn_implementation="sdpa" (or "eager", or for chains at batch size 1 a flash attention).'
        )
    padded = mask is not None and not bool(torch.as_tensor(mask).all())
    if flash and (options.is_tree or batch > 1 or padded):
        raise ValueError(
            f"attn_implementation={attention!r} takes no window masks: it serves chains at batch size 1 without "
            'padding. Load the target with attn_implementation="sdpa" for trees, batches and padded prompts.'
        )


def check_places(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    """Raise a ValueError unless drafter and target meet on one device (the target's layers may be spread)."""
    here, there = device_of(target), drafter.fc.weight.device
    for name, place in (("target", here), ("drafter", there)):
        if place.type == "meta":
            raise ValueError(f"The {name}'s weights are not loaded (device meta). Load it before generating.")
    if here != there:
        raise ValueError(f"The drafter is on {there}, the target takes its inputs on {here}: move the drafter there.")


def warn_of_other_drafting(config: GenerationConfig, own: GenerationConfig, options: DraftOptions) -> None:
    """Name what is set (beyond transformers' own defaults) and has no effect with a PPOW drafter."""
    usual = config._get_default_generation_params()
    for name, instead in OTHER_DRAFTING.items():
        for value in (getattr(config, name, None), getattr(own, name, None)):
            if (
                name == "num_assistant_tokens_schedule"
                and options.window_schedule == "heuristic"
                and not options.is_tree
            ):
                continue
            if value is not None and value is not False and value != usual.get(name):
                warnings.warn(f"{name}={value!r} has no effect with a PPOW drafter: {instead}.", stacklevel=2)
    for value in (asked_size(config), own.num_assistant_tokens):
        if value is not None and (options.is_tree or value != options.window_size):
            using = f"tree_nodes={options.tree_nodes}" if options.is_tree else f"window_size={options.window_size}"
            warnings.warn(f"num_assistant_tokens={value!r} has no effect: {using} was set as well.", stacklevel=2)
