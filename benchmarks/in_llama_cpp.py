"""Runs in the environment of llama.cpp (PyPI's xllamacpp), which has no PPOW: answers of its server, greedily.

    python in_llama_cpp.py JOBS.json RESULTS.json

Jobs: {"target": file, "prompts": [[id, ...], ...], "max_new_tokens": N, "window": K, "drafters": [file, ...]}.
Results: {"version", "plain": {"texts"}, "drafters": [{"texts", "drafted", "accepted"} or {"error"}]}: the answers,
and of each how many tokens were drafted and accepted, by the server's own timings.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import xllamacpp as cpp


def run(jobs: dict, drafter: str | None) -> dict:
    """Every prompt, one after the other."""
    options = cpp.CommonParams()
    options.model.path = jobs["target"]
    options.n_ctx, options.n_parallel, options.verbosity = 1024, 1, 0
    options.cpuparams.n_threads = jobs["threads"]
    options.cache_type_k = options.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    options.fit_params = options.warmup = False
    if drafter:
        draft = options.speculative.draft
        options.speculative.types = [cpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
        draft.mparams.path = drafter
        draft.n_max, draft.n_min, draft.p_min = jobs["window"], 0, 0.0
        draft.cache_type_k = draft.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    server, found = cpp.Server(options), {"texts": [], "drafted": [], "accepted": []}
    for prompt in jobs["prompts"]:
        asked = {"prompt": prompt, "n_predict": jobs["max_new_tokens"], "temperature": 0.0, "ignore_eos": True}
        reply = server.handle_completions(asked | {"cache_prompt": False, "stream": False})
        if "choices" not in reply:
            raise RuntimeError(str(reply)[:500])
        found["texts"].append(reply["choices"][0]["text"])
        found["drafted"].append(reply["timings"].get("draft_n", 0))
        found["accepted"].append(reply["timings"].get("draft_n_accepted", 0))
    return found


def main() -> None:
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    found = {"version": importlib.metadata.version("xllamacpp"), "plain": run(jobs, None), "drafters": []}
    for drafter in jobs["drafters"]:
        try:
            found["drafters"].append(run(jobs, drafter))
        except RuntimeError as error:
            found["drafters"].append({"error": str(error)[:2000]})
        results.write_text(json.dumps(found))
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
