"""Block drafters: whole windows in one forward, decoded by the same loop as every drafter."""

import copy

import pytest
import torch
from transformers import AutoModel

from decoding_helpers import (
    FAMILIES,
    PAD,
    VOCAB,
    block_drafter,
    build_target,
    generate_with,
    prompt_batches,
    trained_block,
)
from ppow import PPOWBlockDrafter, PPOWConfig, PPOWDrafter
from ppow.cache_ppow import SlotCache
from ppow.training.blocks import Blocks
from ppow.training.target import FrozenTarget

CHAIN, TREE = {"window_size": 5}, {"tree_depth": 4, "tree_top_k": 3, "tree_nodes": 12}
MODES = {"chain": CHAIN, "short chain": {"window_size": 2}, "tree": TREE}
KINDS = {
    "dspark": {"markov_rank": 4, "confidence_head": True},
    "dflash": {"predict_from_anchor": False},
    "own vocabulary": {"draft_vocab_size": 36},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_the_targets_own(kind, mode):
    target, drafter = trained_block(**KINDS[kind])
    gained = []
    for batch in (1, 3):
        for ids, mask in prompt_batches(batch, 2, seed=batch):
            out = generate_with(target, drafter, ids, mask, {**MODES[mode], "max_new_tokens": 24})
            stock = target.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=PAD)
            assert torch.equal(out.sequences, stock)
            gained.append(out.acceptance.acceptance_length)
    assert sum(gained) / len(gained) > 1.05, "drafts must be accepted for the test to mean something"


@pytest.mark.parametrize("family", ["qwen2-sliding", "mistral", "gemma3", "gpt-neox", "qwen3-moe", "gpt-oss"])
def test_targets_of_other_families_keep_their_answers(family):
    target = build_target(family, FAMILIES[family][4][0])
    drafter = block_drafter(target, markov_rank=4)
    for options in (CHAIN, TREE):
        for ids, mask in prompt_batches(2, 1, seed=1):
            out = generate_with(target, drafter, ids, mask, {**options, "max_new_tokens": 16})
            stock = target.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=PAD)
            assert torch.equal(out.sequences, stock)


@torch.no_grad()
def dense_logits(target, drafter, ids: torch.Tensor, anchor: int) -> torch.Tensor:
    """Slot logits (K, D) behind one anchor of one text (1, T), layer by layer with everything written out."""
    config, layers = drafter.config, drafter.layers
    taps = FrozenTarget(target, config.target_taps).read(ids).taps[0, :anchor]
    norm = lambda x, weight: torch.nn.functional.rms_norm(x, x.shape[-1:], weight, config.rms_norm_eps)  # noqa: E731
    context = norm(taps @ drafter.fc.weight.T, drafter.hidden_norm.weight)
    block = torch.tensor([int(ids[0, anchor])] + [config.mask_token_id] * (config.block_size - 1))
    hidden = target.get_input_embeddings().weight[block]
    place = torch.cat((torch.arange(anchor), anchor + torch.arange(len(block)))).double()
    half = config.head_dim // 2
    angle = place[:, None] * config.rope_parameters["rope_theta"] ** (-torch.arange(half).double() / half)
    angle = torch.cat((angle, angle), -1)  # (T', d)

    def rotated(x, angle):  # (heads, N, d)
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * angle.cos() + turned * angle.sin()

    for layer in layers:
        own, x = layer.self_attn, norm(hidden, layer.input_layernorm.weight)
        heads = lambda rows, project, size=config.head_dim: (rows @ project.weight.T).view(len(rows), -1, size)  # noqa: E731
        query = norm(heads(x, own.q_proj), own.q_norm.weight).transpose(0, 1)
        both = torch.cat((context, x))
        key = norm(heads(both, own.k_proj), own.k_norm.weight).transpose(0, 1)
        value = heads(both, own.v_proj).transpose(0, 1)
        groups = len(query) // len(key)
        key, value = (entries.repeat_interleave(groups, 0) for entries in (rotated(key, angle), value))
        scores = rotated(query, angle[anchor:]) @ key.transpose(1, 2) / config.head_dim**0.5
        hidden = hidden + (scores.softmax(-1) @ value).transpose(0, 1).flatten(1) @ own.o_proj.weight.T
        x = norm(hidden, layer.post_attention_layernorm.weight)
        inner = torch.nn.functional.silu(x @ layer.mlp.gate_proj.weight.T) * (x @ layer.mlp.up_proj.weight.T)
        hidden = hidden + inner @ layer.mlp.down_proj.weight.T
    features = norm(hidden, drafter.norm.weight)[0 if config.predict_from_anchor else 1 :]
    return (features @ target.get_output_embeddings().weight.T)[:, drafter.draft_columns()]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_and_training_compute_the_block_as_it_is_written_out(kind):
    target = build_target()
    drafter = block_drafter(target, **KINDS[kind])
    ids = next(prompt_batches(1, 1, seed=4))[0].repeat(1, 3)[:, :14]
    reading = FrozenTarget(target, drafter.config.target_taps).read(ids)
    words = drafter.embedding_for(target)
    blocks = Blocks(drafter, words, ids, reading.taps)
    starts = torch.tensor([[0, 3, 8, 12]])
    blocks.begin(starts)
    found = words.logits(blocks.slots[0])  # (R, K, D)
    state = drafter.state_kind(drafter, words, SlotCache(len(drafter.layers), 4), torch.zeros(1).long(), None)
    done = 0
    for number, start in enumerate(starts[0].tolist()):
        expected = dense_logits(target, drafter, ids, start + 1)
        torch.testing.assert_close(found[number], expected)
        rows = torch.arange(done, start + 1)[None]  # a cache that grows from window to window, drafted blocks behind it
        state.extend(reading.taps[:, rows[0]], rows, rows, torch.tensor([rows.shape[1]]))
        torch.testing.assert_close(drafter.logits(state._slots(ids[:, start + 1]), words)[0], expected)
        done = start + 1


