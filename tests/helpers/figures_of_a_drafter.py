"""A metrics.json as `ppow evaluate` writes it, with figures that are easy to find on a card."""

FIGURES = {
    "prompts": 2,
    "samples": 2,
    "acceptance_length": 2.5,
    "acceptance_length_95": [2.25, 2.75],
    "acceptance_length_without_loops": None,
    "loops": 2,
    "per_position": [0.75, 0.5],
    "tokens_per_second": 150.0,
    "plain_tokens_per_second": 100.0,
    "speedup": 1.5,
    "speedup_95": [1.25, 1.75],
    "identical": 2,
    "gain": {"acceptance_length": 0.25, "acceptance_length_95": [-0.125, 0.5]},
}
METRICS = {
    "results": {"gsm8k T=0": FIGURES, "gsm8k T=1": {**FIGURES, "per_position": [0.25]}},
    "baseline": {"gsm8k T=0": {**FIGURES, "acceptance_length": 2.25}},
    "drafting": {"window_size": 10, "tree_nodes": None},
    "argv": ["ppow", "evaluate", "--drafter", "stage2"],
    "config": {"baseline": "stage1", "dtype": "float32", "max_new_tokens": 64, "repetitions": 1, "warmup": 3},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": {"cpu": "a CPU", "torch_threads": 2, "gpus": []},
}
