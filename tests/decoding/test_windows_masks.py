"""Windows, masks, acceptance rules and the slot cache as pure functions: hand-computed cases and laws."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, StaticCache

from ppow.acceptance_ppow import accepted_greedy, accepted_sampling, follow, reject, residual, sample
from ppow.cache_ppow import SlotCache, as_slot_cache
from ppow.drafting_ppow import DraftOptions, DraftWindow, _best_nodes
from ppow.masks_ppow import additive_mask, ancestors_of, window_allowed
from ppow.prompt_ppow import check_cache
from ppow.transcript_ppow import Acceptance

#        0
#      / | \
#     1  2  3
#    /|     |
#   4 5     6
PARENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 3]])
DEPTH = torch.tensor([[0, 1, 1, 1, 2, 2, 2]])
TOKENS = torch.tensor([[9, 10, 11, 12, 20, 21, 22]])


def tree_window(tokens=TOKENS):
    return DraftWindow(tokens, PARENTS, DEPTH, ancestors_of(PARENTS, 2), 2)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_ancestors_are_the_way_to_the_root():
    above = ancestors_of(PARENTS, 2)[0]
    ways = [above[node].nonzero().flatten().tolist() for node in range(7)]
    assert ways == [[0], [0, 1], [0, 2], [0, 3], [0, 1, 4], [0, 1, 5], [0, 3, 6]]


def test_ancestors_of_a_chain_are_causal():
    window = DraftWindow.chain(torch.tensor([[5, 6, 7, 8]]))
    assert torch.equal(window.ancestors[0], torch.ones(4, 4, dtype=torch.bool).tril())
    assert torch.equal(ancestors_of(window.parents, window.max_depth), window.ancestors)


def test_too_small_a_depth_cuts_the_way():
    assert not ancestors_of(PARENTS, 1)[0, 4, 0]
    assert ancestors_of(PARENTS, 5).equal(ancestors_of(PARENTS, 2))  # the root is its own parent: more does no harm


def test_window_sees_prefix_ancestors_and_itself():
    prefix = torch.tensor([[3] * 7])
    slots = 3 + torch.arange(7)[None]
    allowed = window_allowed(prefix, ancestors_of(PARENTS, 2), DEPTH, slots, view=10)[0, 0]
    expected = [
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 5],
        [0, 1, 2, 3, 6],
        [0, 1, 2, 3, 4, 7],
        [0, 1, 2, 3, 4, 8],
        [0, 1, 2, 3, 6, 9],
    ]
    assert [row.nonzero().flatten().tolist() for row in allowed] == expected


def test_sliding_window_counts_positions_not_slots():
    # node 6 stands at position 5 (prefix 3 + depth 2) in slot 9: with a window of 3 it sees positions 3, 4, 5
    prefix, slots = torch.tensor([[3] * 7]), 3 + torch.arange(7)[None]
    allowed = window_allowed(prefix, ancestors_of(PARENTS, 2), DEPTH, slots, view=10, sliding_window=3)[0, 0]
    seen = [row.nonzero().flatten().tolist() for row in allowed]
    assert seen[0] == [1, 2, 3]
    assert seen[1] == [2, 3, 4]
    assert seen[6] == [3, 6, 9]
    # a window of 2 no longer reaches the root from the leaves
    allowed = window_allowed(prefix, ancestors_of(PARENTS, 2), DEPTH, slots, view=10, sliding_window=2)[0, 0]
    assert allowed[6].nonzero().flatten().tolist() == [6, 9]


def test_rows_of_different_length_and_padding():
    window = DraftWindow.chain(torch.tensor([[1, 2], [1, 2]]))
    lengths = torch.tensor([[4, 4], [2, 2]])
    slots = lengths + torch.arange(2)
    valid = torch.tensor([[False, True, True], [True, True, True]])
    allowed = window_allowed(lengths, window.ancestors, window.depth, slots, 6, valid)[:, 0]
    assert [row.nonzero().flatten().tolist() for row in allowed[0]] == [[1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert [row.nonzero().flatten().tolist() for row in allowed[1]] == [[0, 1, 2], [0, 1, 2, 3]]


def test_a_forest_of_two_windows_with_prefixes_of_their_own():
    # two rollouts of two tokens over one text of 4: the first starts after 1 token, the second after 3
    prefix, depth = torch.tensor([[1, 1, 3, 3]]), torch.tensor([[0, 1, 0, 1]])
    parents = torch.tensor([[0, 0, 2, 2]])
    allowed = window_allowed(prefix, ancestors_of(parents, 1), depth, 4 + torch.arange(4)[None], 8)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in allowed] == [[0, 4], [0, 4, 5], [0, 1, 2, 6], [0, 1, 2, 6, 7]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_additive_mask_shuts_out_without_nan(dtype):
    mask = additive_mask(torch.tensor([[True, False], [False, False]]), dtype)
    assert mask.dtype == dtype
    probs = (torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=dtype) + mask).softmax(-1)
    assert probs.tolist() == [[1.0, 0.0], [0.5, 0.5]]  # a row that sees nothing stays finite


# -- trees -------------------------------------------------------------------------------------------------------------


def test_best_nodes_keeps_the_most_probable_and_renumbers():
    # level 1: candidates 1, 2, 3; level 2: 4, 5 under 1 and 6, 7 under 3
    tokens = torch.tensor([[10, 11, 12, 20, 21, 22, 23]])
    scores = torch.tensor([[-0.5, -3.0, -0.7, -0.9, -4.0, -1.0, -5.0]])
    parents = torch.tensor([[0, 0, 0, 1, 1, 3, 3]])
    window = _best_nodes(torch.tensor([9]), tokens, scores, parents, torch.tensor([1, 1, 1, 2, 2, 2, 2]), 2, nodes=4)
    assert window.tokens.tolist() == [[9, 10, 12, 20, 22]]
    assert window.parents.tolist() == [[0, 0, 0, 1, 2]]
    assert window.depth.tolist() == [[0, 1, 1, 2, 2]]
    assert torch.equal(window.ancestors, ancestors_of(window.parents, 2))


def test_best_nodes_prefers_the_parent_on_a_tie():
    # a certain child has its parent's score; keeping the child without the parent would break the tree
    tokens, scores = torch.tensor([[10, 11, 20, 21]]), torch.tensor([[-1.0, -2.0, -1.0, -9.0]])
    parents, levels = torch.tensor([[0, 0, 1, 1]]), torch.tensor([1, 1, 2, 2])
    window = _best_nodes(torch.tensor([9]), tokens, scores, parents, levels, 2, nodes=1)
    assert window.tokens.tolist() == [[9, 10]]


def test_best_nodes_per_row_and_fewer_candidates_than_nodes():
    tokens = torch.tensor([[10, 11], [12, 13]])
    scores = torch.tensor([[-1.0, -2.0], [-2.0, -1.0]])
    parents, levels = torch.zeros(2, 2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    window = _best_nodes(torch.tensor([8, 9]), tokens, scores, parents, levels, 1, nodes=1)
    assert window.tokens.tolist() == [[8, 10], [9, 13]]
    window = _best_nodes(torch.tensor([8, 9]), tokens, scores, parents, levels, 1, nodes=60)
    assert window.tokens.tolist() == [[8, 10, 11], [9, 12, 13]]


def test_best_nodes_keeps_every_parent_of_what_it_keeps():
    torch.manual_seed(3)
    width, depth = 3, 4
    for _ in range(50):
        scores, parents, levels = [torch.rand(2, width).log()], [torch.zeros(2, width, dtype=torch.long)], [1] * width
        first = 1
        for level in range(2, depth + 1):
            above = torch.arange(first, first + width)
            parents.append(above.repeat_interleave(width).expand(2, -1))
            scores.append(scores[-1][:, :width].repeat_interleave(width, 1) + torch.rand(2, width * width).log())
            first += width if level == 2 else width * width
            levels += [level] * width * width
        tokens = torch.randint(0, 50, (2, len(levels)))
        nodes = int(torch.randint(1, len(levels) + 1, ()))
        scores, parents, levels = torch.cat(scores, 1), torch.cat(parents, 1), torch.tensor(levels)
        window = _best_nodes(tokens[:, 0], tokens, scores, parents, levels, depth, nodes)
        parent_depth = window.depth.gather(1, window.parents)
        assert torch.equal(parent_depth[:, 1:], window.depth[:, 1:] - 1)
        assert (window.parents[:, 1:] < torch.arange(1, window.parents.shape[1])).all()


# -- following the target's choices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices, accepted, path, following",
    [
        # the choice after the root is not in the tree: only the target's own token
        ([1, 0, 0, 0, 0, 0, 0], 0, [0], 1),
        # root -> node 3 -> node 6 -> 7: nodes that do not lie side by side
        ([12, 0, 0, 22, 0, 0, 7], 2, [0, 3, 6], 7),
        # root -> node 1, whose children are 20 and 21, but 22 is chosen: node 6 has that token under another parent
        ([10, 22, 0, 0, 0, 0, 0], 1, [0, 1], 22),
        # a leaf at depth 1
        ([11, 5, 6, 5, 5, 5, 5], 1, [0, 2], 6),
    ],
)
def test_follow_walks_the_tree(choices, accepted, path, following):
    got, way, token = follow(tree_window(), torch.tensor([choices]))
    assert (got.item(), token.item()) == (accepted, following)
    assert way[0, : accepted + 1].tolist() == path
    assert way.shape == (1, 3)


def test_follow_needs_every_ancestor_to_match():
    # node 4 matches the choice after node 1, but node 1 itself was not chosen
    got, _, token = follow(tree_window(), torch.tensor([[11, 20, 3, 0, 0, 0, 0]]))
    assert (got.item(), token.item()) == (1, 3)


def test_follow_treats_rows_alone():
    window = DraftWindow.chain(torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]]))
    choices = torch.tensor([[2, 3, 4], [2, 9, 4], [9, 3, 4]])
    accepted, path, token = follow(window, choices)
    assert accepted.tolist() == [2, 1, 0]
    assert token.tolist() == [4, 9, 9]
    assert [row[: k + 1] for row, k in zip(path.tolist(), accepted.tolist())] == [[0, 1, 2], [0, 1], [0]]


# -- rejection sampling ------------------------------------------------------------------------------------------------


def test_residual_is_the_positive_part_of_the_difference():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]])
    weights = residual(p.clone(), q, torch.tensor([True, False, True]))
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.0, 0.0], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]))


def test_one_step_of_rejection_reproduces_p():
    """sum_x q(x) min(1, p/q) [x = y] + P(reject) residual(y) = p(y), for a draft vocabulary that misses tokens."""
    p, columns, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 2]), torch.tensor([0.7, 0.3])
    spread = torch.zeros(4)
    spread[columns] = q
    kept = torch.minimum(p, spread)
    rest = residual(p[None].clone(), spread[None], torch.tensor([True]))[0]
    torch.testing.assert_close(kept + (1 - kept.sum()) * rest / rest.sum(), p)


def sampled_chain(rows: int, q: torch.Tensor, columns: torch.Tensor, size: int) -> DraftWindow:
    probs = q.expand(rows, size, -1)
    ids = sample(probs)
    tokens = torch.cat((torch.zeros(rows, 1, dtype=torch.long), columns[ids]), 1)
    return DraftWindow.chain(tokens, ids, probs)


def test_reject_accepts_with_the_overlap_and_follows_with_p():
    torch.manual_seed(0)
    p, columns, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 3]), torch.tensor([0.5, 0.5])
    window = sampled_chain(40_000, q, columns, 2)
    accepted, path, following = reject(window, p.expand(40_000, 3, -1), columns)
    overlap = 0.2 + 0.4  # min(p, q) summed
    rates = torch.stack([(accepted == k).float().mean() for k in range(3)])
    expected = torch.tensor([1 - overlap, overlap * (1 - overlap), overlap**2])
    torch.testing.assert_close(rates, expected, rtol=0, atol=0.01)
    after_rejection = following[accepted < 2].bincount(minlength=4) / (accepted < 2).sum()
    torch.testing.assert_close(after_rejection, torch.tensor([0.25, 0, 0.75, 0]), rtol=0, atol=0.015)
    bonus = following[accepted == 2].bincount(minlength=4) / (accepted == 2).sum()
    torch.testing.assert_close(bonus, p, rtol=0, atol=0.015)
    assert torch.equal(path[0], torch.arange(3))


def test_reject_never_keeps_what_the_target_excludes_and_always_what_it_is_sure_of():
    torch.manual_seed(0)
    columns, q = torch.arange(3), torch.tensor([0.5, 0.5, 0.0])
    window = sampled_chain(2_000, q, columns, 1)
    accepted, _, following = reject(window, torch.tensor([0.0, 0.0, 1.0]).expand(2_000, 2, -1), columns)
    assert accepted.sum() == 0 and (following == 2).all()
    accepted, _, _ = reject(window, torch.tensor([0.5, 0.5, 0.0]).expand(2_000, 2, -1), columns)
    assert (accepted == 1).all()  # p = q: everything stands


def test_training_counts_what_decoding_accepts():
    torch.manual_seed(1)
    window, choices = DraftWindow.chain(torch.randint(2, (500, 5))), torch.randint(2, (500, 5))
    accepted, _, _ = follow(window, choices)
    assert torch.equal(accepted, accepted_greedy(window.tokens[:, 1:], choices[:, :-1]))
    assert accepted.unique().tolist() == [0, 1, 2, 3, 4]
    p, columns, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 3]), torch.tensor([0.5, 0.5])
    window = sampled_chain(500, q, columns, 3)
    torch.manual_seed(2)
    accepted, _, _ = reject(window, p.expand(500, 4, -1), columns)
    torch.manual_seed(2)
    coins = torch.rand(500, 3)  # the draws that reject() makes first
    found = accepted_sampling(q[window.draft_ids].log(), p[window.tokens[:, 1:]].log(), coins)
    assert torch.equal(accepted, found)
    assert accepted.unique().tolist() == [0, 1, 2, 3]


def test_sample_draws_from_the_weights_and_never_what_has_none():
    torch.manual_seed(0)
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75]).expand(50_000, -1)
    drawn = sample(probs).bincount(minlength=4) / 50_000
    torch.testing.assert_close(drawn, probs[0], rtol=0, atol=0.01)
    assert drawn[0] == drawn[2] == 0


# -- figures -----------------------------------------------------------------------------------------------------------


def test_acceptance_figures_by_hand():
    acceptance = Acceptance(drafted=[[3, 3, 1], [3]], accepted=[[3, 1, 0], [0]], gained=[[4, 2, 1], [1]])
    assert acceptance.verifications == 4
    assert acceptance.acceptance_length == 8 / 4
    # first drafts: 4 tried, 2 accepted; second: 2 tried (3 and 1 accepted), 1 accepted; third: 1 tried, 1 accepted
    assert acceptance.per_position() == [2 / 4, 1 / 2, 1 / 1]


def test_acceptance_before_any_verification():
    empty = Acceptance(drafted=[[]], accepted=[[]], gained=[[]])
    assert empty.verifications == 0 and empty.acceptance_length != empty.acceptance_length
    assert empty.per_position() == []


def test_per_position_stops_where_nothing_was_tried():
    assert Acceptance([[4, 4]], [[1, 0]], [[2, 1]]).per_position() == [0.5, 0.0]


# -- how to draft ------------------------------------------------------------------------------------------------------


def test_the_first_configuration_that_says_how_to_draft_wins():
    call, own = GenerationConfig(), GenerationConfig(window_size=7)
    assert DraftOptions.resolve(call, own) == DraftOptions(window_size=7)
    tree = GenerationConfig(tree_depth=3)
    assert DraftOptions.resolve(tree, own) == DraftOptions(tree_depth=3, tree_top_k=10, tree_nodes=60)
    fixed = DraftOptions(window_size=2, window_schedule="constant")
    assert DraftOptions.resolve(GenerationConfig(window_size=2), tree) == fixed
    own_tree = GenerationConfig(tree_depth=2, tree_top_k=4, tree_nodes=9)
    assert DraftOptions.resolve(tree, own_tree) == DraftOptions(tree_depth=3, tree_top_k=4, tree_nodes=9)
    assert DraftOptions.resolve() == DraftOptions(window_size=10)


# -- the slot cache ----------------------------------------------------------------------------------------------------


def entries(batch: int, count: int, start: int = 0) -> torch.Tensor:
    """(batch, 1, count, 1) keys that name their row and number: 100 * row + number."""
    return (100.0 * torch.arange(batch)[:, None] + start + torch.arange(count))[:, None, :, None]


def held(cache: SlotCache, row: int, count: int) -> list[float]:
    return cache.layers[0].keys[row, 0, :count, 0].tolist()


def test_windows_are_written_behind_each_row_and_kept_nodes_move_up():
    cache = SlotCache(1, capacity=4)  # grows on the way
    cache.update(entries(2, 3), entries(2, 3), 0)
    lengths = torch.tensor([3, 2])  # the second row counts two of its entries only
    cache.open_window(lengths[:, None] + torch.arange(4), 7)
    keys, values = cache.update(entries(2, 4, 10), entries(2, 4, 10), 0)
    assert keys.shape[-2] == 7
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 10, 11, 12, 13]
    assert keys[1, 0, :6, 0].tolist() == [100, 101, 110, 111, 112, 113]
    assert torch.equal(keys, values)
    cache.close_window()
    cache.keep(lengths, torch.tensor([[0, 2, 3], [0, 3, 0]]))
    assert held(cache, 0, 6) == [0, 1, 2, 10, 12, 13]
    assert held(cache, 1, 4) == [100, 101, 110, 113]


def test_one_row_writes_the_same_as_a_batch():
    single, double = SlotCache(1), SlotCache(1)
    for cache, batch in ((single, 1), (double, 2)):
        cache.update(entries(batch, 3), entries(batch, 3), 0)
        cache.open_window(torch.tensor([[3, 4]]).expand(batch, -1), 5)
        cache.update(entries(batch, 2, 10), entries(batch, 2, 10), 0)
    assert held(single, 0, 5) == held(double, 0, 5) == [0, 1, 2, 10, 11]


def test_stock_use_counts_like_a_dynamic_cache():
    ours, stock = SlotCache(1, capacity=2), DynamicCache()
    for start, count in ((0, 3), (3, 1), (4, 5)):
        expected = stock.update(entries(1, count, start), entries(1, count, start), 0)
        got = ours.update(entries(1, count, start), entries(1, count, start), 0)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_mask_sizes(2, 0) == stock.get_mask_sizes(2, 0)
    ours.crop(-4)
    stock.crop(-4)
    assert ours.get_seq_length() == stock.get_seq_length() == 5
    got, _ = ours.update(entries(1, 1, 50), entries(1, 1, 50), 0)
    assert got[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 50]
    with pytest.raises(ValueError, match="negative"):
        ours.crop(3)
    ours.reset()
    assert ours.get_seq_length() == 0


def test_a_dynamic_cache_is_copied_and_left_alone():
    stock = DynamicCache()
    stock.update(entries(1, 3), entries(1, 3), 0)
    ours = as_slot_cache(stock, 1, 16)
    ours.update(entries(1, 1, 3), entries(1, 1, 3), 0)
    assert held(ours, 0, 4) == [0, 1, 2, 3]
    assert stock.get_seq_length() == 3
    assert as_slot_cache(ours, 1, 16) is ours


def test_a_cache_that_forgot_keys_within_its_window_is_refused():
    config = LlamaConfig(num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=3)
    sliding = DynamicCache(config=config)
    keys = entries(1, 5)
    sliding.update(keys, keys, 0)
    slots = as_slot_cache(sliding, 1, 16)  # the two newest keys are all that a later token sees
    assert slots.get_seq_length() == 5
    torch.testing.assert_close(slots.layers[0].keys[:, :, 3:5], keys[:, :, 3:])
    sliding.layers[0].keys = keys[:, :, 4:]
    with pytest.raises(ValueError, match="holds 1 of 5 keys in layer 0"):
        check_cache(sliding, 5, torch.zeros(1, 1))


@pytest.mark.parametrize("filled", [False, True])
def test_a_static_cache_is_refused_even_when_empty(filled):
    static = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=8)
    if filled:
        static.update(entries(1, 3), entries(1, 3), 0)
    with pytest.raises(ValueError, match="StaticLayer.*DynamicCache"):
        check_cache(static, 3 if filled else 0, torch.zeros(1, 1))
