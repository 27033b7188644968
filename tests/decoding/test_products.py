"""Products of few rows on a CPU: the same numbers in either order, in the order that was faster, and no trace after."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaForCausalLM

from ppow import PPOWConfig, PPOWDrafter, products_ppow
from ppow.products_ppow import FEWEST_WEIGHTS, MOST_ROWS, few_rows, swapped

WIDE = FEWEST_WEIGHTS // 256


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """No product has been measured, and small models count; -> those that are."""
    chosen = {}
    monkeypatch.setattr(products_ppow, "FEWEST_IN_ALL", 0)
    monkeypatch.setattr(products_ppow, "_CHOSEN", chosen)
    return chosen


@pytest.fixture
def faster(monkeypatch):
    """Says which order is faster."""

    def say(ours: bool) -> None:
        monkeypatch.setattr(products_ppow, "_measure", lambda weights, rows: ours)

    return say


@pytest.fixture
def orders(monkeypatch):
    """The rows of every product that was computed in our order."""
    seen = []
    monkeypatch.setattr(products_ppow, "swapped", lambda x, w: seen.append(len(x)) or swapped(x, w))
    return seen


@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_both_orders_give_the_same_numbers(rows):
    x, weight = torch.randn(rows, 40, dtype=torch.float64), torch.randn(30, 40, dtype=torch.float64)
    found = swapped(x, weight)
    assert found.is_contiguous()
    torch.testing.assert_close(found, linear(x, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3,), (), (1, MOST_ROWS), (1, MOST_ROWS + 1), (0, 4)])
def test_a_layer_gives_what_it_gave(shape, bias, faster, orders):
    faster(True)
    layer, x = nn.Linear(256, WIDE, bias=bias), torch.randn(*shape, 256)
    with torch.no_grad():
        expected = layer(x)
        with few_rows(layer):
            found = layer(x)
    rows = x.numel() // 256
    assert orders == ([rows] if 0 < rows <= MOST_ROWS else [])
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_the_order_that_was_slower_is_not_taken(faster, orders):
    faster(False)
    layer = nn.Linear(256, WIDE)
    with torch.no_grad(), few_rows(layer):
        assert torch.equal(layer(torch.ones(3, 256)), linear(torch.ones(3, 256), layer.weight, layer.bias))
    assert orders == []


@pytest.mark.parametrize("ratio, ours", [(0.5, True), (0.89, True), (0.91, False), (2.0, False)])
def test_what_is_clearly_faster_by_the_clock_is_chosen(ratio, ours, monkeypatch):
    """By hand: the library's order takes a second for each weight, ours ``ratio``."""
    now = [0.0]

    def taking(seconds):
        return lambda x, weight: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(products_ppow, "linear", taking(1.0))
    monkeypatch.setattr(products_ppow, "swapped", taking(ratio))
    monkeypatch.setattr(products_ppow.time, "perf_counter", lambda: now[0])
    assert products_ppow._measure([torch.zeros(2, 2)] * 3, rows=4) is ours


def test_a_shape_is_measured_once_for_each_number_of_rows_and_threads(measured, monkeypatch):
    calls = []
    monkeypatch.setattr(products_ppow, "_measure", lambda weights, rows: calls.append((len(weights), rows)) or True)
    model = nn.Sequential(nn.Linear(256, WIDE), nn.ReLU(), nn.Linear(WIDE, 256), nn.ReLU(), nn.Linear(256, WIDE))
    with torch.no_grad():
        for rows in (2, 2, 5):
            with few_rows(model):
                model(torch.randn(rows, 256))
    shapes = 2 if WIDE != 256 else 1
    assert len(calls) == sum(map(len, measured.values())) == 2 * shapes
    assert {rows for _, rows in calls} == {2, 5}
    assert sum(count for count, rows in calls if rows == 2) == 3  # every layer's weight is among those measured on
    assert {key[2] for key in measured} == {torch.get_num_threads()}


def test_only_plain_layers_of_some_size_are_touched(faster, orders):
    class Other(nn.Linear):
        pass

    faster(True)
    small, other, double = nn.Linear(8, 8), Other(256, WIDE), nn.Linear(256, WIDE).double()
    wrapped, strided = nn.Linear(256, WIDE), nn.Linear(256, WIDE)
    wrapped.forward = lambda x: x
    strided.weight.data = torch.randn(256, WIDE).T
    model = nn.ModuleList([small, other, double, wrapped, strided])
    before = [dict(vars(layer)) for layer in model]
    with torch.no_grad(), few_rows(model):
        assert [dict(vars(layer)) for layer in model] == before
        small(torch.ones(2, 8)), other(torch.ones(2, 256)), double(torch.ones(2, 256).double())
    assert orders == []


def test_small_models_are_left_alone(faster, orders, monkeypatch):
    faster(True)
    layers = [nn.Linear(256, WIDE) for _ in range(2)]
    for least, touched in ((2 * 256 * WIDE, True), (2 * 256 * WIDE + 1, False)):
        monkeypatch.setattr(products_ppow, "FEWEST_IN_ALL", least)
        with few_rows(*layers):
            assert ("forward" in vars(layers[0])) is touched


def test_with_gradients_or_autocast_a_layer_is_the_librarys(faster, orders):
    faster(True)
    layer = nn.Linear(256, WIDE)
    with few_rows(layer):
        layer(torch.ones(2, 256)).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.ones(2, 256)).dtype == torch.bfloat16
    assert layer.weight.grad is not None and orders == []


def test_nothing_stays_after_an_error_or_a_call_within_a_call(faster):
    faster(True)
    layer = nn.Linear(256, WIDE)
    with few_rows(layer), few_rows(layer, layer):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
    with pytest.raises(KeyError), few_rows(layer):
        raise KeyError
    assert "forward" not in vars(layer)


def test_another_thread_keeps_the_librarys_order(faster, orders):
    """Threads that use the same model meanwhile see nothing of it, and calls in two threads share their layers."""
    faster(True)
    layer, x, found = nn.Linear(256, WIDE), torch.randn(2, 256), []
    inside, go_on = threading.Event(), threading.Event()

    def plain():
        with torch.no_grad():
            found.append(layer(x))

    def call():
        with torch.no_grad(), few_rows(layer):
            inside.set()
            go_on.wait(60)
            found.append(layer(x))

    caller = threading.Thread(target=call)
    caller.start()
    inside.wait(60)
    other = threading.Thread(target=plain)
    other.start()
    other.join()
    assert orders == []
    with torch.no_grad(), few_rows(layer):
        layer(x)
    assert orders == [2] and "forward" in vars(layer)
    go_on.set()
    caller.join()
    assert orders == [2, 2] and "forward" not in vars(layer)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("ours", [True, False])
def test_generate_gives_the_targets_own_answer_in_either_order(ours, faster, orders, tiny_config, monkeypatch):
    monkeypatch.setattr(products_ppow, "FEWEST_WEIGHTS", 1)
    torch.manual_seed(0)
    target = LlamaForCausalLM(tiny_config).eval()
    target.generation_config.eos_token_id = None
    drafter = PPOWDrafter(PPOWConfig.from_target(tiny_config)).eval()
    ids = torch.randint(1, tiny_config.vocab_size, (1, 9))
    expected = target.generate(ids, max_new_tokens=24, do_sample=False)
    faster(ours)
    assert torch.equal(target.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=drafter), expected)
    assert (set(orders) >= {1, drafter.generation_config.window_size + 1}) is ours
    assert not any("forward" in vars(module) for module in (*target.modules(), *drafter.modules()))
