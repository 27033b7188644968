"""The pairs of target and drafter that benchmarks work on: real ones, and random ones of a known pair's shape."""

import argparse
import contextlib

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from ppow import PPOWBlockDrafter, PPOWConfig, PPOWDrafter
from ppow.target_ppow import check_pair
from ppow.training.loading import load_tokenizer
from ppow.training.preparation import freeze_embedding
from ppow.training.smollm2 import demo_pair
from ppow.training.target import FrozenTarget

from .controls import ControlConfig

_LLAMA = {"rope_theta": 500000.0, "max_position_embeddings": 131072, "vocab_size": 128256, "num_key_value_heads": 8}
_QWEN = {"rope_theta": 1e6, "max_position_embeddings": 40960, "vocab_size": 151936, "num_key_value_heads": 8}

_SMOLLM = {"rope_theta": 1e5, "max_position_embeddings": 8192, "vocab_size": 49152, "num_key_value_heads": 3}
_SMOLLM |= {"head_dim": 64, "tie_word_embeddings": True}


def _shape(hidden: int, inner: int, layers: int, heads: int, **more) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": 128,
        **more,
    }


# name -> (configuration class, its fields, draft vocabulary)
SHAPES = {
    "llama-3.1-8b": (LlamaConfig, _shape(4096, 14336, 32, 32, **_LLAMA), 32000),
    "llama-3.3-70b": (LlamaConfig, _shape(8192, 28672, 80, 64, **_LLAMA), 32000),
    "qwen3-8b": (Qwen3Config, _shape(4096, 12288, 36, 32, **_QWEN), 32000),
    "qwen3-32b": (Qwen3Config, _shape(5120, 25600, 64, 64, **_QWEN), 32000),
    "smollm2-135m": (LlamaConfig, _shape(576, 1536, 30, 9, **_SMOLLM), 16384),
    "tiny": (LlamaConfig, {**_shape(64, 128, 4, 4, **_LLAMA), "head_dim": 16, "num_key_value_heads": 2}, 500),
}
SMALL = _shape(2048, 8192, 16, 32, **_LLAMA) | {"head_dim": 64}  # Llama-3.2-1B, for transformers' assisted decoding


def add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="folder or Hub id; none: the demo's")
    parser.add_argument("--drafter", help="folder; none: the bundled one")


def parse_with_pair(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options, with the demo's pair where :func:`add_pair`'s are not given."""
    arguments = parser.parse_args(argv)
    if arguments.target is None or arguments.drafter is None:
        pair = demo_pair()
        arguments.target, arguments.drafter = arguments.target or pair[0], arguments.drafter or pair[1]
    return arguments


def load(arguments, device: str) -> tuple:
    """Tokenizer, frozen target and drafter as training takes them."""
    target = FrozenTarget.load(arguments.target, arguments.dtype, device)
    drafter = PPOWDrafter.from_pretrained(arguments.drafter, dtype=torch.float32).to(device)
    freeze_embedding(drafter)
    check_pair(target.model, drafter)
    target.taps = drafter.config.target_taps
    return load_tokenizer(arguments.target), target, drafter


def stage2(arguments, **more) -> ControlConfig:
    """A configuration of stage 2 on the pair and data of these options, which writes nothing."""
    names = ("target", "drafter", "data", "max_length", "dtype", "window_size")
    given = {name: getattr(arguments, name, "-") for name in names}
    return ControlConfig.from_dict({**given, "output_dir": "-", **more})


def random_pair(shape: str, device: str, dtype: torch.dtype, **of_drafter):
    """Target and drafter of a shape, with random weights made where they will stay.

    ``of_drafter`` are fields of its configuration; without them it is EAGLE-3's.
    """
    kind, fields, draft_vocabulary = SHAPES[shape]
    target = random_model(kind(**fields), device, dtype)
    if of_drafter.get("architecture") != "block":
        of_drafter = {"draft_vocab_size": draft_vocabulary} | of_drafter
    config = PPOWConfig.from_target(target.config, **of_drafter)
    with torch.device(device), default_dtype(dtype):
        drafter = (PPOWBlockDrafter if config.is_block else PPOWDrafter)(config).eval()
    return target, drafter.to(device=device, dtype=dtype)


def random_model(config, device: str, dtype: torch.dtype):
    config._attn_implementation = "sdpa"
    with torch.device(device), default_dtype(dtype):
        return AutoModelForCausalLM.from_config(config).eval()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
