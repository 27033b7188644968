"""The target's side of a running generation: prefill, verification of a window, and keeping what was accepted."""

import itertools
import os
import threading
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from .attention_ppow import pack_window
from .cache_ppow import CACHE_NAME, SlotCache, as_slot_cache
from .drafting_ppow import DraftWindow
from .masks_ppow import additive_mask, window_allowed
from .prompt_ppow import device_of

LayerMasks = torch.Tensor | dict[str, torch.Tensor]  # one mask, or one per layer type
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def decoder_layers(target: PreTrainedModel) -> torch.nn.ModuleList:
    """The blocks of the target's text decoder, in order.

    Raises:
        ValueError: where no list of modules has as many entries as the configuration names layers.
    """
    count = getattr(target.config.get_text_config(decoder=True), "num_hidden_layers", None)
    modules = itertools.chain(target.get_decoder().modules(), target.modules())  # some name their head "decoder"
    lists = (module for module in modules if isinstance(module, torch.nn.ModuleList))
    layers = next((layers for layers in lists if len(layers) == count), None)
    if layers is None:
        raise ValueError(
            f"{type(target).__name__} shows no list of {count} decoder layers, whose inputs a drafter reads."
        )
    return layers


def read_taps(target: PreTrainedModel, taps: list[int], **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the target: -> its logits, and the hidden states ``taps`` side by side (B, N, n_taps * Ht).

    The states are caught where they enter their blocks. ``output_hidden_states`` would watch every module of the
    target, this call's and all later ones', and names a list's entries differently from version to version.

    Args:
        taps: the states entering those blocks; the layer count is what leaves the last one, before the final norm
            (``output_hidden_states=True`` would show that one normed).
        inputs: of the target's forward.
    """
    layers, thread, states = decoder_layers(target), threading.get_ident(), {}

    def catch(tap: int) -> RemovableHandle:
        # torch forgets the keywords while another thread removes its hooks
        def hook(layer: torch.nn.Module, args: tuple, kwargs: Any = None) -> None:
            if threading.get_ident() == thread:  # others may be running the same target
                states[tap] = args[0] if args else kwargs["hidden_states"]

        def hook_behind(layer: torch.nn.Module, args: tuple, out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            hook(layer, (out if isinstance(out, torch.Tensor) else out[0],))

        if tap == len(layers):
            return layers[-1].register_forward_hook(hook_behind)
        return layers[tap].register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [catch(tap) for tap in taps]
    try:
        logits = target(return_dict=True, **inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    device = states[taps[0]].device
    return logits, torch.cat([states[tap].to(device) for tap in taps], dim=-1)


def has_hooks(target: PreTrainedModel) -> bool:
    """Whether somebody's hooks are to be called as the target's modules run; transformers' and ours take no part."""
    found = [hooks for m in target.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) if hooks]
    makers = {getattr(hook, "__module__", None) or "" for hooks in found for hook in list(hooks.values())}
    return any(name != __name__ and not name.startswith("transformers.") for name in makers)


def is_split(target: PreTrainedModel) -> bool:
    """Whether each of several processes holds a part of every weight (tensor parallelism), and all run one text."""
    mesh = getattr(target, "_device_mesh", None)
    return mesh is not None and mesh.size() > 1


def check_kind(target: PreTrainedModel) -> None:
    """Raise a ValueError unless the target, by its configuration, is a decoder whose cache can be rolled back."""
    config, name = target.config.get_text_config(decoder=True), type(target).__name__
    if getattr(target.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; PPOW drafts for decoder-only targets.")
    missing = [k for k in ("vocab_size", "hidden_size", "num_hidden_layers") if not hasattr(config, k)]
    if missing:
        raise ValueError(f"The configuration of {name} lacks {', '.join(missing)}: it is no decoder-only target.")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if not odd:
        try:
            layers = DynamicCache(config=config).layers
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{name} has no cache that PPOW knows: {error}") from error
        odd = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, DynamicLayer)})
    if odd or getattr(target, "_is_stateful", False) or not target._supports_default_dynamic_cache():
        raise ValueError(
            f"The cache of {name} cannot be rolled back after a rejected window "
            f"(layers: {', '.join(map(str, odd)) or 'stateful'}). PPOW needs full or sliding-window attention."
        )


