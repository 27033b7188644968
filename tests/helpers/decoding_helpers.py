"""Builders that the decoding tests share: tiny targets of every family, and drafters that really draft for them.

A random drafter accepts nearly nothing, so the accepting half of the loop would stay untested. `trained_drafter` fits
one to its target's greedy choices in about a second.
"""

import copy
import functools
from collections.abc import Iterator

import torch
import transformers
from torch.nn import functional as F
from transformers import GenerationConfig

from ppow import PPOWBlockDrafter, PPOWConfig, PPOWDrafter
from ppow.cache_ppow import SlotCache
from ppow.modeling_ppow import CachedAttention
from ppow.training.data import Batch
from ppow.training.supervised import block_step
from ppow.training.target import FrozenTarget

VOCAB = 48
PAD = 0
CHAIN = {"window_size": 4}
TREE = {"tree_depth": 4, "tree_top_k": 3, "tree_nodes": 12}
MODES = {"chain": CHAIN, "tree": TREE}
LLAMA3 = {  # a RoPE
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
_GQA = {**_SHAPE, "num_key_value_heads": 2}
_SLIDING = {**_GQA, "sliding_window": 6}
_GEMMA = {**_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
BOTH = ("sdpa", "eager")

# family -> (architecture, configuration, its fields, dtype under sdpa, attention implementations). Experts run in
# float32 only, and eager attention does too: in float64 its softmax turns fully padded rows into NaN.
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GQA, torch.float64, BOTH),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GQA, torch.float64, BOTH),
    "qwen2-sliding": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_SLIDING, "use_sliding_window": True, "max_window_layers": 2},
        torch.float64,
        BOTH,
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GQA, "head_dim": 8}, torch.float64, BOTH),
    "mistral": ("MistralForCausalLM", "MistralConfig", _SLIDING, torch.float64, BOTH),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA, torch.float32, ("eager",)),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
        torch.float64,
        BOTH,
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_SLIDING, "sliding_window": 9}, torch.float64, BOTH),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SHAPE, torch.float64, BOTH),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GQA, **_EXPERTS}, torch.float32, BOTH),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_GQA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        torch.float32,
        BOTH,
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GQA, torch.float64, BOTH),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_SLIDING, **_EXPERTS, "head_dim": 8},
        torch.float32,
        ("eager",),
    ),
}


def build_target(family: str = "llama", attention: str = "sdpa", seed: int = 0, **overrides):
    """A small random target; the same weights for every attention implementation.

    Large embeddings under small layers make it predictable enough for a drafter to learn, and its text varied.
    """
    architecture, config_name, fields, dtype, _ = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**fields, **overrides})
    config._attn_implementation = attention
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        target = getattr(transformers, architecture)(config).float()
        torch.nn.init.normal_(target.get_input_embeddings().weight)
        if family == "olmo2":  # its layers norm what they add to the stream, so their weights' scale does not show
            for name, weight in target.named_parameters():
                if "post_" in name:
                    weight.fill_(0.3)
    return target.to(torch.float32 if attention == "eager" else dtype).eval()


def random_drafter(target, seed: int = 0, **overrides) -> PPOWDrafter:
    """An untrained drafter in its target's dtype, with a draft vocabulary of scattered tokens when it is pruned.

    Its windows have one size unless a call says otherwise: what a test sees of them must not follow measured time.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = PPOWConfig.from_target(target.config, **{"initializer_range": 0.1, **overrides})
        drafter = PPOWDrafter(config).to(target.dtype).eval()
        drafter.generation_config.window_schedule = "constant"
        scatter_vocabulary(drafter)
    return drafter


def scatter_vocabulary(drafter) -> None:
    """Let a drafter of a draft vocabulary draft tokens from anywhere in the target's."""
    if drafter.pruned:
        size, whole = drafter.config.draft_vocab_size, drafter.config.vocab_size
        drafter.set_draft_vocabulary(*offsets_of(torch.randperm(whole)[:size].sort().values, whole))


