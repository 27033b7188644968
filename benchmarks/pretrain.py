"""The target of a small pair, trained from nothing on one core.

Ours; the paper drafts for existing targets. A Llama of a few million parameters, so that the whole method can be tried,
tested and shown on a laptop. The budget is a number of tokens or of minutes; the learning rates follow the share of it
that is spent, so a run always ends at rate zero. A run that was killed goes on from the newest checkpoint in
``<output>/work`` when the same command is given again.

    python -m benchmarks.pretrain --data text/ --output target --minutes 75
"""

import dataclasses
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from ppow.training import checkpoints, provenance, report
from ppow.training.arguments import Config, option
from ppow.training.cli import guarded
from ppow.training.config import SKIP_BAD_ROWS
from ppow.training.data import batch_indices
from ppow.training.files import claim_folder, move_in, scratch, telling, write_json
from ppow.training.loop import largest
from ppow.training.metrics import MetricsLog, read_metrics
from ppow.training.optimizers import BETAS, Optimizers
from ppow.training.stopping import Stopped, deferred_sigterm

from . import corpus

# May differ between a run and its continuation: tokens, weights and order do not follow from them.
FREE_TO_CHANGE = {"data", "skip_bad_rows", "output", "tokens", "minutes", "checkpoint_minutes", "device"}
FREE_TO_CHANGE |= {"compile_layers"}
CHUNK = {"cpu": 512, "cuda": 8192}  # positions whose logits exist at a time: in a core's cache, or enough for a GPU
HELDOUT_SEQUENCES = 64
SHARD = "15MB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Train the target of a small pair, tokenizer included, for a budget of tokens or minutes."""

    data: str = option("folder of GROUP-NN.jsonl.xz files with messages or text rows")
    output: str = option("folder for the model; its work/ keeps tokens and checkpoints")
    groups: list[str] = option(
        "group:weight[:max characters]; weight = expected copies of a row in one pass",
        ["math:3", "chat:1", "instruct:0.25:1200", "reasoning:0.15:1500"],
    )
    skip_bad_rows: bool = option(SKIP_BAD_ROWS, False)
    python_share: float = option("share of characters that is Python source", 0.1, at_least=0, below=1)
    python_packages: list[str] = option(
        "installed packages read besides the standard library; permissive licences only", []
    )
    heldout: float = option("share of rows held out", 0.005, at_least=0, below=1)
    # 256 bytes and 4 special tokens; the packed tokens are uint16.
    vocab_size: int = option("tokens of the byte-level BPE, special ones included", 4096, at_least=260, at_most=65536)
    num_layers: int = option("transformer blocks", 10, at_least=1)
    hidden_size: int = option("width of the residual stream", 192, at_least=1)
    intermediate_size: int = option("width of the MLP", 384, at_least=1)
    num_heads: int = option("query heads", 4, at_least=1)
    num_kv_heads: int = option("key and value heads", 2, at_least=1)
    max_positions: int = option("max_position_embeddings of the saved config", 2048, at_least=1)
    rope_theta: float = option("RoPE base", 10000.0, above=0)
    sequence_length: int = option("tokens in a packed training sequence", 512, at_least=2)
    batch_size: int = option("sequences in an optimizer step", 8, at_least=1)
    tokens: int = option("budget in training tokens; this or minutes", 0, at_least=0)
    minutes: float = option("budget in minutes of training; this or tokens", 0.0, at_least=0)
    optimizer: Literal["muon", "adamw"] = option("muon: matrices by Muon, the rest by AdamW", "muon")
    learning_rate: float = option("peak rate of AdamW", 4e-3, above=0)
    muon_learning_rate: float = option("peak rate of Muon", 1e-2, above=0)
    weight_decay: float = option("decay of the matrices, as a factor of their rate", 0.05, at_least=0)
    warmup: float = option("share of the budget in which the rate rises", 0.02, at_least=0, below=1)
    max_grad_norm: float = option("clip the gradient to this norm", 1.0, above=0)
    dtype: Literal["bfloat16", "float32"] = option("bfloat16: autocast over float32 weights", "bfloat16")
    device: Literal["cpu", "cuda"] = option("where to train", "cpu")
    compile_layers: bool = option("let torch.compile fuse what lies between a block's products", False)
    seed: int = option("seed of the split, the weights and the order", 0, at_least=0)
    checkpoint_minutes: float = option("minutes between checkpoints", 5.0, above=0)

    def __post_init__(self):
        super().__post_init__()
        if (self.tokens > 0) == (self.minutes > 0):
            raise ValueError(
                f"Give exactly one budget, --tokens 10000000 or --minutes 75; got tokens={self.tokens} and "
                f"minutes={self.minutes}."
            )
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide hidden_size={self.hidden_size}, and "
                f"num_kv_heads={self.num_kv_heads} must divide num_heads."
            )
        self.mix()

    @classmethod
    def program(cls) -> str:
        return "python -m benchmarks.pretrain"

    def mix(self) -> list[tuple[str, float, int]]:
        """The groups: (name, weight, max_chars)."""
        return [parse_group(group) for group in self.groups]