def misfits(target: PreTrainedConfig, drafter: PreTrainedConfig) -> list[str]:
    """What a drafter's configuration says of its target and this one's does not; empty where the two fit together."""
    config = target.get_text_config(decoder=True)
    return [
        f"{name} {ours} in the drafter, {theirs} in the target"
        for name, ours, theirs in (
            ("hidden size", drafter.target_hidden_size, config.hidden_size),
            ("vocabulary", drafter.vocab_size, config.vocab_size),
            ("layer count", drafter.target_num_layers, config.num_hidden_layers),
            ("model type", drafter.target_model_type or config.model_type, config.model_type),
        )
        if ours != theirs
    ]


def names_another(target: PreTrainedConfig, drafter: PreTrainedConfig) -> bool:
    """Whether a drafter records the Hub id of another target than this one's."""
    recorded, given = drafter.target_name_or_path, target._name_or_path
    both_hub_ids = recorded and given and "/" in given and not os.path.isdir(given)
    return bool(both_hub_ids) and recorded.lower() != given.lower()


def check_pair(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    """Raise a ValueError unless ``drafter`` was made for a target like this one and its cache can be rolled back.

    This reads configurations and the draft vocabulary; :mod:`probe_ppow` asks the loaded target itself.
    """
    check_kind(target)
    wrong = misfits(target.config, drafter.config)
    if wrong:
        made_for = drafter.config.target_name_or_path or drafter.config.target_model_type or "another target"
        raise ValueError(
            f"This drafter was made for {made_for}, not for {target.config._name_or_path or type(target).__name__}: "
            f"{'; '.join(wrong)}. Load the drafter that belongs to this target, or train one with `ppow supervised`."
        )
    if names_another(target.config, drafter.config):  # same shapes, but another model's features
        raise ValueError(
            f"This drafter was made for {drafter.config.target_name_or_path}, the target is "
            f"{target.config._name_or_path}. If the two are interchangeable, say so with "
            "drafter.config.target_name_or_path = target.config._name_or_path."
        )
    drafter.check_draft_vocabulary()


class WindowMasks:
    """Builds a target's attention masks for windows, in the form its layers take them.

    Args:
        target: the target model; some of its layers may see a sliding window only.
    """

    def __init__(self, target: PreTrainedModel):
        config = target.config.get_text_config(decoder=True)
        self.dtype = target.dtype
        self.sliding_window: int | None = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if types is None:
            types = ["full_attention" if self.sliding_window is None else "sliding_attention"]
        self.layer_types = set(types)

    def __call__(
        self,
        prefix: torch.Tensor,
        ancestors: torch.Tensor,
        depth: torch.Tensor,
        slots: torch.Tensor,
        view: int,
        valid: torch.Tensor | None = None,
        slot_depth: torch.Tensor | None = None,
    ) -> LayerMasks:
        """Arguments of :func:`window_allowed` -> additive (B, 1, N, view), one per layer type where they differ."""
        masks = {}
        for kind in self.layer_types:
            sliding = self.sliding_window if kind == "sliding_attention" else None
            allowed = window_allowed(prefix, ancestors, depth, slots, view, valid, sliding, slot_depth)
            masks[kind] = additive_mask(allowed, self.dtype)
        return masks if len(masks) > 1 else masks.popitem()[1]

    def packed(
        self, prefix: torch.Tensor, ancestors: torch.Tensor, depth: torch.Tensor, first: torch.Tensor
    ) -> LayerMasks:
        """The same for :mod:`attention_ppow`: prefix (B,), ancestors (B, N, N), depth (B, N), first (B,) real slot."""
        masks = {}
        for kind in self.layer_types:
            oldest, seen = first[:, None].expand_as(depth), ancestors
            if kind == "sliding_attention":
                assert self.sliding_window is not None
                oldest = torch.maximum(oldest, prefix[:, None] + depth - self.sliding_window + 1)
                seen = ancestors & (depth[:, :, None] - depth[:, None, :] < self.sliding_window)
            masks[kind] = pack_window(prefix, seen, oldest)
        return masks if len(masks) > 1 else masks.popitem()[1]


class TargetState:
    """The target with a :class:`SlotCache`.

    Args:
        target: the target model.
        taps: indices of the hidden states to tap.
        past: None or a user's cache.
        batch: rows B.
        capacity: slots to allocate at first.
        valid: (B, S) bool, False at padding; None when there is none.

    Attributes:
        lengths: (B,) int64, slots taken; the root token comes next.
        next_position: (B,) int64, the position of the root token.
        last_position: (B,) int64, of the last token that can belong to the text. Nodes that are drafted after it are
            read as if they stood there: a model may have no position beyond.
    """

    next_position: torch.Tensor
    last_position: torch.Tensor

    def __init__(
        self,
        target: PreTrainedModel,
        taps: list[int],
        past: Cache | None,
        batch: int,
        capacity: int,
        valid: torch.Tensor | None,
    ):
        config = target.config.get_text_config(decoder=True)
        self.target, self.taps = target, taps
        self.cache: SlotCache = as_slot_cache(past, config.num_hidden_layers, capacity)
        self.valid = valid
        self.window_masks = WindowMasks(target)
        self.uses_flash = "flash" in (target.config._attn_implementation or "")
        self.lengths = torch.full((batch,), self.cache.get_seq_length(), dtype=torch.long, device=device_of(target))

    def prefill(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        chunk: int | None,
        room: int = 1 << 30,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the prompt (B, P): -> logits (B, V) after its last token, taps (B, P, n_taps * Ht).

        Args:
            chunk: tokens per forward; None: all in one.
            room: tokens that may follow the prompt.
        """
        start, length = self.cache.get_seq_length(), input_ids.shape[1]
        taps = []
        for first in range(0, length, chunk or length):
            part = slice(first, min(first + (chunk or length), length))
            mask = None if attention_mask is None else attention_mask[:, : start + part.stop]
            logits, tap = self._forward(input_ids[:, part], mask, position_ids[:, part], last_only=True)
            taps.append(tap)
        self.lengths = self.lengths + length
        self.next_position = position_ids[:, -1] + 1
        self.last_position = position_ids[:, -1] + max(room - 1, 0)  # the newest token is not read
        return logits[:, -1], torch.cat(taps, 1)

    def verify(self, window: DraftWindow) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward over a window of N nodes: -> logits (B, N, V), taps (B, N, n_taps * Ht)."""
        return self._verify(window.tokens, window.depth, window.ancestors)

    def _verify(
        self, tokens: torch.Tensor, depth: torch.Tensor, ancestors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = tokens.shape[1]
        slots = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        view = self._view(count)
        self.cache.open_window(slots, view)
        positions = torch.minimum(self.next_position[:, None] + depth, self.last_position[:, None])
        result = self._forward(tokens, self._mask(depth, ancestors, slots, view), positions, last_only=False)
        self.cache.close_window()
        return result

    def _view(self, count: int) -> int:
        """Slots that attention reads when ``count`` nodes follow the committed ones."""
        return int(self.lengths.max()) + count

    def _mask(self, depth: torch.Tensor, ancestors: torch.Tensor, slots: torch.Tensor, view: int) -> LayerMasks | None:
        if self.uses_flash:  # one causal row without padding: flash attention aligns it by itself
            return None
        prefix = self.lengths[:, None].expand_as(slots)
        return self.window_masks(prefix, ancestors, depth, slots, view, self.valid)

    def _forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: LayerMasks | None,
        position_ids: torch.Tensor,
        last_only: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keep = {"logits_to_keep": 1} if last_only and self.target._supports_logits_to_keep() else {}
        return read_taps(
            self.target,
            self.taps,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{CACHE_NAME: self.cache},
            **keep,
        )

    def keep(self, path: torch.Tensor, counts: torch.Tensor, in_order: bool) -> None:
        """Commit the first ``counts`` (B,) nodes of ``path`` (B, M); ``in_order``: they lie side by side (a chain)."""
        if not in_order:
            self.cache.keep(self.lengths, path)
        self.lengths = self.lengths + counts
        self.next_position = self.next_position + counts
