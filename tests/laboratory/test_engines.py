"""The engines' table, without an engine: what counts as equal, and what the docs show."""

import json

import pytest

from benchmarks import engines
from ppow import PPOWConfig
from ppow.training.export_formats import refusals

COUNTS = {"drafts": 3, "accepted": 4, "per_position": [3, 1, 0, 0, 0]}
VARIANT = engines.VARIANTS[0]._asdict()
EQUAL = {"vllm": engines.PROMPTS, "ours": engines.PROMPTS}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"vllm": {**COUNTS, "drafts": 4}}, False),
        ({"vllm": {**COUNTS, "per_position": [2, 2, 0, 0, 0]}}, False),
        ({"texts": {**EQUAL, "vllm": engines.PROMPTS - 1}}, False),
        ({"vllm": {"error": "RuntimeError: no such weight"}}, False),
    ],
)
def test_a_row_holds_where_texts_and_counts_are_equal(changes, expected):
    row = {"variant": VARIANT, "ours": COUNTS, "vllm": dict(COUNTS), "texts": EQUAL, **changes}
    assert engines.holds(row) is expected
    shown = engines.table({"variants": [row]})
    assert ("the same" in shown) is expected
    assert engines.holds({"variant": VARIANT, "refused": "why"})


def test_llama_cpps_rows_are_compared_answer_by_answer():
    counts = {"drafted": [10, 5], "accepted": [4, 3]}
    row = {"variant": VARIANT, "ours": counts, "llama_cpp": dict(counts)}
    row["texts"] = {"llama_cpp": engines.PROMPTS, "ours": engines.PROMPTS}
    assert engines.holds(row) and "15 tokens | 7 | the same" in engines.table({"variants": [row]})
    assert not engines.holds({**row, "llama_cpp": {"drafted": [5, 10], "accepted": [3, 4]}})


def test_at_least_twelve_variants_are_run_and_the_refused_ones_are_named():
    targets = {family: engines.make_target(family) for family in ("Llama", "Qwen2", "Qwen3")}
    assert {variant.family for variant in engines.VARIANTS} == {*targets, "pair"}
    refused = set()
    in_vllm = [variant for variant in engines.VARIANTS if variant.family in targets]
    for variant in in_vllm:
        fields = {"draft_vocab_size": engines.D, **variant.fields}
        config = PPOWConfig.from_target(targets[variant.family].config, **fields)
        if refusals(config, variant.form):
            refused.add(str(variant))
    assert len(in_vllm) - len(refused) >= 24 and len(refused) == 3


def test_the_docs_show_the_summary_that_the_command_wrote():
    page = engines.PAGE.read_text(encoding="utf-8")
    found = page.partition(engines.START)[2].partition(engines.END)[0]
    written = engines.SUMMARY.exists()  # without one no table stands there
    assert found == (engines.table(json.loads(engines.SUMMARY.read_text())) if written else "")