def parse_group(text: str) -> tuple[str, float, int]:
    """``name:weight[:max_chars]`` -> (name, weight, max_chars); without a limit, ``sys.maxsize``."""
    name, *numbers = text.split(":")
    try:
        weight = float(numbers[0])
        max_chars = int(numbers[1]) if len(numbers) > 1 else sys.maxsize
    except (IndexError, ValueError):
        weight, max_chars = -1.0, 0
    if not name or len(numbers) > 2 or not 0 < weight < float("inf") or max_chars <= 0:
        raise ValueError(f"group {text!r} must be name:weight[:max characters], positive numbers, as in chat:1:1500.")
    return name, weight, max_chars


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    return guarded(lambda: pretrain(PretrainConfig.from_args(given)), "pretraining goes on when it is called again")


def pretrain(config: PretrainConfig) -> dict:
    """Run or resume the recipe.

    Returns:
        step, tokens, seconds, parameters and heldout_loss (nats per token), as in ``<output>/training.json``.
    """
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no torch.optim.Muon; use --optimizer adamw or torch >= 2.9.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu.")
    with claim_folder(config.output, "--output"):
        return run(config)


def run(config: PretrainConfig) -> dict:
    output = Path(config.output)
    work = output / "work"
    settings = work / "settings.json"
    if not (work / "corpus.json").exists():  # a made corpus needs its sources no more
        for name, *_ in config.mix():
            corpus.group_files(Path(config.data), name)
        settings.unlink(missing_ok=True)  # of a try that made nothing
    work.mkdir(parents=True, exist_ok=True)
    check_settings(config, settings)
    tokenizer, tokens, heldout, record = corpus.prepare(config, work)
    provenance.write(output, config)  # once the data has proved sound
    model = build_model(config, tokenizer).to(config.device).train()
    if config.compile_layers:
        for layer in model.model.layers:  # they share one compilation
            layer.compile(dynamic=False)
    optimizers = build_optimizers(config, model)
    state = {"step": 0, "tokens": 0, "seconds": 0.0}
    newest = checkpoints.latest(work)
    if newest:
        state = checkpoints.load(newest, model.model, optimizers)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{report.device(torch.device(config.device))}, {config.dtype}, seed {config.seed}")
    print(f"{config.data}: {rows_read(record)}")
    print(f"{parameters:,} parameters; {len(tokens):,} tokens, {len(heldout):,} held out; from step {state['step']}")

    state = train(config, model, optimizers, tokens, heldout, work, state)
    result = {**state, "parameters": parameters, "heldout_loss": heldout_loss(model, heldout, config)}
    finish(config, model, tokenizer, record, result)
    lines = read_metrics(work / "metrics.jsonl")
    print(f"The target is in {output}, its record in {output / 'training.json'}.")
    if lines:
        print(report.figures(lines))
    print(report.draw(lines, output / report.CURVE, work / "metrics.jsonl"))
    answers = ["--data", config.data, "--output", f"{config.output.rstrip('/')}-answers.jsonl"]
    print(f"Next: {shlex.join(['ppow', 'regenerate', '--target', config.output, *answers])}")
    return result


def rows_read(record: dict) -> str:
    """What of the data trains, is held out, and was dropped, from the content of corpus.json."""
    groups = ", ".join(f"{name} {group['rows']}" for name, group in record["groups"].items())
    dropped = "; ".join(f"{count}: {reason}" for reason, count in record.get("dropped", {}).items() if count)
    kept = f"{record['train_rows']} rows to train on, {record['heldout_rows']} held out (rows read: {groups})"
    return f"{kept}; dropped: {dropped or 'none'}"


