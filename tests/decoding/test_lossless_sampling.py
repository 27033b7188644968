"""Sampling with a drafter draws from the target's own distribution, over whole sequences.

A target with a vocabulary of 5 writes 3 tokens: the probability of each of the 125 sequences follows from its logits.
Thousands of samples drawn with a drafter are compared with them by a chi-square test at fixed seeds. The same test must
reject wrong acceptance rules (`test_the_test_rejects_*`), and accept transformers' own sampling.
"""

import itertools

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoding_helpers import PAD, block_drafter, build_target, generate_with, random_drafter
from ppow import acceptance_ppow, pair_ppow, verifier_ppow
from ppow.schedules_ppow import Costs

VOCAB, LENGTH, SAMPLES = 5, 3, 4_000
CHAIN, TREE = {"window_size": 3}, {"tree_depth": 3, "tree_top_k": 2, "tree_nodes": 5}
MODES = {"chain": CHAIN, "tree": TREE}
EARLY = {**CHAIN, "draft_threshold": 0.5}  # a chain that ends where its joint probability falls below one half
COST = {"window_size": 6, "window_schedule": "cost"}
PROMPTS = [[1, 4, 2], [3, 2, 2, 1, 4]]  # the first one is padded on the left
# for processors that read the text: whether they see padding differs between releases of transformers
EVEN = [[2, 1, 3, 4, 2], [3, 2, 2, 1, 4]]

EOS = 2


class NoEcho(LogitsProcessor):
    """A processor of the user's: looks at the last two tokens, and counts on being given the true prefix."""

    def __call__(self, input_ids, scores):
        last, before, length = input_ids[:, -1:], input_ids[:, -2:-1], input_ids.shape[1]
        scores = scores.scatter_add(1, last, torch.full_like(last, -1.5, dtype=scores.dtype))
        scores = scores.scatter_add(1, before, torch.full_like(before, 0.5, dtype=scores.dtype))
        scores[:, length % VOCAB] += 1.0
        return scores


# name -> (arguments of generate, the processors that transformers makes of them, in its order)
CASES = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "top-k": ({"top_k": 3}, [TopKLogitsWarper(3)]),
    "top-p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "min-p": ({"min_p": 0.4}, [MinPLogitsWarper(0.4)]),
    "warpers": (
        {"temperature": 1.5, "top_k": 4, "top_p": 0.9},
        [TemperatureLogitsWarper(1.5), TopKLogitsWarper(4), TopPLogitsWarper(0.9)],
    ),
    "repetition-penalty": ({"repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
    "processor": ({"logits_processor": [NoEcho()]}, [NoEcho()]),
    "everything": (
        {"repetition_penalty": 1.3, "logits_processor": [NoEcho()], "temperature": 0.8, "top_k": 4},
        [RepetitionPenaltyLogitsProcessor(1.3), NoEcho(), TemperatureLogitsWarper(0.8), TopKLogitsWarper(4)],
    ),
}
PREFIX_FREE = ["plain", "temperature", "top-k", "top-p", "min-p", "warpers"]


@pytest.fixture(scope="module")
def target():
    return build_target("llama", vocab_size=VOCAB, initializer_range=0.25, seed=1)


@pytest.fixture(scope="module")
def pruned(target):
    return random_drafter(target, draft_vocab_size=3, initializer_range=0.3)


@pytest.fixture(scope="module", params=["full", "pruned"])
def drafter(request, target, pruned):
    return pruned if request.param == "pruned" else random_drafter(target, initializer_range=0.3, seed=2)


@torch.no_grad()
def exact_distribution(target, prompt: list[int], processors: list, width: int, eos: int | None = None):
    """Probability of every continuation of a prompt, as a tensor (V,) * LENGTH.

    Args:
        width: length of the prompt with the padding on its left, which processors see and the target does not.
    """
    tails = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    texts = torch.cat((torch.tensor(prompt).expand(len(tails), -1), tails), 1)
    padded = torch.nn.functional.pad(texts, (width - len(prompt), 0), value=PAD)
    logits = target(texts).logits[:, len(prompt) - 1 : -1].float()
    probs, ended = torch.ones(len(tails), dtype=torch.float64), torch.zeros(len(tails), dtype=torch.bool)
    for i in range(LENGTH):
        scores = LogitsProcessorList(processors)(padded[:, : width + i], logits[:, i].clone())
        step = scores.double().softmax(-1).gather(1, tails[:, i : i + 1])[:, 0]
        probs *= torch.where(ended, (tails[:, i] == PAD).double(), step)  # behind its end a row is padded
        if eos is not None:
            ended |= tails[:, i] == eos
    assert abs(probs.sum() - 1) < 1e-6
    return probs.view((VOCAB,) * LENGTH)


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """The p-value of ``counts`` under ``probs``; outcomes expected fewer than 5 times are pooled."""
    expected, counts = probs.flatten() * counts.sum(), counts.flatten().double()
    if counts[expected == 0].any():
        return 0.0  # something impossible was drawn
    often = expected >= 5
    observed = torch.cat((counts[often], counts[~often].sum()[None]))
    expected = torch.cat((expected[often], expected[~often].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc((len(expected) - 1) / torch.tensor(2.0).double(), statistic / 2).item()


def draw(
    target, drafter, case: str, options: dict | None, prompts: list, rows: int, calls: int, eos: int | None = None
):
    """Sequences drawn from all prompts at once: -> one tensor of counts (V,) * LENGTH per prompt, mean acceptance."""
    width, repeats = max(map(len, prompts)), rows // len(prompts)
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts]).repeat(repeats, 1)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).repeat(repeats, 1)
    counts = [torch.zeros(VOCAB**LENGTH) for _ in prompts]
    place = VOCAB ** torch.arange(LENGTH - 1, -1, -1)
    gained = verifications = 0
    config = {"do_sample": True, "max_new_tokens": LENGTH, "top_k": 0, "eos_token_id": eos}
    config |= {**(options or {}), **CASES[case][0]}
    passed = {"logits_processor": LogitsProcessorList(config.pop("logits_processor", []))}
    torch.manual_seed(0)
    for _ in range(calls):
        out = generate_with(target, None if options is None else drafter, ids, mask, config, **passed)
        tails = out.sequences[:, width:]
        tails = torch.nn.functional.pad(tails, (0, LENGTH - tails.shape[1]), value=PAD)
        for i, tally in enumerate(counts):
            tally += (tails[i :: len(prompts)] * place).sum(1).bincount(minlength=VOCAB**LENGTH)
        if options is not None:
            gained += sum(map(sum, out.acceptance.gained))
            verifications += out.acceptance.verifications
    return [tally.view((VOCAB,) * LENGTH) for tally in counts], gained / max(verifications, 1)


