"""One pair, four ways, side by side: plain transformers and PPOW in it, plain vLLM and vLLM with the drafter.

    python -m benchmarks.serving --threads 2     (needs `make engines`; the demo's pair and prompts)

The same prompts, greedy, one request at a time, chains of ``--window-size`` drafts. transformers is measured by
``ppow evaluate``, vLLM by ``ppow evaluate --endpoint`` from its own counters, once served plain and once with the
drafter that ``ppow export --format vllm`` wrote. The summary is benchmarks/results/serving.json, and the table of
docs/serve.md is written from it. The servers are ended afterwards.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ppow.training import evaluate
from ppow.training.config import EvaluateConfig, ExportConfig
from ppow.training.convert import export_drafter
from ppow.training.smollm2 import PROMPTS

from .engines import PAGE, ROOT, python
from .pairs import add_pair, parse_with_pair
from .report import add_output, facts, write

SUMMARY = ROOT / "benchmarks" / "results" / "serving.json"
START, END = "<!-- written by python -m benchmarks.serving -->\n", "<!-- serving end -->"
STARTED = 600  # seconds that a server may take to answer


def main(argv=None) -> dict:
    arguments = parse(argv)
    interpreter = python()
    if interpreter is None:
        raise SystemExit("no environment with vLLM: make engines, or name its python with PPOW_ENGINES")
    target, drafter = arguments.target, arguments.drafter
    common = {
        "prompts": arguments.prompts.split(","),
        "limit": arguments.limit,
        "temperatures": [0.0],
        "max_new_tokens": arguments.max_new_tokens,
        "warmup": 1,
        "seed": arguments.seed,
    }
    version = subprocess.run(
        [interpreter, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    names = {"target": Path(target).name, "drafter": Path(drafter).name}  # not where they lie on this machine
    report = facts("serving", arguments, argv, vllm=version, **names) | {"ways": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export_drafter(ExportConfig(drafter=drafter, format="vllm", target=target, out=str(folder / "vllm")))
        evaluate.main(
            EvaluateConfig(
                target=target,
                drafter=drafter,
                output_dir=str(folder / "ours"),
                window_size=arguments.window_size,
                draft_threshold=0.0,  # an engine drafts whole windows
                threads=arguments.threads,
                reference=False,
                **common,
            )
        )
        ours = figures(folder / "ours")
        plain = {"tokens_per_second": ours.pop("plain_tokens_per_second")}
        report["ways"] |= {"transformers, plain": plain, "transformers, PPOW": ours}
        drafting = {"method": "eagle3", "model": str(folder / "vllm"), "num_speculative_tokens": arguments.window_size}
        for way, options in (("plain", []), ("with the drafter", ["--speculative-config", json.dumps(drafting)])):
            out = str(folder / way.replace(" ", "-"))
            with server(interpreter, target, options, arguments, folder / f"{way}.log") as url:
                evaluate.main(EvaluateConfig(endpoint=url, model="target", output_dir=out, **common))
            report["ways"][f"vLLM {version}, {way}"] = figures(Path(out))
    print(table(report))
    write(report, arguments.output or SUMMARY)
    if arguments.output is None:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.partition(START)[0], page.partition(END)[2]
        PAGE.write_text(before + START + table(report) + END + after, encoding="utf-8")
    return report


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair(parser)
    parser.add_argument("--prompts", default=str(PROMPTS.relative_to(ROOT)), help="names or files, by commas")
    parser.add_argument("--limit", type=int, help="prompts; none: all")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--window-size", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch, in both")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    return parse_with_pair(parser, argv)


@contextlib.contextmanager
def server(interpreter: str, target: str, options: list[str], arguments, log: Path) -> Iterator[str]:
    """vLLM's own, in float32; its address once it answers. Ended with the context."""
    command = [interpreter, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    command += ["--served-model-name", "target", "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "1"]
    command += ["--host", "127.0.0.1", "--port", str(arguments.port), "--no-enable-prefix-caching", *options]
    threads = {"OMP_NUM_THREADS": str(arguments.threads), "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | threads
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            wait(process, f"http://127.0.0.1:{arguments.port}/health", command, log)
            yield f"http://127.0.0.1:{arguments.port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait(process: subprocess.Popen, address: str, command: list[str], log: Path) -> None:
    """Until the server answers. Raises RuntimeError with the end of its log when it ends or takes too long."""
    for _ in range(STARTED):
        if process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(address, timeout=5)
            return
        time.sleep(1)
    raise RuntimeError(f"{shlex.join(command)} did not come up:\n{log.read_text()[-3000:]}")


def figures(folder: Path) -> dict:
    """The pooled figures of an evaluation of one prompt set."""
    (found,) = json.loads((folder / "metrics.json").read_text())["results"].values()
    names = ("prompts", "acceptance_length", "engine_acceptance_length", "per_position", "identical", "near_ties")
    names += ("tokens_per_second", "plain_tokens_per_second")
    return {name: found[name] for name in names if name in found}


def table(report: dict) -> str:
    """The four ways as Markdown, each speed over its own engine's plain one."""
    hardware, settings = report["hardware"], report["settings"]
    lines = ["| | tokens/s | over plain | acceptance length | as engines count |", "|---" * 5 + "|"]
    plain = {way.split(",")[0]: found["tokens_per_second"] for way, found in report["ways"].items() if "plain" in way}
    for way, found in report["ways"].items():
        speed = found["tokens_per_second"]
        length, engines = (found.get(name) for name in ("acceptance_length", "engine_acceptance_length"))
        cells = [way, f"{speed:.0f}", f"{speed / plain[way.split(',')[0]]:.2f}x"]
        cells += ["-" if value is None else f"{value:.3f}" for value in (length, engines)]
        lines.append("| " + " | ".join(cells) + " |")
    count = next(found["prompts"] for found in report["ways"].values() if "prompts" in found)
    cpu = hardware.get("cpu", "CPU")
    lines += ["", f"{count} prompts, greedy, {settings['max_new_tokens']} tokens each at most, chains of "]
    lines[-1] += f"{settings['window_size']}, float32, {settings['threads']} threads of {cpu}; torch "
    lines[-1] += f"{report['versions'].get('torch')}, transformers {report['versions'].get('transformers')}, "
    lines[-1] += f"vLLM {settings['vllm']}."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