class Scaled(torch.nn.Linear):
    """Not what its weight alone says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("head", ["with a bias", "of another class", "without values"])
@torch.no_grad()
def test_a_draft_vocabulary_takes_its_columns_of_any_head(head):
    target = build_target()
    features = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(target.dtype)
    drafter = block_drafter(target, draft_vocab_size=36)
    if head == "with a bias":
        target.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, dtype=target.dtype))
    elif head == "of another class":
        target.lm_head = Scaled(32, VOCAB).to(target.dtype)
    expected = target.lm_head(features)[..., drafter.draft_columns()]
    if head == "without values":
        weight, target.lm_head.weight = target.lm_head.weight, torch.nn.Parameter(target.lm_head.weight.to("meta"))
        words = drafter.embedding_for(target)
        target.lm_head.weight = weight  # as accelerate brings it for a call
    else:
        words = drafter.embedding_for(target)
    torch.testing.assert_close(words.logits(features), expected)


@torch.no_grad()
def test_the_markov_head_adds_its_bias_for_the_token_before():
    target = build_target()
    drafter = block_drafter(target, markov_rank=4)
    ids = torch.arange(1, 9)[None]
    taps = FrozenTarget(target, drafter.config.target_taps).read(ids).taps
    plain = copy.deepcopy(drafter)
    plain.config.markov_rank = 0
    unrolled = [Blocks(each, each.embedding_for(target), ids, taps) for each in (drafter, plain)]
    bias = drafter.markov_in.weight @ drafter.markov_out.weight.T  # (V, V)
    assert float(bias.std()) > 0.1
    starts = torch.tensor([[1, 4]])
    for step, previous in enumerate(([2 + 1, 5 + 1], [7, 9])):
        before = torch.tensor([previous])
        with_bias, without = (
            each.logits(each.advance(before) if step else each.begin(starts), each.previous) for each in unrolled
        )
        torch.testing.assert_close(with_bias - without, bias[before])


def test_the_confidence_head_ends_chains():
    target, drafter = (copy.deepcopy(model) for model in trained_block(**KINDS["dspark"]))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    stock = target.generate(ids, max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(ids))
    drafter.confidence_head.weight.data.zero_()
    for bias, longest in ((-5.0, 1), (0.0, 2), (20.0, 6)):  # chances of 0.7%, one half and 1
        drafter.confidence_head.bias.data.fill_(bias)
        out = generate_with(target, drafter, ids, config={"draft_threshold": 0.3, "max_new_tokens": 16})
        assert max(out.acceptance.drafted[0]) == longest and torch.equal(out.sequences, stock)


@pytest.mark.parametrize("size", [VOCAB, 36])
def test_a_saved_drafter_comes_back_by_every_entrance(size, tmp_path):
    target, drafter = trained_block(**KINDS["dspark"], draft_vocab_size=size)
    drafter.save_pretrained(tmp_path)
    config = PPOWConfig.from_pretrained(tmp_path)
    assert config.is_block and config.markov_rank == 4 and config.longest_window == 6
    assert config.draft_vocab_size == size == drafter.markov_out.out_features
    assert not [name for name in drafter.state_dict() if "embed" in name or "lm_head" in name]
    ours = PPOWDrafter.from_pretrained(tmp_path)
    assert type(ours) is PPOWBlockDrafter and ours.generation_config.window_size == 6
    remote = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    expected = generate_with(target, drafter, ids, config={"max_new_tokens": 16})
    for other in (ours, remote):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in drafter.state_dict().items())
        found = generate_with(target, other, ids, config={"max_new_tokens": 16})
        assert (
            torch.equal(found.sequences, expected.sequences)
            and found.acceptance.accepted == expected.acceptance.accepted
        )
    through = target.generate(
        ids,
        assistant_model=remote,
        custom_generate=str(tmp_path),
        trust_remote_code=True,
        window_size=3,
        max_new_tokens=16,
        do_sample=False,
    )
    assert torch.equal(through, expected.sequences)


def test_what_a_block_drafter_cannot_do_is_refused():
    target, drafter = trained_block(**KINDS["dflash"])
    ids = torch.tensor([[3, 1, 4]])
    with pytest.raises(ValueError, match="drafts 5 at once: set window_size=5"):
        generate_with(target, drafter, ids, config={"window_size": 6})
    with pytest.raises(ValueError, match="tree_depth=5"):
        generate_with(target, drafter, ids, config={**TREE, "tree_depth": 7})
    with pytest.raises(ValueError, match="calls? target.generate"):
        drafter(ids)
    with pytest.raises(ValueError, match="expected 'block'"):
        PPOWBlockDrafter(PPOWConfig.from_target(target.config))
    for wrong in ({"block_size": 1, "predict_from_anchor": False}, {"mask_token_id": 99}, {"norm_output": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PPOWConfig.from_target(target.config, architecture="block", **wrong)
    with pytest.raises(ValueError, match="'eagle3' or 'block'"):
        PPOWConfig.from_target(target.config, architecture="blocks")


def test_taps_are_those_of_dflash():
    shape = {"architecture": "block"}
    assert PPOWConfig(**shape, target_num_layers=36).target_taps == [2, 10, 18, 26, 34]  # [1, 9, 17, 25, 33] there
    for layers in (4, 7, 8, 12, 30, 80):
        taps = PPOWConfig(**shape, target_num_layers=layers).target_taps
        assert len(taps) == (5 if layers >= 8 else 3) and taps[-1] <= layers - 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_serves_block_drafters(kind, mode, anywhere):
    """Without the graphs themselves, which test_gpu.py records."""
    target, drafter = (copy.deepcopy(model) for model in trained_block(**KINDS[kind]))
    for batch in (1, 3):
        for ids, mask in prompt_batches(batch, 1, seed=batch):
            config = {**MODES[mode], "max_new_tokens": 20, "cuda_graphs": True}
            out = generate_with(target, drafter, ids, mask, config)
            plain = generate_with(target, drafter, ids, mask, {**config, "cuda_graphs": False})
            assert out.drafting.cuda_graphs and torch.equal(out.sequences, plain.sequences)
            for fast_row, plain_row in zip(out.acceptance.accepted, plain.acceptance.accepted):
                assert fast_row[:3] == plain_row[:3]  # the plain path drafts less where less room is left
    fast, slow = (
        generate_with(target, drafter, torch.arange(1, 7)[None], config={**config, "do_sample": True})
        for config in ({**CHAIN, "max_new_tokens": 40, "cuda_graphs": graphs} for graphs in (True, False))
        if torch.manual_seed(3)
    )
    assert torch.equal(fast.sequences[:, :16], slow.sequences[:, :16])