def p_values(
    target,
    drafter,
    case: str,
    options: dict | None,
    rows=SAMPLES,
    samples=SAMPLES,
    eos=None,
    prompts=PROMPTS,
    least=1.15,
) -> list[float]:
    counts, acceptance = draw(target, drafter, case, options, prompts, rows, samples // rows, eos)
    assert sum(tally.sum() for tally in counts) == samples
    if options is not None:
        assert acceptance >= least, "drafts must be accepted for the test to mean something"
    width = max(map(len, prompts))
    exact = [exact_distribution(target, prompt, CASES[case][1], width, eos) for prompt in prompts]
    return [chi_square(tally, probs) for tally, probs in zip(counts, exact)]


# -- the law -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", PREFIX_FREE)
def test_sampling_is_exact(target, drafter, case, mode):
    least = 1.1 if (case, mode) == ("min-p", "tree") else 1.15  # of all cases the one that accepts least
    assert min(p_values(target, drafter, case, MODES[mode], least=least)) > 0.001


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["repetition-penalty", "processor", "everything"])
def test_sampling_is_exact_with_processors_that_read_the_text(target, drafter, case, mode):
    """A processor of the user's lets all rows gain their tokens side by side: of 500 rows one always has to wait."""
    least = 1.15 if case == "repetition-penalty" else 1.0
    assert min(p_values(target, drafter, case, MODES[mode], rows=500, samples=1_500, prompts=EVEN, least=least)) > 0.001


@pytest.mark.parametrize("mode", MODES)
def test_sampling_is_exact_with_rows_that_end_early(target, drafter, mode):
    assert min(p_values(target, drafter, "temperature", MODES[mode], eos=EOS)) > 0.001


@pytest.mark.parametrize(
    "case, options",
    [
        ("temperature", CHAIN),
        ("repetition-penalty", TREE),
        ("plain", EARLY),
        ("processor", TREE),
        ("everything", CHAIN),
    ],
    ids=str,
)
def test_sampling_is_exact_at_batch_size_1(target, pruned, case, options):
    """One row takes other code paths: no masks, other cache writes."""
    assert min(p_values(target, pruned, case, options, rows=1, samples=400, prompts=PROMPTS[1:])) > 0.001


