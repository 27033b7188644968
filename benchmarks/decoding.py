"""What a decoding cycle costs, and what that makes of an acceptance length.

    python -m benchmarks.decoding --shape llama-3.1-8b --output benchmarks/results/decoding-llama-3.1-8b.json
    python -m benchmarks.decoding --target tests/pair/target --drafter tests/pair/drafter
    python -m benchmarks.decoding --shape llama-3.1-8b --window-size 15 \
        --drafter-config '{"architecture": "block", "block_size": 16, "num_hidden_layers": 5}'

With `--shape` target and drafter have the shapes of a known pair and random weights. Every forward, cache move and
synchronisation is real; only which drafted tokens count as accepted is drawn from a seeded profile, so that an
acceptance length can be given (`--acceptance-length`) that random weights would never reach. With `--target` and
`--drafter` nothing is forced, and the prompts are real. All systems run in one process, one after the other; figures
are medians over repetitions, and speeds are compared within the run only.
"""

import argparse
import contextlib
import functools
import json
import statistics
import time
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LlamaConfig

from ppow import PPOWDrafter, draws_ppow, generation_ppow, streamed_ppow, verifier_ppow
from ppow.acceptance_ppow import count_accepted
from ppow.drafting_ppow import DraftOptions, what_was_drafted
from ppow.fast_path_ppow import FastPath, PairOfTwins
from ppow.training.loading import load_model, load_tokenizer
from ppow.training.prompts import first_turn, load_prompts
from ppow.training.smollm2 import PROMPTS
from ppow.transcript_ppow import Verdict
from ppow.verifier_ppow import Verifier

from .machine import copy_speed, matmul_speed, seconds_of, synchronize
from .pairs import SHAPES, SMALL, random_model, random_pair
from .report import add_output, facts, save

TREE = {"tree_depth": 7, "tree_top_k": 10, "tree_nodes": 60}


@dataclass
class System:
    """One way to decode: ``options`` go into the generation config, ``arguments`` to ``generate``."""

    name: str
    options: dict
    arguments: dict
    batch: int = 1
    forced: float | None = None  # acceptance length to force; None: whatever happens
    repeats: int | None = None
    fewest_weights: int = streamed_ppow.FEWEST_WEIGHTS  # of the drafter's matrices that are read in eight bits
    draws: bool = True  # with kernels for them, instead of torch's own


def main(argv=None) -> dict:
    arguments = parse(argv)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    if arguments.shape:
        target, *drafters = random_pair(arguments.shape, device, dtype, **json.loads(arguments.drafter_config))
    else:
        target = load_model(arguments.target, dtype=dtype).to(device).eval()
        drafters = [PPOWDrafter.from_pretrained(folder, dtype=dtype).to(device).eval() for folder in arguments.drafter]
    target.generation_config = GenerationConfig(pad_token_id=0)
    report = facts("decoding", arguments, argv, device=device, dtype=str(dtype).split(".")[-1]) | {
        "forced_acceptance": bool(arguments.shape),
        "machine": machine(target, drafters[0], device, dtype),
        "systems": [],
    }
    prompts = real_prompts(arguments, device) if arguments.target else random_prompts(target, arguments, device)
    for system in systems(arguments, device, dtype):
        for drafter in drafters if "PPOW" in system.name else drafters[:1]:
            with kernels_of(system):
                row = measure(system, target, drafter, prompts, arguments, device)
            report["systems"].append(row | ({"drafter": drafter.name_or_path} if drafters[1:] else {}))
            show(report["systems"][-1], report["systems"][0])
            save(report, arguments.output)  # whatever ends the run early, what was measured is kept
    if device == "cuda":
        report["verification"] = verification_costs(target, drafters[0], arguments.prompt)
        print("a verification of N nodes, replayed, ms:", report["verification"])
    save(report, arguments.output)
    return report


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, acceptance forced")
    parser.add_argument("--target", help="a real target instead, with --drafter")
    parser.add_argument("--drafter", nargs="+", help="one, or several to compare, each in every system of ours")
    parser.add_argument("--drafter-config", default="{}", help="JSON of fields for the drafter of a --shape")
    parser.add_argument("--prompts", help=".jsonl of prompts for a real pair; none: those of `ppow demo`")
    parser.add_argument("--acceptance-length", type=float, default=6.4, help="forced, bonus included")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--window-size", type=int, default=10, help="drafts of a chain")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate")
    parser.add_argument("--batches", default="1,2,4,8", help="batch sizes of the fast path")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="names, or parts of names, of systems to run; others are compared with the first",
    )
    parser.add_argument("--kernels", type=int, default=0, help="also list the kernels of a cycle that take longest")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    arguments = parser.parse_args(argv)
    if bool(arguments.shape) == bool(arguments.target and arguments.drafter):
        parser.error("give --shape, or --target and --drafter")
    if arguments.target and arguments.drafter_config != "{}":
        parser.error("--drafter-config is for the drafter of a --shape")
    return arguments


