"""Runs in the environment of vLLM, which has no PPOW: greedy answers to the same prompts, plain and with drafters.

    python in_vllm.py JOBS.json RESULTS.json

Jobs: {"target": folder, "prompts": [[id, ...], ...], "max_new_tokens": N, "window": K, "drafters": [folder, ...],
"together": rows at once}. Results: {"version", "plain": {"tokens", "seconds"}, "drafters": [{"tokens", "seconds",
"drafts", "drafted", "accepted", "per_position"} or {"error"}]}: ids of the answers, and vLLM's own counters.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # counters and failures stay in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

COUNTERS = {  # of vLLM's metrics, pooled over requests
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "per_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}


def counters(llm) -> dict:
    """vLLM's counters of speculative decoding so far, of this process."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    values = {}
    for name, metric in COUNTERS.items():
        if metric in found:
            values[name] = list(found[metric].values) if hasattr(found[metric], "values") else found[metric].value
    return values


def run(jobs: dict, drafter: str | None) -> dict:
    """Answer every prompt; with the counters of this run where there is a drafter."""
    from vllm import LLM, SamplingParams

    options = {}
    if drafter:
        options["speculative_config"] = {"method": "eagle3", "model": drafter, "num_speculative_tokens": jobs["window"]}
    llm = LLM(
        jobs["target"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=jobs["max_model_len"],
        max_num_seqs=jobs["together"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        async_scheduling=False,  # it runs ahead of what is known, and counts windows that begin behind the end
        **options,
    )
    greedy = SamplingParams(temperature=0, max_tokens=jobs["max_new_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in jobs["prompts"]]
    llm.generate(prompts[:1], greedy, use_tqdm=False)  # warm-up
    before, begun = counters(llm), time.perf_counter()
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    seconds = time.perf_counter() - begun
    result = {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "seconds": seconds}
    if drafter:
        after = counters(llm)
        for name, value in after.items():
            old = before.get(name, [0] * len(value) if isinstance(value, list) else 0)
            result[name] = [a - b for a, b in zip(value, old)] if isinstance(value, list) else value - old
        if "per_position" in result:
            result["per_position"] = result["per_position"][: jobs["window"]]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return result


def main() -> None:
    import vllm

    jobs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    found = {"version": vllm.__version__, "plain": run(jobs, None), "drafters": []}
    for drafter in jobs["drafters"]:
        try:
            found["drafters"].append(run(jobs, drafter))
        except Exception as error:  # one drafter's failure is a line of the table, and the others are tried
            found["drafters"].append({"error": f"{type(error).__name__}: {error}"[:2000]})
        results.write_text(json.dumps(found))
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
