"""Kernels beside what they stand for, in Triton's interpreter or on a GPU."""

import copy
import functools
import gc
import itertools
import types
import weakref
from unittest import mock

import torch
from torch.nn.utils import prune
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ppow import PPOWConfig, PPOWDrafter, draws_ppow, fused_ppow, streamed_ppow, verifier_ppow
from ppow.acceptance_ppow import reject, sample
from ppow.cache_ppow import SlotLayer
from ppow.drafting_ppow import DraftWindow
from ppow.draws_ppow import Warp, draw, reject_drawn
from ppow.fused_ppow import fuse, gated, likeliest, rms_norm, rotated, write
from ppow.masks_ppow import ancestors_of
from ppow.recording_ppow import Twin
from ppow.streamed_ppow import in_eight_bits, multiply
from ppow.target_ppow import decoder_layers
from ppow.verifier_ppow import Verifier

SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# model type -> what of its own, and what of it is exchanged
KINDS = {
    "llama": ({}, "Attention MLP RMSNorm"),
    "qwen3": ({"head_dim": 16}, "Attention MLP RMSNorm"),
    "gemma3_text": ({"head_dim": 16}, "Attention RMSNorm"),  # its gate is another function
    "olmo2": ({}, "Attention MLP RMSNorm"),
    "phi3": ({"max_position_embeddings": 64}, "Attention RMSNorm"),  # its gate comes from one product
    "cohere": ({}, "MLP"),  # its rotation pairs neighbours
    "gpt_neox": ({}, "Attention"),
}


def fused_model(kind: str, device: str, dtype: torch.dtype) -> tuple:
    """-> a model, its fused copy, and which parts of the copy were exchanged."""
    torch.manual_seed(0)
    own, _ = KINDS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **own)).to(device, dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.5)  # gains of 1 would hide how they are applied
    copied = copy.deepcopy(model)
    before = [type(module) for module in copied.modules()]
    fuse(copied)
    changed = {new.__name__ for old, new in zip(before, map(type, copied.modules())) if new is not old}
    parts = ("Attention", "MLP", "RMSNorm")
    return model, copied, " ".join(part for part in parts if any(name.endswith(part) for name in changed))