def random_prompts(target, arguments, device: str) -> list[torch.Tensor]:
    """One prompt (largest batch, P) of random tokens."""
    vocabulary = target.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = max(map(int, arguments.batches.split(",")))
    return [torch.randint(1, vocabulary, (rows, arguments.prompt), generator=generator).to(device)]


def real_prompts(arguments, device: str) -> list[torch.Tensor]:
    """First turns (largest batch, P), every row the same, in the target's chat template."""
    tokenizer = load_tokenizer(arguments.target)
    rows = max(map(int, arguments.batches.split(",")))
    prompts = load_prompts(arguments.prompts or str(PROMPTS))
    return [torch.tensor([first_turn(tokenizer, prompt)] * rows, device=device) for prompt in prompts]


def systems(arguments, device: str, dtype: torch.dtype) -> list[System]:
    """What is compared, stock ``generate()`` first."""
    length = arguments.acceptance_length if arguments.shape else None
    plain, fast = {"cuda_graphs": False}, {"cuda_graphs": True}
    chain, sampled = {"window_size": arguments.window_size}, {"do_sample": True}  # and of the 50 likeliest, the default
    chosen = [
        System("stock generate", {}, {}, repeats=2),
        System("prompt lookup (transformers)", {}, {"prompt_lookup_num_tokens": 10}, repeats=2),
        System("PPOW plain, chain", {**chain, **plain}, {}, forced=length),
        System("PPOW plain, tree", {**TREE, **plain}, {}, forced=length),
    ]
    if device == "cuda":
        for batch in map(int, arguments.batches.split(",")):
            chosen.append(System("PPOW fast, chain", {**chain, **fast}, {}, batch, length))
        chosen += [
            System(
                "PPOW fast, chain, drafter in 16 bits", {**chain, **fast}, {}, forced=length, fewest_weights=1 << 62
            ),
            System("PPOW fast, chain, sampled", {**chain, **fast, **sampled}, {}, forced=length),
            System(
                "PPOW fast, chain, sampled, torch's draws", {**chain, **fast, **sampled}, {}, 1, length, draws=False
            ),
            System("PPOW fast, chain, sampled, top_p 0.9", {**chain, **fast, **sampled, "top_p": 0.9}, {}, 1, length),
            System("PPOW fast, tree", {**TREE, **fast}, {}, forced=length),
            System("static cache, compiled", {}, {"cache_implementation": "static"}, repeats=3),
        ]
    if arguments.shape and arguments.shape.startswith("llama"):
        assistant = "a small Llama, transformers' assisted decoding"
        chosen.append(System(assistant, {}, {"assistant_model": (SMALL, device, dtype)}, repeats=2))
    whole = {system.name for system in chosen} & set(arguments.only)
    parts = set(arguments.only) - whole
    found = [s for s in chosen if s.name in whole or any(part in s.name for part in parts)]
    if not found:
        names = ", ".join(dict.fromkeys(system.name for system in chosen))
        raise ValueError(f"--only {' '.join(arguments.only)} is in no system's name; there are: {names}")
    return found


@contextlib.contextmanager
def kernels_of(system: System):
    """Let the system use the kernels that it names."""
    streamed_ppow.FEWEST_WEIGHTS = system.fewest_weights
    verifier_ppow.can_draw = draws_ppow.can_draw if system.draws else lambda logits: False
    try:
        yield
    finally:
        streamed_ppow.FEWEST_WEIGHTS = System.fewest_weights
        verifier_ppow.can_draw = draws_ppow.can_draw