def check_settings(config: PretrainConfig, path: Path) -> None:
    """Refuse to continue a run whose tokens or weights came from other options. ``path`` remembers them."""
    settings = config.to_dict(without=FREE_TO_CHANGE)
    if not path.exists():
        write_json(path, settings)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]
    if changed:
        raise ValueError(
            f"{config.output} holds a run with other options ({'; '.join(changed)}). Continue it with those, or give "
            "another --output."
        )


# -- model and optimizer -----------------------------------------------------------------------------------------------


def build_model(config: PretrainConfig, tokenizer) -> LlamaForCausalLM:
    """A fresh Llama with tied embeddings.

    Matrices of the blocks keep unit variance; what is added to the residual stream, twice per block, starts smaller by
    sqrt(2 L), so that its variance does not grow with the depth L.
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.hidden_size // config.num_heads,
            max_position_embeddings=config.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # An answer ends with its turn, a plain text with its document.
    ends = tokenizer.convert_tokens_to_ids([corpus.IM_END, corpus.END_OF_TEXT])
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    for name, weight in model.model.layers.named_parameters():
        if weight.ndim == 2:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            fan_in = weight.shape[1] * (2 * config.num_layers if adds else 1)
            torch.nn.init.normal_(weight, std=fan_in**-0.5)
    return model


def build_optimizers(config: PretrainConfig, model) -> Optimizers:
    """Muon for the blocks' matrices and AdamW for the rest, or AdamW for all; "peak" keeps a group's peak rate."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in matrices}
    adam = [{"params": [weight for weight in model.parameters() if id(weight) not in inside], "weight_decay": 0.0}]
    parts = []
    if config.optimizer == "muon":
        parts.append(torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay))
    else:
        adam.append({"params": matrices, "weight_decay": config.weight_decay})
    optimizers = Optimizers(*parts, torch.optim.AdamW(adam, lr=config.learning_rate, betas=BETAS))
    for group in optimizers.param_groups:
        group["peak"] = group["lr"]
    return optimizers