def test_early_stopping_of_chains_keeps_the_distribution(target, pruned):
    assert min(p_values(target, pruned, "plain", EARLY)) > 0.001


@pytest.mark.parametrize(
    "case, options, rows, kind",
    [
        ("warpers", CHAIN, SAMPLES, {"markov_rank": 3}),
        ("plain", EARLY, SAMPLES, {"predict_from_anchor": False}),
        ("temperature", TREE, SAMPLES, {"markov_rank": 3}),
        ("repetition-penalty", CHAIN, 500, {"markov_rank": 3}),
    ],
    ids=str,
)
def test_sampling_is_exact_with_a_block_drafter(target, case, options, rows, kind):
    """Its drafts are drawn from one forward; with a low-rank head each knows the one before it."""
    drafter = block_drafter(target, block_size=4, **kind)
    prompts, samples = (PROMPTS, SAMPLES) if rows == SAMPLES else (EVEN, 1_500)
    assert min(p_values(target, drafter, case, options, rows, samples, prompts=prompts, least=1.1)) > 0.001


@pytest.mark.parametrize("case", ["plain", "repetition-penalty"])
def test_windows_that_follow_their_cost_keep_the_distribution(target, pruned, case, monkeypatch):
    """Two rows a call, so that they follow what is drafted: of the one draft that has room."""
    costs = Costs()
    for part, seconds in {"step": 0.5, "first": 0.2, "rest": 0.5, **{n: 5.0 + n for n in range(1, 8)}}.items():
        for _ in range(4):
            costs.add(part, seconds)
    monkeypatch.setattr(costs, "add", lambda part, seconds: None)
    monkeypatch.setattr(pair_ppow, "costs_of", lambda *args: costs)
    lengths, chain = set(), pair_ppow.draft

    def draft(*arguments):
        window = chain(*arguments)
        lengths.add(window.max_depth)
        return window

    monkeypatch.setattr(pair_ppow, "draft", draft)
    assert min(p_values(target, pruned, case, COST, rows=2, samples=800, prompts=EVEN, least=1.05)) > 0.001
    assert lengths == {0, 1}


# -- the power of the test ---------------------------------------------------------------------------------------------


def test_the_test_accepts_transformers_own_sampling(target):
    assert min(p_values(target, None, "warpers", None)) > 0.001
    assert min(p_values(target, None, "everything", None, prompts=EVEN)) > 0.001


def accept_always(window, target_probs, columns):
    size = window.draft_ids.shape[1]
    accepted = torch.full((len(window.tokens),), size)
    return accepted, window.depth, verifier_ppow.sample(target_probs[:, -1])


def test_the_test_rejects_accepting_always(target, pruned, monkeypatch):
    monkeypatch.setattr(verifier_ppow, "reject", accept_always)
    assert min(p_values(target, pruned, "plain", CHAIN)) < 1e-6


def test_the_test_rejects_drawing_from_p_after_a_rejection(target, pruned, monkeypatch):
    monkeypatch.setattr(acceptance_ppow, "residual", lambda p, q, rejected: p)
    assert min(p_values(target, pruned, "plain", CHAIN)) < 1e-6


def test_the_test_rejects_a_wrong_residual_behind_processors(target, pruned, monkeypatch):
    monkeypatch.setattr(acceptance_ppow, "residual", lambda p, q, rejected: p)
    assert min(p_values(target, pruned, "repetition-penalty", CHAIN, rows=500, samples=1_500, prompts=EVEN)) < 1e-6


def test_the_test_rejects_a_tree_that_leans_towards_its_drafts(target, pruned, monkeypatch):
    """Wrong on purpose: in one of ten cases the first drafted child stands without having been drawn."""
    right = verifier_ppow.follow

    def follow(window, choices):
        if window.max_depth == 0:  # the prompt's own token: no child to lean towards
            return right(window, choices)
        lean = torch.rand(len(choices)) < 0.1
        choices = choices.clone()
        choices[:, 0] = torch.where(lean, window.tokens[:, 1], choices[:, 0])
        return right(window, choices)

    monkeypatch.setattr(verifier_ppow, "follow", follow)
    assert min(p_values(target, pruned, "plain", TREE)) < 1e-6