def measure(system: System, target, drafter, prompts, arguments, device: str) -> dict:
    """Tokens per second of one system, and for ours what the parts of a cycle cost."""
    calls = dict(system.arguments)
    ours = "PPOW" in system.name
    if ours:
        calls["assistant_model"] = drafter
    elif isinstance(calls.get("assistant_model"), tuple):
        fields, *place = calls["assistant_model"]
        calls["assistant_model"] = random_model(LlamaConfig(**fields), *place)
    prompts = [ids[: system.batch] for ids in prompts]
    seconds, lengths, parts = [], [], {}
    repeats = min(system.repeats or arguments.repeats, arguments.repeats)
    vars(drafter).pop("_fast_paths", None)  # which was made under other settings, and the first run is to record
    for run in range(1 + repeats):
        torch.manual_seed(arguments.seed + run)
        seconds.append(sum(run_once(system, target, ids, calls, arguments.new, lengths) for ids in prompts))
    if ours:
        with timed_parts(parts, device):
            for ids in prompts:
                run_once(system, target, ids, calls, arguments.new, [])
        short = [run_once(system, target, prompts[0][:, :64], calls, 2, []) for _ in range(2 + repeats)][2:]
    speeds = [len(prompts) * system.batch * arguments.new / second for second in seconds[1:]]
    row = {
        "name": system.name,
        "batch": system.batch,
        "forced_acceptance_length": system.forced,
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_runs": speeds,
        "first_run_seconds": seconds[0],
    }
    if ours:
        row["acceptance_length"] = statistics.fmean(lengths[len(prompts) :])
        row["cycle_ms"] = {name: statistics.median(values) for name, values in parts.items()}
        row["two_token_call_ms"] = 1000 * statistics.median(short)
    if ours and arguments.kernels and device == "cuda":
        call = functools.partial(run_once, system, target, prompts[0], calls, arguments.new, [])
        cycles = arguments.new / row["acceptance_length"]
        row["kernel_us_per_cycle"] = kernels(call, cycles, arguments.kernels)
    return row


