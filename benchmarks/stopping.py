"""Which rule ends windows best here: fixed lengths, a threshold, GammaTune, GammaTune+, measured cost, a learned head.

    python -m benchmarks.stopping --limit 4 --threads 2 --output benchmarks/results/stopping-cpu.json --plot X.png
    python -m benchmarks.stopping --path fast --dtype bfloat16 --prompts gsm8k.jsonl,humaneval.jsonl

Without names it takes SmolLM2-135M-Instruct and the drafter in bundled/. Every system answers every prompt; they take
turns prompt by prompt, in an order that moves on by one from turn to turn, so that the machine's drift hits all alike.
A speedup is stock generate's seconds per token over the system's, of the same prompt and turn; the table shows its
median, quartiles, least and most. One answer of each system comes before that, untimed: it warms up, measures the costs
that cost-aware windows follow, and on the fast path records the graphs of the first lengths (of the others when they
first occur). Where the drafter has a confidence head, "cost-aware" does without it, and "learned" is the same with it.
"""

import argparse
import statistics

import torch

from ppow import PPOWDrafter
from ppow.drafting_ppow import call_config, what_was_drafted
from ppow.training.evaluate import timed
from ppow.training.loading import load_model, load_tokenizer
from ppow.training.prompts import first_turn, prompt_sets, sampling_options
from ppow.training.smollm2 import PROMPTS, demo_pair

from .report import add_output, facts, save

STOCK, LEARNED = "plain generate", "learned"
FIXED = (1, 2, 3, 5, 7, 10)


