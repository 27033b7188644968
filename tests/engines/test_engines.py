"""Every export in the engine that reads it: ``make engines``, which builds the environments of both.

The variants are benchmarks/engines.py's. In vLLM the greedy texts are plain vLLM's, token for token, and it drafts as
often and accepts as much at every position as this package's loop in transformers, float32. llama.cpp's server says of
each answer how much it drafted and accepted. What an engine cannot run is refused at export.
"""

import functools

import pytest

from benchmarks import engines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(3600)]
REFUSED = {
    "Llama, vllm, fc_norm and norm_before_fc": "others apply the two in the other order",
    "Llama, vllm, biases on q, k, v": "the engines put biases on o_proj too, or none anywhere",
    "Llama, speculators, narrower": "speculators has one width",
    "pair, gguf, 2 layers": "llama.cpp has one",
    "pair, gguf, norms on q and k": "llama.cpp has no norms on q and k",
    "pair, gguf, 4 taps": "llama.cpp reads three",
    "pair, gguf, tap L": "llama.cpp keeps what enters a block alone",
    "pair, gguf, fc_norm": "llama.cpp has no such norm",
    "pair, gguf, norm_output": "llama.cpp feeds raw states back",
}


@functools.cache
def rows(family: str) -> dict[str, dict]:
    """Every variant of a family, run once: by its name."""
    engine = "llama-cpp" if family == "pair" else "vllm"
    if engines.python(engine) is None:
        pytest.fail(f"no environment with {engine}: run `make engines`, or name the folder of both with PPOW_ENGINES")
    made = engines.run([variant for variant in engines.VARIANTS if variant.family == family])
    return {str(engines.Variant(**row["variant"])): row for row in made}


@pytest.mark.parametrize("variant", engines.VARIANTS, ids=str)
def test_the_engine_writes_the_same_and_accepts_the_same(variant):
    row = rows(variant.family)[str(variant)]
    if str(variant) in REFUSED:
        assert REFUSED[str(variant)] in row["refused"]
        return
    assert "refused" not in row, row["refused"]
    engine = "llama_cpp" if variant.form == "gguf" else "vllm"
    assert "error" not in row[engine], row[engine]["error"]
    assert row["texts"] == {engine: engines.PROMPTS, "ours": engines.PROMPTS}
    for name in ("drafted", "accepted") if engine == "llama_cpp" else ("drafts", "accepted", "per_position"):
        assert row[engine][name] == row["ours"][name], name
    if engine == "vllm":
        assert row["ours"]["accepted"] > row["ours"]["drafts"] / 4  # it drafts something
        assert row["vllm"]["drafted"] == engines.WINDOW * row["vllm"]["drafts"]
    else:
        assert sum(row["ours"]["accepted"]) > 0
    assert engines.holds(row)
