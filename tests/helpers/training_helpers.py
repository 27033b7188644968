"""A tiny pair in float64, a configuration of stage 2 and a batch of texts, for the tests of training."""

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from ppow import PPOWConfig, PPOWDrafter
from ppow.training.config import ReinforceConfig
from ppow.training.data import Batch
from ppow.training.objectives import OBJECTIVES, Compared, TextWindows
from ppow.training.target import FrozenTarget

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def make_pair(sliding: bool = False, **drafter_options):
    torch.manual_seed(0)
    if sliding:
        config = Gemma3TextConfig(
            **SHAPE,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
        model = Gemma3ForCausalLM(config).double()
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).double()
    drafter = PPOWDrafter(PPOWConfig.from_target(model.config, **{"draft_vocab_size": 20, **drafter_options})).double()
    if drafter.pruned:
        chosen = torch.arange(5, 25)  # the draft vocabulary is not a prefix of the target's
        member = torch.zeros(32, dtype=torch.bool)
        member[chosen] = True
        drafter.set_draft_vocabulary(chosen - torch.arange(20), member)
    return FrozenTarget(model, drafter.config.target_taps), drafter.eval()


def make_config(kind: type = ReinforceConfig, preset: str = "published", **options) -> ReinforceConfig:
    values = dict.fromkeys(("target", "drafter", "data", "output_dir"), "-")
    values |= {"window_size": 4, "group_size": 3, "windows_per_sequence": 2, "proximity_margin": 50.0}
    return kind.from_dict(values | {"preset": preset, "rollout_temperature": 1.0} | options)


def make_batch(rows: int = 2, length: int = 20) -> Batch:
    ids = torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :4] = False
    return Batch(ids, mask, torch.full((rows,), length), seed=11)


def make_windows(**changes):
    """Two windows of two steps; the second window has one step."""
    values = {
        "kl": [[1.0, 2.0], [3.0, 0.0]],
        "overlap": [[0.5, 0.25], [0.8, 0.0]],
        "best": [[0.6, 0.5], [0.2, 0.0]],
        "accept": [[0.9, 0.4], [0.7, 0.0]],
        "text": [[0.6, 0.2], [0.4, 0.0]],
        "hit": [[True, False], [False, False]],
    }
    states = Compared(**{name: torch.tensor(value) for name, value in (values | changes).items()})
    mask = torch.tensor([[True, True], [True, False]])
    return TextWindows(mask, states, mask.clone(), torch.tensor([False, True]))


def value_of(name, windows, **options):
    config = make_config(window_size=2, group_size=2, **options)
    return float(OBJECTIVES[name].function(windows, config, torch.tensor([0.0, 1.0, 3.0]))[0])


def by_steps(first, second):
    """Step means weighed 1 and 0.8."""
    return (first + 0.8 * second) / 1.8