@torch.no_grad()
def check_models(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Every kind computes the same, and is exchanged as far as the table says."""
    for kind, (_, expected) in KINDS.items():
        model, fused, changed = fused_model(kind, device, dtype)
        assert changed == expected, (kind, changed)
        ids = torch.randint(3, 64, (2, 9), device=device)
        check_close(fused(ids).logits, model(ids).logits, tolerance)
        assert type(model.get_decoder()) is type(fused.get_decoder())


def check_close(logits: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(logits, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@torch.no_grad()
def check_twins(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """In twins, where products lie side by side, and in a drafter's layers."""
    model, *_ = fused_model("qwen3", device, dtype)
    twin = Twin(model, decoder_layers).model
    ids = torch.randint(3, 64, (3, 7), device=device)
    check_close(twin(ids).logits, model(ids).logits, tolerance)
    drafter = (
        PPOWDrafter(PPOWConfig.from_target(model.config, qk_norm=True, target_taps=[0, 1, 2])).to(device, dtype).eval()
    )
    twin = Twin(drafter, lambda model: model.layers).model
    taps = torch.randn(2, 5, 3 * 48, device=device, dtype=dtype)
    given = {"input_ids": ids[:2, :5], "taps": taps, "inputs_embeds": torch.randn(2, 5, 48, device=device, dtype=dtype)}
    check_close(twin(**given).logits, drafter(**given).logits, tolerance)


def check_strides(device: str, dtype: torch.dtype) -> None:
    """Parts of a product, heads laid out either way, tables of one row for a batch: nothing must be contiguous."""
    torch.manual_seed(1)
    step = max(4 * torch.finfo(dtype).eps, 1e-5)  # a few roundings of values around 1
    same = functools.partial(torch.testing.assert_close, rtol=step, atol=step)
    whole = torch.randn(2, 3, 4 * 16 + 2 * 16 + 40, device=device, dtype=dtype)
    heads, keys = (part.unflatten(-1, (-1, 16)) for part in whole.split((64, 32, 40), -1)[:2])
    weight = torch.randn(16, device=device, dtype=dtype)
    expected = weight * torch.nn.functional.rms_norm(heads.float(), (16,), None, 1e-5).to(dtype)
    same(rms_norm(heads, weight, 1e-5), expected)
    same(rms_norm(heads.transpose(1, 2), weight, 1e-5), expected.transpose(1, 2))
    for row in (whole[0, 0], whole[0], whole):
        left, right = row[..., :70], row[..., 66:136]
        same(gated(left, right), torch.nn.functional.silu(left) * right)
    for rows, many in itertools.product((1, 2), (1, 4096)):
        cos, sin = torch.randn(2, rows, 3, 16, device=device, dtype=dtype)
        with mock.patch.object(fused_ppow, "MANY_NODES", many):  # all heads by one program, or each by its own
            ours = rotated(heads.transpose(1, 2), keys.transpose(1, 2), cos, sin)
        for mine, given in zip(ours, (heads, keys)):
            turned = torch.cat((-given[..., 8:], given[..., :8]), -1)
            same(mine, (given * cos[:, :, None] + turned * sin[:, :, None]).transpose(1, 2))


def check_writing(device: str, dtype: torch.dtype) -> None:
    """Every row writes its entries where it likes, and nothing else; a layer's update does the same."""
    torch.manual_seed(2)
    key, value = torch.randn(2, 2, 5, 3, 24, device=device, dtype=dtype).transpose(2, 3)  # (2, 3, 5, 24)
    before = torch.randn(2, 2, 3, 40, 24, device=device, dtype=dtype)
    slots = torch.tensor([[3, 4, 5, 6, 7], [30, 31, 32, 33, 34]], device=device)
    keys, values = before.clone()
    write(keys, values, key, value, slots)
    for buffer, entries, old in ((keys, key, before[0]), (values, value, before[1])):
        for row in range(2):
            old[row, :, slots[row]] = entries[row]
        assert torch.equal(buffer, old)
    layer = SlotLayer(40)
    layer.slots, layer.view = slots[1:].expand(2, -1), 36  # one row of slots for both
    assert torch.equal(layer.update(key, value)[0][0, :, 30:35], key[0])
    layer = SlotLayer(40)
    layer.slots, layer.view = slots, 36
    for part, entries in zip(layer.update(key, value), (key, value)):
        assert part.shape == (2, 3, 36, 24) and torch.equal(part[1, :, 30:35], entries[1])
        assert float(part.abs().sum()) > 0 and not part[0, :, 8:].any()


def check_likeliest(device: str) -> None:
    """As argmax, the first of several; in more than one piece; strided rows; with and without a draft vocabulary."""
    torch.manual_seed(5)
    for size in (5, 900, 40_000):
        logits = torch.randn(3, size + 3, device=device, dtype=torch.float16)[:, :size]
        logits[1, size // 2] = logits[1, size - 1] = 50.0
        offsets = torch.randint(0, 1000, (size,), device=device)
        best = torch.tensor([int(row.argmax()) for row in logits], device=device)
        assert int(best[1]) == size // 2
        for given, wanted in ((offsets, best + offsets[best]), (None, best)):
            draft, token = likeliest(logits, given)
            assert torch.equal(draft, best) and torch.equal(token, wanted)


@torch.no_grad()
def check_streaming(device: str, dtype: torch.dtype) -> None:
    """Eight bits are half a step off at most, products exact but for one rounding, and a twin is nearly the drafter."""
    torch.manual_seed(6)
    many = 40_000 if device == "cuda" else 130
    for outs, size, biased in ((70, 96, False), (4, 1000, True), (66, 1024, False), (many, 520, False)):
        weight = torch.randn(outs, size, device=device, dtype=dtype)
        weight[1] = 0
        bias = torch.randn(outs, device=device, dtype=dtype) if biased else None
        rounded, scale = in_eight_bits(weight)
        meant = rounded.float() * scale[:, None]
        assert bool(((meant - weight.float()).abs() <= scale[:, None] / 2 * 1.001).all())
        for shape in ((1,), (2, 5), (16,)):
            x = torch.randn(*shape, 2 * size, device=device, dtype=dtype)[..., :size]
            wanted = (x.float() @ meant.T + (0 if bias is None else bias.float())).to(dtype)
            torch.testing.assert_close(multiply(x, rounded, scale, bias), wanted, rtol=2e-2, atol=1e-1)
    large, streamed_ppow.FEWEST_WEIGHTS = streamed_ppow.FEWEST_WEIGHTS, 0
    try:
        config = PPOWConfig.from_target(AutoConfig.for_model("llama", **SMALL), target_taps=[0, 1, 2])
        drafter = PPOWDrafter(config).to(device, dtype).eval()
        twin = Twin(drafter, lambda model: model.layers, streams=True)
        assert len(twin.streamed) == 6  # fc, queries to values, output, gate and up, down, head
        given = {"input_ids": torch.randint(3, 64, (2, 8), device=device)}
        given["taps"] = torch.randn(2, 8, 3 * 48, device=device, dtype=dtype)
        twice = {name: torch.cat((part, part)) for name, part in given.items()}
        for some, least, most in ((given, 0.001, 0.03), (twice, 0.0, 0.001)):  # 16 rows, and too many
            ours, theirs = twin.model(**some).logits.float(), drafter(**some).logits.float()
            assert least <= float((ours - theirs).norm() / theirs.norm()) <= most
        assert streamed_ppow.streamed_bytes(drafter) == sum(each.bytes.numel() for each in twin.streamed)
        before = streamed_ppow.sums_of(twin.streamed)
        assert torch.equal(before, streamed_ppow.sums_of(twin.streamed))
        drafter.lm_head.weight.data[3, 5] *= 2
        assert not torch.equal(before, streamed_ppow.sums_of(twin.streamed))
        copies = [weakref.ref(each.bytes) for each in twin.streamed]
        gc.disable()
        del twin
        assert not any(copy() is not None for copy in copies)
        gc.enable()
        prune.l1_unstructured(drafter.fc, "weight", 0.5)  # whose weight is made anew from another
        assert len(Twin(drafter, lambda model: model.layers, streams=True).streamed) == 5
    finally:
        streamed_ppow.FEWEST_WEIGHTS = large


def check_refusals(device: str, dtype: torch.dtype) -> None:
    """However small its values are, what computes something else stays as it is."""
    torch.manual_seed(4)
    model, *_ = fused_model("llama", device, dtype)
    for activation, exchanged in ((torch.nn.SiLU(), True), (torch.nn.GELU("tanh"), False), (torch.nn.ReLU(), False)):
        for layer in model.model.layers:
            layer.mlp.act_fn = activation
            layer.mlp.down_proj.weight.data *= 1e-3
        twin = twin_of(model)
        assert (type(twin.model.layers[0].mlp) is not type(model.model.layers[0].mlp)) is exchanged
    with torch.device("meta"):  # whatever the default device is
        assert type(twin_of(with_mlps(model, Scaled)).model.layers[0].mlp) is not Scaled
    for layer in twin_of(with_mlps(model, Clamped)).model.layers:
        assert type(layer.mlp) is Clamped
    layers = twin_of(with_mlps(model, Scaled)).model.layers
    assert type(layers[0].mlp) is not Scaled and type(layers[1].mlp) is Scaled
    bare = LlamaRMSNorm(48)
    del bare.weight
    for norm in (GatedRMSNorm(48), OddRMSNorm(48), bare):
        model.norms = torch.nn.ModuleList([model.model.norm, norm.to(device, dtype)])
        assert type(twin_of(model).norms[1]) is type(norm)


def twin_of(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with fused modules."""
    twin = copy.deepcopy(model)
    fuse(twin)
    return twin


def with_mlps(model: torch.nn.Module, kind: type) -> torch.nn.Module:
    """A copy whose MLPs are of another class, and have the activation of the class they were of."""
    copied = copy.deepcopy(model)
    for number, layer in enumerate(copied.model.layers):
        layer.mlp.__class__, layer.mlp.act_fn, layer.mlp.scale = kind, torch.nn.SiLU(), 1.0 + number
    return copied


class Clamped(LlamaMLP):
    """What is above its limit is rare."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x).clamp(-7, 7))


class Scaled(LlamaMLP):
    """In the first layer by 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class GatedRMSNorm(LlamaRMSNorm):
    """May be given a gate."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if gate is None else x * gate)


class OddRMSNorm(LlamaRMSNorm):
    """Takes nothing of the shape of its gain."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(5, -1))


WARPERS = {
    "plain": [],
    "cold": [TemperatureLogitsWarper(0.6)],
    "few": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(3)],
    "nucleus": [TemperatureLogitsWarper(0.6), TopKLogitsWarper(40), TopPLogitsWarper(0.8)],
    "floor": [TopPLogitsWarper(0.3), MinPLogitsWarper(0.2)],
}


def check_draws(device: str, tolerance: float) -> None:
    """From the same random numbers what softmax, race and rejection draw; in one piece and in several."""
    ends = set()
    for size, dtype in ((5, torch.float32), (2048, torch.bfloat16), (5000, torch.float16), (5000, torch.float32)):
        for name, warpers in WARPERS.items():
            torch.manual_seed(7)
            logits = 4 * torch.randn(6, size + 3, device=device).to(dtype)[:, :size]
            logits[1, : size // 2] = float("-inf")
            warp = Warp.of(warpers)
            assert warp.is_exact == (name in ("plain", "cold", "few"))
            if warp.is_exact:
                logits[2, 1:5] = logits[2].max()  # four at the edge of three
            stock = LogitsProcessorList(warpers)(None, logits.float()).softmax(-1)
            torch.manual_seed(8)
            found, probs = draw(logits, warp)
            if warp.is_exact:
                torch.testing.assert_close(probs, stock, rtol=tolerance, atol=1e-7)
            else:
                check_near(probs, (logits.float() / (warp.temperature or 1.0)).softmax(-1), stock)
            for ids in (found, _with_seed(8, draw, logits, warp, False)[0]):
                assert ids.dtype == torch.long and torch.equal(ids, _with_seed(8, sample, probs))
            every, some = torch.arange(size, device=device), torch.randperm(size, device=device)[: size // 2 + 1]
            ends |= rejections(logits, warp, probs, every)
            ends |= rejections(logits, warp, probs, some)  # a draft vocabulary, in any order
    assert ends == {0, 1, 2}


def check_near(probs: torch.Tensor, whole: torch.Tensor, stock: torch.Tensor) -> None:
    """The likeliest of a distribution, renormalised: about as many as transformers keeps."""
    kept = probs > 0
    torch.testing.assert_close(probs, whole * kept / (whole * kept).sum(-1, keepdim=True), rtol=1e-3, atol=1e-6)
    assert torch.all(whole.masked_fill(~kept, 1).amin(-1) >= whole.masked_fill(kept, 0).amax(-1))  # the likeliest
    assert torch.all(probs.gather(1, stock.argmax(-1, keepdim=True)) > 0)
    counts = (kept.sum(-1) - (stock > 0).sum(-1)).abs()
    assert int(counts.max()) <= 2 + 0.2 * int((stock > 0).sum(-1).max()), counts


def _with_seed(seed: int, function, *given):
    torch.manual_seed(seed)
    return function(*given)


PROCESSORS = {
    "plain": [],
    "few": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(4)],
    "all": [TopKLogitsWarper(10**6)],
    "at least": [TopKLogitsWarper(1, min_tokens_to_keep=5)],
    "not away": [TopKLogitsWarper(3, filter_value=-5.0)],
    "nucleus": [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.97)],
    "twice": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(4), TemperatureLogitsWarper(1.3)],
    "floor": [MinPLogitsWarper(0.2)],
    "none of these": [TemperatureLogitsWarper(0.7), SuppressTokensLogitsProcessor([1, 2], "cpu")],
}


def check_verifying(device: str) -> None:
    """A verifier with the kernels decides as one without them, whatever processors there are."""
    for number, (name, processors) in enumerate(PROCESSORS.items()):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number % 3]
        for mode in ("whole", "draft vocabulary", "tree", "blind"):
            torch.manual_seed(3)
            logits = (3 * torch.randn(2, 5, 2051, device=device)).to(dtype)[:, 1:, :2049]
            pruned = mode == "draft vocabulary"
            columns = torch.randperm(2049, device=device)[:900] if pruned else torch.arange(2049, device=device)
            text = types.SimpleNamespace(scores=None, logits=None, device=torch.device(device))
            given = LogitsProcessorList(processors), True, columns, text, mode != "blind"
            verdicts = []
            for allowed in (draws_ppow.can_draw, lambda logits: False):
                verifier = Verifier(*given)
                verifier_ppow.can_draw = draws_ppow.can_draw
                torch.manual_seed(5)
                if mode == "tree":
                    tokens = torch.randint(2049, (2, 4), device=device)
                    parents = torch.tensor([[0, 0, 0, 1]] * 2, device=device)
                    depth = torch.tensor([[0, 1, 1, 2]] * 2, device=device)
                    window = DraftWindow(tokens, parents, depth, ancestors_of(parents, 2), 2)
                else:
                    near = logits[:, :3][..., columns] + 0.3 * torch.randn(2, 3, len(columns), device=device).to(dtype)
                    ids, probs = zip(*map(verifier.draft_sample, near.unbind(1)))
                    ids = torch.stack(ids, 1)
                    tokens = torch.cat((torch.zeros_like(ids[:, :1]), columns[ids]), 1)
                    window = DraftWindow.chain(tokens, ids, torch.stack(probs, 1))
                verifier_ppow.can_draw = allowed
                verdicts.append([_with_seed(seed, verifier, window, logits) for seed in range(3)])
            verifier_ppow.can_draw = draws_ppow.can_draw
            for ours, theirs in zip(*verdicts):
                for part in ("accepted", "path", "tokens"):
                    assert torch.equal(getattr(ours, part), getattr(theirs, part)), (name, mode, part)


def check_cold_draws(device: str) -> None:
    """Two tokens that tie at a large logit are drawn alike however cold it is: the race is not rounded away."""
    logits = torch.full((400, 2100), 3.0, device=device, dtype=torch.bfloat16)
    logits[:, 7] = logits[:, 2090] = 30.0  # in different pieces
    logits[:, 9] = logits[:, 7]
    for temperature in (1.0, 1e-4, 1e-6):
        torch.manual_seed(9)
        found, probs = draw(logits, Warp(temperature=temperature))
        torch.testing.assert_close(probs[0, 7], torch.tensor(1 / 3, device=device))
        counts = torch.tensor([int((found == token).sum()) for token in (7, 9, 2090)])
        assert int(counts.sum()) == 400 and int(counts.min()) > 90, (temperature, counts)  # 133 each, sigma 9.4


def check_edge_of_equals(device: str) -> None:
    """Float32 neighbours that dividing makes equal both stay, as where transformers divides first."""
    values = torch.tensor([5.0, 3.0, 3.0, 1.0], device=device)
    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(2)]
    merged = 0
    for step in range(1, 60):
        values[1:3] = 3.0 + step * 2.0**-22
        values[2] = torch.nextafter(values[1], torch.tensor(0.0, device=device))
        expected = LogitsProcessorList(warpers)(None, values[None]).softmax(-1)
        merged += int((expected > 0).sum()) == 3
        torch.testing.assert_close(draw(values[None], Warp.of(warpers))[1], expected)
    assert merged


def rejections(logits: torch.Tensor, warp: Warp, expected: torch.Tensor, columns: torch.Tensor) -> set[int]:
    """Two rows of two drafts from distributions near the target's: -> how many were accepted, over some seeds."""
    target, probs = logits.view(2, 3, -1), expected.view(2, 3, -1)
    near = probs[:, :2, columns] + 0.5 * torch.rand_like(probs[:, :2, columns]).softmax(-1)
    near = near / near.sum(-1, keepdim=True)
    ends = set()
    for seed in range(6):
        torch.manual_seed(seed)
        draft_ids = sample(near)
        tokens = torch.cat((torch.zeros_like(draft_ids[:, :1]), columns[draft_ids]), 1)
        window = DraftWindow.chain(tokens, draft_ids, near)
        torch.manual_seed(100 + seed)
        wanted = reject(window, probs, columns)
        for given in (columns, *([None] if len(columns) == target.shape[2] else [])):
            torch.manual_seed(100 + seed)
            found = reject_drawn(window, target, warp, given)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
        ends |= set(wanted[0].tolist())
    return ends