def rate(progress: float, warmup: float) -> float:
    """Factor on the peak rates: linear up to ``warmup`` (not from zero), then a cosine to zero at progress 1."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


# -- loss --------------------------------------------------------------------------------------------------------------


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of ``hidden @ weight.T``; the forward pass computes the gradients too, chunk by chunk.

    The (N, V) logits exist for one chunk only: they stay in the cache of one core, and are computed once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk):  # (N, H), (V, H), (N,)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(labels), chunk):
            part, answer = hidden[start : start + chunk], labels[start : start + chunk, None]
            log_probs = (part @ weight.T).float().log_softmax(-1)  # (C, V)
            total -= log_probs.gather(1, answer).sum()
            # d loss / d logits = softmax - one-hot
            grad = log_probs.exp_().scatter_add_(1, answer, torch.full_like(answer, -1, dtype=torch.float32))
            grad = grad.div_(len(labels)).to(hidden.dtype)
            grad_hidden[start : start + chunk] = grad @ weight
            grad_weight += grad.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / len(labels)

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_output, (grad_weight * grad_output).to(grad_hidden.dtype), None, None


def batch_loss(model, inputs: torch.Tensor, config: PretrainConfig) -> torch.Tensor:
    """Mean next-token loss, in nats, of sequences (B, T + 1)."""
    inputs = inputs.to(config.device)
    dtype = getattr(torch, config.dtype)
    with torch.autocast(config.device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = model.model(inputs[:, :-1], use_cache=False).last_hidden_state  # (B, T, H)
    labels = inputs[:, 1:].reshape(-1)  # (B * T,)
    return ChunkedCrossEntropy.apply(
        hidden.flatten(0, 1).to(dtype), model.lm_head.weight.to(dtype), labels, CHUNK[config.device]
    )


def sequences(tokens: np.ndarray, length: int, indices) -> torch.Tensor:
    """Sequences ``indices`` of the packed tokens, each with the first token after it: (B, length + 1) int64."""
    rows = [tokens[index * length : (index + 1) * length + 1] for index in indices]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # a compilation for so few batches would not pay
def heldout_loss(model, tokens: np.ndarray, config: PretrainConfig) -> float | None:
    """Mean over the first ``HELDOUT_SEQUENCES`` held-out sequences; None when there is not one."""
    count = min(HELDOUT_SEQUENCES, (len(tokens) - 1) // config.sequence_length)
    losses = [batch_loss(model, sequences(tokens, config.sequence_length, [i]), config).item() for i in range(count)]
    return sum(losses) / count if losses else None


# -- the run -----------------------------------------------------------------------------------------------------------


def train(config: PretrainConfig, model, optimizers: Optimizers, tokens, heldout, work: Path, state: dict) -> dict:
    """Steps until the budget is spent. ``state`` holds step, tokens and seconds so far; so does what is returned."""
    count = (len(tokens) - 1) // config.sequence_length
    step_tokens = config.batch_size * config.sequence_length
    if config.compile_layers:  # the first pass compiles, which no budget shall pay for
        batch_loss(model, sequences(tokens, config.sequence_length, [0] * config.batch_size), config).backward()
        optimizers.zero_grad()
    started = time.monotonic() - state["seconds"]
    saved_step, saved_at = state["step"], time.monotonic()

    def save():
        progress = {key: state[key] for key in ("tokens", "seconds")}
        # The backbone alone: the head is its embedding.
        checkpoints.save(work, state["step"], model.model, optimizers, progress, keep_last=2)

    bar = tqdm(total=config.tokens or None, initial=state["tokens"], unit="tok", unit_scale=True, disable=None)
    with deferred_sigterm() as asked, MetricsLog(work / "metrics.jsonl") as log, bar:
        log.truncate_after(state["step"])
        while True:
            seconds = time.monotonic() - started
            progress = state["tokens"] / config.tokens if config.tokens else seconds / (60 * config.minutes)
            if progress >= 1:
                break
            factor = rate(progress, config.warmup)
            for group in optimizers.param_groups:
                group["lr"] = group["peak"] * factor
            indices = batch_indices(count, config.batch_size, config.seed, state["step"])
            loss = batch_loss(model, sequences(tokens, config.sequence_length, indices), config)
            check_finite(loss, "the loss", state["step"] + 1, work)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            check_finite(norm, "the gradient", state["step"] + 1, work)
            optimizers.step()
            optimizers.zero_grad()
            check_finite(largest(list(model.parameters())), "the largest weight", state["step"] + 1, work)

            now = time.monotonic() - started
            state = {"step": state["step"] + 1, "tokens": state["tokens"] + step_tokens, "seconds": now}
            metrics = {**state, "loss": loss, "rate": factor, "grad_norm": norm}
            metrics["tokens_per_second"] = step_tokens / (now - seconds)
            if time.monotonic() - saved_at > 60 * config.checkpoint_minutes:
                metrics["heldout_loss"] = heldout_loss(model, heldout, config)
                save()
                saved_step, saved_at = state["step"], time.monotonic()
            log.log(metrics.pop("step"), metrics)
            bar.update(step_tokens)
            bar.set_postfix(loss=f"{loss.item():.3f}", spent=f"{progress:.1%}", refresh=False)
            if asked():
                break
        if state["step"] > saved_step:
            save()
        if asked():
            told = f"stopped by SIGTERM after step {state['step']}; it is saved in {work}."
            raise Stopped(f"{told} The same command goes on from there.")
    return state


def check_finite(value: torch.Tensor, what: str, step: int, work: Path) -> None:
    """Raise a ValueError for a diverged run; no checkpoint holds what is not finite."""
    if not torch.isfinite(value):
        good = checkpoints.latest(work)
        kept = f"{good} is the last checkpoint" if good else "there is no checkpoint yet"
        raise ValueError(
            f"Step {step}: {what} is {value.item()}, the run has diverged and stops ({kept}; {work / 'metrics.jsonl'} "
            "tells where the loss began to rise). Start anew into another --output: lower the learning rates "
            "(--learning-rate, --muon-learning-rate), or raise --warmup."
        )


@torch.compiler.set_stance("force_eager")
def finish(config: PretrainConfig, model, tokenizer, record: dict, result: dict) -> None:
    """Write the model in bfloat16, its tokenizer and training.json, and print sample answers."""
    output = Path(config.output)
    model.eval().to(torch.bfloat16)
    with telling(output), scratch(output / ".unfinished-model") as partial:
        model.save_pretrained(partial, max_shard_size=SHARD)
        tokenizer.save_pretrained(partial)
        move_in(partial, output)
    samples = []
    for prompt in record["prompts"]:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs = inputs.to(config.device)
        answer = model.generate(**inputs, max_new_tokens=120, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        samples.append({"prompt": prompt, "answer": tokenizer.decode(answer, skip_special_tokens=True)})
        print(f"> {prompt}\n{samples[-1]['answer']}\n")
    settings = provenance.scrub(config.to_dict())
    write_json(output / "training.json", {"config": settings, "corpus": record, "result": result, "samples": samples})
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
