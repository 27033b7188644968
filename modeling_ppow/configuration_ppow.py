"""Configuration of a PPOW drafter: an EAGLE-3 style feature drafter or a block drafter, and the target it was made for.

The drafter reads hidden states of its target ("taps") and drafts windows of tokens that the target verifies.
Taps are stored as Hugging Face hidden-state indices: index ``i`` is the residual stream that enters block ``i`` of the
target, as in ``output_hidden_states``; index L is what the last block puts out, before the final norm (where
``output_hidden_states`` has it normed). (The peers' explicit tap fields do not agree with each other on this point.)
"""

import difflib
import os
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

# Keys that transformers itself may hand to a configuration besides the declared fields.
_LIBRARY_KEYS = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_from_auto",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "tie_last_hidden_states",
    "torch_dtype",
    "use_return_dict",
}


def default_taps(num_layers: int) -> list[int]:
    """The three taps of EAGLE-3: an early, a middle and a late layer of the target.

    Args:
        num_layers: blocks of the target, L.

    Returns:
        ``[2, L // 2, L - 3]``, the choice of EAGLE-3 and of every peer, for L >= 7. Shallower (toy) targets get
        ``[1, L // 2, L - 1]``, which is ours.

    Raises:
        ValueError: for a target of fewer than 4 layers, where three distinct taps do not exist.
    """
    taps = [2, num_layers // 2, num_layers - 3] if num_layers >= 7 else [1, num_layers // 2, num_layers - 1]
    if sorted(set(taps)) != taps:
        raise ValueError(
            f"A target of {num_layers} layers has no three distinct default taps (got {taps}); "
            "pass target_taps=[...], hidden-state indices in increasing order."
        )
    return taps


def block_taps(num_layers: int) -> list[int]:
    """The taps of a block drafter: five, spread evenly over the outputs of the layers 1 to L - 3, as in DFlash.

    Index i here is what enters block i, so it is one more than the layer that DFlash names. Targets of fewer than 8
    layers, which have no five such layers, get :func:`default_taps` (ours).
    """
    if num_layers < 8:
        return default_taps(num_layers)
    return [1 + round(1 + i * (num_layers - 4) / 4) for i in range(5)]


class PPOWConfig(PreTrainedConfig):
    """Configuration of :class:`PPOWDrafter`, and with ``architecture="block"`` of :class:`PPOWBlockDrafter`.

    A block drafter always shares its target's embedding and head (with a draft vocabulary, its rows of that head), and
    norms queries and keys; the EAGLE-3.1 variants of the norms are not for it.

    Args:
        architecture: eagle3 (K steps for a window) or block (one forward for a window).
        block_size: rows of a block, the anchor's among them (block drafters).
        predict_from_anchor: whether the anchor's row predicts, so that a block of B rows drafts B tokens (DSpark);
            without it row j predicts the token at its own place and the anchor's nothing: B - 1 tokens (DFlash).
        mask_token_id: the row of the target's embedding that stands for tokens not yet known (block drafters); default
            the last one.
        markov_rank: rank of the head that conditions a slot on the token before it; 0: none (block drafters).
        vocab_size: V, the target's vocabulary (what ``generate`` compares).
        draft_vocab_size: D <= V, the tokens the drafter can draft. Tensors ``d2t``/``t2d`` exist when D < V.
        hidden_size: H, width of the drafter.
        intermediate_size: width of its MLPs.
        num_hidden_layers: decoder layers; the first reads embedding and hidden state side by side (2H wide).
        num_attention_heads, num_key_value_heads, head_dim: attention geometry.
        hidden_act: activation of the MLPs.
        rms_norm_eps: epsilon of all norms.
        max_position_embeddings: longest position, at least the target's.
        rope_parameters: as in transformers (``rope_type``, ``rope_theta``, ...).
        initializer_range: standard deviation of fresh weights.
        attention_bias: biases on q, k, v (no published EAGLE-3 drafter has them).
        qk_norm: RMS norm on the heads of q and k ("Qwen3 style"); False is "Llama style".
        target_hidden_size: Ht, width of the target's residual stream.
        target_num_layers: L, blocks of the target.
        target_taps: hidden-state indices in increasing order, each in ``0 .. L``. At least one; default EAGLE-3's.
        target_model_type: ``config.model_type`` of the target, for messages.
        target_name_or_path: Hub id of the target it was trained for, or None when it has none.
        share_target_embeddings: keep no embedding of its own and read the target's (needs H == Ht).
        share_target_head: keep no head of its own and read the target's, with a draft vocabulary its rows of that
            (needs H == Ht, and share_target_embeddings).
        norm_before_fc: RMS norm over the concatenated taps before ``fc``.
        fc_norm: RMS norm on each tap before ``fc``.
        norm_before_residual: the first layer's residual is the normed hidden state instead of the raw one.
        norm_output: what is fed back to the next draft step is normed (default: pre-norm).
        confidence_head: a small head tells how likely each draft is accepted (``PPOWDrafter.acceptance_logits``), by
            which windows end under ``window_schedule`` "cost" and ``draft_threshold``, in the place of the draft's
            probability.
    """

    model_type = "ppow"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    architecture: str = "eagle3"
    block_size: int = 10
    predict_from_anchor: bool = True
    mask_token_id: int | None = None
    markov_rank: int = 0
    vocab_size: int = 32000
    draft_vocab_size: int | None = None
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131072
    rope_parameters: dict | None = None
    initializer_range: float = 0.02
    attention_bias: bool = False
    qk_norm: bool = False
    target_hidden_size: int | None = None
    target_num_layers: int = 32
    target_taps: list | None = None
    target_model_type: str | None = None
    target_name_or_path: str | None = None
    share_target_embeddings: bool = False
    share_target_head: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    confidence_head: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._reject_unknown_keys(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.is_block:
            self.share_target_embeddings = self.share_target_head = self.qk_norm = True
            if self.mask_token_id is None:
                self.mask_token_id = self.vocab_size - 1
        if self.target_taps is None:
            self.target_taps = (block_taps if self.is_block else default_taps)(self.target_num_layers)
        self.target_taps = [int(tap) for tap in self.target_taps]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": kwargs.pop("rope_theta", 10000.0)}
        super().__post_init__(**kwargs)
        self._check()

    @property
    def is_block(self) -> bool:
        """Whether this is a block drafter's."""
        return self.architecture == "block"

    @property
    def longest_window(self) -> int | None:
        """Tokens that a drafter can draft at once; None: as many as it is asked for."""
        return self.block_size - (not self.predict_from_anchor) if self.is_block else None

    def _reject_unknown_keys(self, kwargs: dict[str, Any]) -> None:
        # Old configurations carry generation parameters; transformers drops those itself.
        known = set(self.__dataclass_fields__) | _LIBRARY_KEYS | set(GenerationConfig().to_dict())
        for key in kwargs:
            if key not in known:
                nearest = difflib.get_close_matches(key, set(self.__dataclass_fields__), n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"Unknown configuration key {key!r} for a PPOW drafter; the nearest known key is {nearest!r}. "
                    "Correct or remove it."
                )

    def _check(self) -> None:
        assert self.draft_vocab_size is not None and self.target_taps is not None
        assert self.num_key_value_heads is not None and self.head_dim is not None
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} must lie in 1..vocab_size={self.vocab_size}: the drafter "
                "drafts a subset of the target's vocabulary."
            )
        if self.architecture not in ("eagle3", "block"):
            raise ValueError(f"architecture={self.architecture!r}: expected 'eagle3' or 'block'.")
        if self.is_block:
            self._check_block()
        taps = self.target_taps
        if not taps or sorted(set(taps)) != taps or taps[0] < 0 or taps[-1] > self.target_num_layers:
            raise ValueError(
                f"target_taps={taps} must be strictly increasing hidden-state indices in "
                f"0..{self.target_num_layers} (index i is the residual stream entering block i of the target, the last "
                "one what leaves its last block)."
            )
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers}: a drafter has at least one decoder layer.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings.")
        if self.share_target_embeddings and self.hidden_size != self.target_hidden_size:
            raise ValueError(
                f"share_target_embeddings needs equal widths, got hidden_size={self.hidden_size} and "
                f"target_hidden_size={self.target_hidden_size}; use share_target_embeddings=False."
            )
        if self.share_target_head and not self.share_target_embeddings:
            raise ValueError(
                "share_target_head=True goes with share_target_embeddings=True: a drafter that reads its target's head "
                "reads its embeddings, too."
            )
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True is not supported: lm_head speaks the draft vocabulary.")

    def _check_block(self) -> None:
        assert self.longest_window is not None and self.mask_token_id is not None
        if self.longest_window < 1 or self.markov_rank < 0:
            raise ValueError(
                f"block_size={self.block_size} leaves {self.longest_window} tokens to draft and markov_rank="
                f"{self.markov_rank}: expected at least 1 token and a rank of 0 or more."
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id={self.mask_token_id} is no row of an embedding of {self.vocab_size}.")
        others = ("norm_before_fc", "fc_norm", "norm_before_residual", "norm_output")
        wrong = [name for name in others if getattr(self, name)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not for a block drafter, whose layers are DFlash's.")

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **overrides: Any) -> "PPOWConfig":
        """A drafter configuration in the shape of its target: same widths, heads, RoPE and norm epsilon.

        Args:
            target_config: configuration of the target (the text part is used for multimodal ones).
            **overrides: any field of :class:`PPOWConfig`.

        Returns:
            The configuration of a fresh one-layer drafter with EAGLE-3's default taps.

        Raises:
            ValueError: when the target's configuration does not say what the drafter needs to know; it names the
                fields to pass.
        """
        text = target_config.get_text_config(decoder=True)
        read = {
            "vocab_size": lambda: _number(text, "vocab_size"),
            "hidden_size": lambda: _number(text, "hidden_size"),
            "intermediate_size": lambda: (
                _number(text, "intermediate_size", None)
                or _number(text, "ffn_hidden_size", None)
                or 4 * _number(text, "hidden_size")
            ),
            "num_attention_heads": lambda: _number(text, "num_attention_heads"),
            "num_key_value_heads": lambda: (
                _number(text, "num_key_value_heads", None)
                or overrides.get("num_attention_heads")
                or _number(text, "num_attention_heads")
            ),
            "head_dim": lambda: (
                _number(text, "head_dim", None) or _number(text, "hidden_size") // _number(text, "num_attention_heads")
            ),
            "rms_norm_eps": lambda: _number(text, "rms_norm_eps", None) or _number(text, "layer_norm_eps", 1e-6),
            "max_position_embeddings": lambda: _number(text, "max_position_embeddings"),
            "rope_parameters": lambda: _rope(text),
            "qk_norm": lambda: text.model_type.startswith("qwen3"),
            # pipelines take models whose special tokens differ for models of different tokenizers
            "pad_token_id": lambda: getattr(text, "pad_token_id", None),
            "bos_token_id": lambda: getattr(text, "bos_token_id", None),
            "eos_token_id": lambda: getattr(text, "eos_token_id", None),
            "target_hidden_size": lambda: _number(text, "hidden_size"),
            "target_num_layers": lambda: _number(text, "num_hidden_layers"),
            "target_model_type": lambda: text.model_type,
            "target_name_or_path": lambda: _hub_id(target_config),
        }
        fields, unknown = dict(overrides), {}
        for name in read.keys() - overrides.keys():
            try:
                fields[name] = read[name]()
            except (AttributeError, ValueError) as error:
                unknown[name] = str(error)
        if unknown:
            raise ValueError(
                f"The configuration {type(text).__name__} does not say everything about a drafter for it. Pass "
                f"{', '.join(f'{name}=...' for name in sorted(unknown))} to PPOWConfig.from_target: "
                f"{'; '.join(sorted(set(unknown.values())))}."
            )
        return cls(**fields)


_REQUIRED = object()


def _number(config: PreTrainedConfig, name: str, default: Any = _REQUIRED) -> Any:
    """A field that holds one number for the whole model.

    Raises:
        ValueError: where it is missing and has no default, or differs between the layers.
    """
    try:
        value = getattr(config, name, None)
    except (AttributeError, ValueError) as error:  # configurations with settings per layer refuse to name one
        raise ValueError(f"{name} differs between the layers") from error
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ValueError(f"{name} is {list(value)}, one number is needed")
        value = value[0]
    if value is None and default is _REQUIRED:
        raise ValueError(f"{name} is missing")
    return default if value is None else value


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The target's RoPE, as far as a drafter's keys can follow it.

    The full-attention one where each layer type has its own, the plain one where it depends on the length of the text.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" not in rope:
        rope = rope.get("full_attention") or {"rope_type": "default", "rope_theta": 10000.0}
    if rope["rope_type"] == "longrope" or "dynamic" in rope["rope_type"]:
        rope = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
    return {k: v for k, v in rope.items() if k != "partial_rotary_factor"}


def _hub_id(config: PreTrainedConfig) -> str | None:
    name = getattr(config, "_name_or_path", None)
    return name if name and not os.path.isdir(name) else None  # a local path is no id