def offsets_of(chosen: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending target ids (D,) -> d2t (D,) offsets, t2d (V,) membership."""
    member = torch.zeros(vocab_size, dtype=torch.bool)
    member[chosen] = True
    return chosen - torch.arange(len(chosen)), member


@torch.enable_grad()
def train(drafter: PPOWDrafter, target, steps: int = 50, unroll: int = 3, seed: int = 0) -> PPOWDrafter:
    """Fit ``drafter`` to the choices of ``target`` on its own greedy text: pair t is to draft x_{t+2}.

    Later draft steps read the drafter's own features, so a few passes are unrolled, each reading the features of the
    pass before, shifted by one.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prompts = torch.randint(1, target.config.vocab_size, (32, 6))
    text = target.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, do_sample=False)
    with torch.no_grad():
        logits, taps = drafter.read_target(target, input_ids=text)
    taps = taps[:, :-1]  # (B, T-1, n_taps * Ht)
    labels = logits[:, 1:].argmax(-1)  # (B, T-1) target ids
    columns = drafter.draft_columns()
    to_draft = torch.full((drafter.config.vocab_size,), -100)
    to_draft[columns] = torch.arange(len(columns))
    labels = to_draft[labels]
    embeds = drafter.embedding_for(target)(text[:, 1:]).detach()
    positions = torch.arange(labels.shape[1])[None].expand(len(text), -1)
    optimizer = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        if not drafter.config.share_target_embeddings:
            embeds = drafter.embed_tokens(text[:, 1:])
        hidden = drafter.fuse(taps)
        rotary = drafter.rotary(hidden, positions)
        loss = 0.0
        for _ in range(unroll):
            attend = CachedAttention(SlotCache(len(drafter.layers)))
            hidden = drafter.step(embeds.to(hidden), hidden, rotary, attend)
            logits = drafter.logits(hidden, drafter.embedding_for(target)).flatten(0, 1)
            loss = loss + F.cross_entropy(logits.float(), labels.flatten())
            hidden = torch.cat((hidden[:, :1], hidden[:, :-1]), 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter


@functools.cache
def trained_pair(family: str = "llama"):
    """A target and a drafter that drafts well for it, from a pruned vocabulary. Treat both as read-only."""
    target = build_target(family, FAMILIES[family][4][0])
    return target, train(random_drafter(target, draft_vocab_size=VOCAB - 6), target)


@functools.cache
def sharing_pair(draft_vocabulary: int = VOCAB - 6):
    """As :func:`trained_pair`, with a drafter that reads tokens off with its target's head."""
    target, shared = build_target(), {"share_target_embeddings": True, "share_target_head": True}
    return target, train(random_drafter(target, draft_vocab_size=draft_vocabulary, **shared), target)


def prompt_batches(
    batch: int, count: int, seed: int, vocab_size: int = VOCAB
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``count`` left-padded batches of random prompts of 1 to 12 tokens: ids (batch, P), mask (batch, P)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        lengths = torch.randint(1, 13, (batch,), generator=generator)
        width = int(lengths.max())
        ids = torch.randint(1, vocab_size, (batch, width), generator=generator)
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        yield ids.masked_fill(mask == 0, PAD), mask


def generate_with(
    target, drafter, ids: torch.Tensor, mask: torch.Tensor | None = None, config: dict | None = None, **kwargs
):
    """``target.generate`` with a drafter; -> the output object with its acceptance figures.

    Args:
        config: fields of the call's ``GenerationConfig`` (where ``window_size`` and ``tree_*`` belong).
    """
    generation_config = GenerationConfig(
        **{"do_sample": False, "return_dict_in_generate": True, "pad_token_id": PAD, **(config or {})}
    )
    return target.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        generation_config=generation_config,
        assistant_model=drafter,
        **kwargs,
    )


def block_drafter(target, seed: int = 0, **overrides) -> PPOWBlockDrafter:
    """An untrained block drafter in its target's dtype, its Markov head with weights that show."""
    shape = {"architecture": "block", "block_size": 6, "num_hidden_layers": 2, "initializer_range": 0.1, **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drafter = PPOWBlockDrafter(PPOWConfig.from_target(target.config, **shape))
        if drafter.config.markov_rank:
            torch.nn.init.normal_(drafter.markov_in.weight, std=0.7)
            torch.nn.init.normal_(drafter.markov_out.weight, std=0.7)
        scatter_vocabulary(drafter)
    return drafter.to(target.dtype).eval()


@functools.cache
def trained_block(**overrides):
    """A target and a block drafter that drafts well for it. Treat both as read-only."""
    target = build_target()
    drafter = block_drafter(target, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = torch.randint(1, VOCAB, (32, 6))
    text = target.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, do_sample=False)
    mask = torch.arange(text.shape[1]).expand_as(text) >= 3
    batch = Batch(text, mask, torch.full((32,), text.shape[1]), seed=0)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    frozen = FrozenTarget(copy.deepcopy(target), drafter.config.target_taps)
    with torch.enable_grad():
        for _ in range(40):
            optimizer.zero_grad()
            block_step(frozen, drafter, batch, 0.9, "ce", anchors=12)[0].backward()
            optimizer.step()
    return target, drafter.requires_grad_(False)