def kernels(call, cycles: float, count: int) -> dict[str, list[float]]:
    """The ``count`` kernels that take longest -> launches and microseconds of each in a cycle, prefill included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    table = {"all": [sum(e.count for e in events) / cycles, sum(e.self_device_time_total for e in events) / cycles]}
    for event in events[:count]:
        table[event.key[:80]] = [event.count / cycles, event.self_device_time_total / cycles]
    for name, (launches, microseconds) in table.items():
        print(f"    {launches:8.1f} launches {microseconds:9.1f} us  {name}")
    return table


def run_once(system: System, target, ids, calls: dict, new: int, lengths: list) -> float:
    """Seconds of one ``generate`` call that makes exactly ``new`` tokens a row."""
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": None, "eos_token_id": None}
    options |= {"pad_token_id": 0, "return_dict_in_generate": True}
    config = GenerationConfig(**{**options, **system.options})
    drafting = {name: value for name, value in system.options.items() if hasattr(DraftOptions, name)}
    force = forced(system.forced, system.options) if system.forced else contextlib.nullcontext()
    synchronize(ids.device)
    start = time.perf_counter()
    with force:
        out = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            **calls,
        )
    synchronize(ids.device)
    seconds = time.perf_counter() - start
    if out.sequences.shape[1] != ids.shape[1] + new:
        raise RuntimeError(f"{system.name}: {out.sequences.shape[1] - ids.shape[1]} new tokens, expected {new}.")
    if hasattr(out, "acceptance"):
        what_was_drafted(out, drafting)  # else the row's name would not say what ran
        lengths.append(out.acceptance.acceptance_length)
    return seconds


# -- forced acceptance -------------------------------------------------------------------------------------------------


def constant_rate(length: float, depth: int) -> float:
    """Per-position acceptance p with 1 + p + ... + p^depth = length."""
    if not 1 <= length <= depth + 1:
        raise ValueError(f"acceptance length {length} cannot come from windows of {depth} tokens.")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**j for j in range(depth + 1)) < length else (low, middle)
    return low


@contextlib.contextmanager
def forced(length: float, options: dict):
    """Let verifications accept as if every position were accepted with one probability, drawn on the device."""
    rate = constant_rate(length, options.get("tree_depth", options.get("window_size")))
    original, generation_ppow.Verifier = generation_ppow.Verifier, forced_verifier(rate)
    try:
        yield
    finally:
        generation_ppow.Verifier = original


@functools.cache  # graphs are kept by the class of their verifier
def forced_verifier(rate: float) -> type[Verifier]:
    """A verifier that accepts every position with this probability, and costs what the real one does."""

    class ForcedVerifier(Verifier):
        def __call__(self, window, logits):
            verdict = super().__call__(window, logits)  # at its real cost
            if window.max_depth == 0:
                return verdict
            batch, device = window.tokens.shape[0], window.tokens.device
            stands = torch.rand(batch, window.max_depth, device=device) < rate
            accepted = count_accepted(stands)
            # whichever nodes: moving them costs the same
            path = torch.arange(window.max_depth + 1, device=device).expand(batch, -1).contiguous()
            return Verdict(accepted, path, window.tokens.gather(1, path), verdict.scores, verdict.logits)

    return ForcedVerifier


# -- where the time goes -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def timed_parts(parts: dict, device: str):
    """Collect milliseconds per cycle of draft, verify, accept, keep and extend into ``parts``.

    Each part is synchronised, and a graph of its own on the fast path, so their sum exceeds an undisturbed cycle.
    """
    from ppow import block_ppow, drafting_ppow, graphs_ppow, pair_ppow, target_ppow, transcript_ppow

    drafters = (drafting_ppow.DrafterState, block_ppow.BlockState, graphs_ppow.GraphDrafter)
    targets = (target_ppow.TargetState, graphs_ppow.GraphTarget)
    places = [("draft", kind, name) for kind in drafters for name in ("chain", "tree")]
    places += [("extend", kind, "extend") for kind in drafters]
    places += [("verify", kind, "verify") for kind in targets] + [("keep", kind, "keep") for kind in targets]
    places += [("accept", generation_ppow.Verifier, "__call__"), ("commit", transcript_ppow.Transcript, "commit")]
    places = [place for place in places if place[2] in vars(place[1])]
    originals = [(kind, name, vars(kind)[name]) for _, kind, name in places]
    originals.append((pair_ppow.Pair, "whole_cycles", True))
    nested = []

    def timed(part, function):
        def run(*args, **kwargs):
            if nested:  # a fast state calling the plain one it extends
                return function(*args, **kwargs)
            nested.append(part)
            try:
                synchronize(device)
                start = time.perf_counter()
                result = function(*args, **kwargs)
                synchronize(device)
                parts.setdefault(part, []).append(1000 * (time.perf_counter() - start))
                return result
            finally:
                nested.pop()

        return run

    for (part, kind, name), (_, _, function) in zip(places, originals):
        setattr(kind, name, timed(part, function))
    pair_ppow.Pair.whole_cycles = False
    try:
        yield
    finally:
        for kind, name, function in originals:
            setattr(kind, name, function)


def machine(target, drafter, device: str, dtype: torch.dtype) -> dict:
    """What a cycle must move, and how fast this machine moves it."""
    embeddings = {id(target.get_input_embeddings().weight)}
    read = sum(p.numel() for p in target.parameters() if id(p) not in embeddings) * dtype.itemsize
    step = sum(p.numel() for name, p in drafter.named_parameters() if "embed" not in name and "fc." not in name)
    facts = {"target_bytes": read, "draft_step_bytes": step * dtype.itemsize}
    if device == "cuda":
        facts["copy_bytes_per_second"] = copy_speed(device)
        facts["matmul_bytes_per_second"] = matmul_speed(device, dtype)
    return facts


@torch.no_grad()
def verification_costs(target, drafter, kept: int) -> dict[int, float]:
    """Milliseconds of one verification of 1, 11 and 61 nodes behind ``kept`` slots, replayed."""
    from ppow.drafting_ppow import DraftWindow

    path = FastPath(target, drafter, PairOfTwins(target, drafter), 1, kept + 128)
    path.begin(None)
    state = path.target_state
    ids = torch.zeros(1, kept, dtype=torch.long, device=target.device)
    state.prefill(ids, None, torch.arange(kept, device=target.device)[None], None)
    costs = {}
    for nodes in (1, 11, 61):
        window = DraftWindow.chain(torch.zeros(1, nodes, dtype=torch.long, device=target.device))
        costs[nodes] = 1000 * seconds_of(lambda window=window: state.verify(window))
    return costs


# -- report ------------------------------------------------------------------------------------------------------------


def show(row: dict, stock: dict) -> None:
    parts = "  ".join(f"{name} {value:.2f}" for name, value in row.get("cycle_ms", {}).items())
    ratio = row["tokens_per_second"] / stock["tokens_per_second"]
    length = f"{row['acceptance_length']:5.2f}" if "acceptance_length" in row else "     "
    forced_note = " (forced)" if row["forced_acceptance_length"] else ""
    print(
        f"{row['name']:48s} batch {row['batch']}  {row['tokens_per_second']:8.1f} tokens/s  {ratio:6.2f}x  "
        f"acceptance length {length}{forced_note}  {parts}"
        + (f"  two tokens {row['two_token_call_ms']:.1f} ms" if "two_token_call_ms" in row else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()