def main(argv=None) -> dict:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = (arguments.target, arguments.drafter) if arguments.target else demo_pair()
    dtype = getattr(torch, arguments.dtype)
    tokenizer = load_tokenizer(given[0])
    target = load_model(given[0], dtype=dtype).to(device).eval()
    drafter = PPOWDrafter.from_pretrained(given[1], dtype=dtype).to(device).eval()
    sets = prompt_sets(arguments.prompts.split(",") if arguments.prompts else [str(PROMPTS)], None, arguments.limit)
    domains = {
        name: [torch.tensor([first_turn(tokenizer, prompt)], device=device) for prompt in prompts]
        for name, prompts in sets.items()
    }
    report = facts("stopping", arguments, argv, without=("output", "plot"), device=device) | {"parts": []}
    for temperature in map(float, arguments.temperatures.split(",")):
        for domain, prompts in domains.items():
            part = {"domain": domain, "temperature": temperature, "prompts": len(prompts)}
            part["systems"] = measure(target, drafter, prompts, temperature, arguments)
            report["parts"].append(part)
            print(table(part), flush=True)
            save(report, arguments.output)  # whatever ends the run early, what was measured is kept
    if arguments.plot:
        plot(report["parts"], arguments.plot)
    return report


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="with --drafter; none: SmolLM2-135M-Instruct and the bundled drafter")
    parser.add_argument("--drafter")
    parser.add_argument("--prompts", help="comma separated files, one domain each; none: those of `ppow demo`")
    parser.add_argument("--limit", type=int, help="prompts of each; none: all")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer, at most")
    parser.add_argument("--repeats", type=int, default=3, help="turns of all systems over each prompt")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--window", type=int, default=10, help="upper bound of the lengths that follow a rule")
    parser.add_argument("--threshold", type=float, default=0.4, help="joint draft probability that ends a chain")
    parser.add_argument("--path", choices=("plain", "fast"), default="plain")
    parser.add_argument("--only", help="comma separated parts of names of systems (stock generate always runs)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="draw the speedups into this file")
    add_output(parser)
    arguments = parser.parse_args(argv)
    if bool(arguments.target) != bool(arguments.drafter):
        parser.error("give both --target and --drafter, or neither")
    return arguments


def systems(arguments, head: bool) -> dict[str, dict | None]:
    """What is compared: name -> drafting options; None is stock ``generate``. ``head``: of the drafter's confidence."""
    size, threshold = {"window_size": arguments.window}, {"draft_threshold": arguments.threshold}
    fast = arguments.path == "fast"
    none = {} if fast else {"draft_threshold": 0.0}  # instead of the drafter's own
    chosen = {f"window {k}": {"window_size": k, "window_schedule": "constant", **none} for k in FIXED}
    if not fast:  # where nothing of a window is read before it is verified
        chosen["threshold"] = {**size, **threshold, "window_schedule": "constant"}
    chosen["heuristic"] = {**size, **none, "window_schedule": "heuristic"}
    chosen["gammatune"] = {**size, **none, "window_schedule": "gammatune"}
    if not fast:
        chosen["gammatune+"] = {**size, **threshold, "window_schedule": "gammatune"}
    chosen["cost-aware"] = {**size, "window_schedule": "cost"}
    if head and not fast:
        chosen[LEARNED] = chosen["cost-aware"]
    path = {"cuda_graphs": fast}
    only = arguments.only.split(",") if arguments.only else [""]
    kept = {name: options | path for name, options in chosen.items() if any(part in name for part in only)}
    return {STOCK: None, **kept}


def measure(target, drafter, prompts: list[torch.Tensor], temperature: float, arguments) -> list[dict]:
    """All systems over all prompts, in turns: -> the figures of each."""
    base = call_config(target.generation_config, **sampling_options(temperature), max_new_tokens=arguments.new)
    head = drafter.config.confidence_head
    compared = systems(arguments, head)

    def answer(name: str, ids: torch.Tensor, seed: int):
        """-> tokens, seconds per token, the acceptance (None of stock ``generate``)."""
        options = compared[name]
        if options is None:
            config, more = base, {}
        else:
            config = call_config(base, **options, return_dict_in_generate=True)
            more = {"assistant_model": drafter}
        drafter.config.confidence_head = head and name == LEARNED
        mask = torch.ones_like(ids)
        out, seconds = timed(target, seed, ids, attention_mask=mask, generation_config=config, **more)
        tokens = (out if options is None else out.sequences)[0, ids.shape[1] :].tolist()
        if options is not None:
            what_was_drafted(out, options)  # else the row's name would not say what ran
        return tokens, seconds / len(tokens), None if options is None else out.acceptance

    names = list(compared)
    for name in names:
        answer(name, prompts[0], arguments.seed)
    found: dict[str, list] = {name: [] for name in names}
    for turn in range(arguments.repeats):
        for number, ids in enumerate(prompts):
            first = (turn * len(prompts) + number) % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(answer(name, ids, arguments.seed + turn))
    drafter.config.confidence_head = head
    return [figures(name, found[name], found[STOCK]) for name in names]


def figures(name: str, answers: list, stock: list) -> dict:
    """Of one system: its speedups over stock ``generate``, answer by answer, and what its windows were."""
    speedups = [theirs[1] / ours[1] for ours, theirs in zip(answers, stock)]
    seconds = [spent for _, spent, _ in answers]
    row = {"name": name, "milliseconds_per_token": 1000 * statistics.median(seconds)}
    if answers[0][2] is None:
        return row
    row |= {"speedup": statistics.median(speedups), "speedup_quartiles": quartiles(speedups), "speedup_runs": speedups}
    gained = [tokens for _, _, acceptance in answers for tokens in acceptance.gained[0]]
    drafted = [drafts for _, _, acceptance in answers for drafts in acceptance.drafted[0]]
    row["acceptance_length"] = statistics.fmean(gained or [1])
    row["drafts_per_window"] = statistics.fmean(drafted or [0])
    row["lengths"] = {str(k): drafted.count(k) for k in sorted(set(drafted))}
    row["same_tokens"] = sum(ours[0] == theirs[0] for ours, theirs in zip(answers, stock))
    return row | {"answers": len(answers)}


def quartiles(values: list[float]) -> list[float]:
    """First and third."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def table(part: dict) -> str:
    """One domain at one temperature."""
    stock, *rows = part["systems"]
    lines = [f"{part['domain']} T={part['temperature']:g}, {stock['milliseconds_per_token']:.2f} ms a token by {STOCK}"]
    lines.append(
        f"{'':15s} {'speedup':>8s} {'quartiles':>13s} {'range':>13s} {'length':>7s} {'drafts':>7s} {'same':>7s}"
    )
    for row in sorted(rows, key=lambda row: -row["speedup"]):
        low, high = row["speedup_quartiles"]
        least, most = min(row["speedup_runs"]), max(row["speedup_runs"])
        same = f"{row['same_tokens']}/{row['answers']}" if part["temperature"] == 0 else "-"
        lines.append(
            f"{row['name']:15s} {row['speedup']:7.2f}x {low:6.2f}-{high:<6.2f} {least:6.2f}-{most:<6.2f} "
            f"{row['acceptance_length']:7.2f} {row['drafts_per_window']:7.2f} {same:>7s}"
        )
    return "\n".join(lines) + "\n"


def plot(parts: list[dict], file: str) -> None:
    """Speedups with quartiles, a panel for each domain and temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(parts), figsize=(1.5 + 3.5 * len(parts), 4.5), sharey=True, squeeze=False)
    for axis, part in zip(axes[0], parts):
        rows = part["systems"][:0:-1]
        middle = [row["speedup"] for row in rows]
        spread = [[abs(m - row["speedup_quartiles"][side]) for m, row in zip(middle, rows)] for side in (0, 1)]
        axis.errorbar(middle, range(len(rows)), xerr=spread, fmt="o", capsize=3)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axis.set_title(f"{part['domain']}, T={part['temperature']:g}")
        axis.set_xlabel(f"times as fast as {STOCK}")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
