"""What both stages share around their loss: batches, the optimizer, checkpoints, metrics, progress.

A stage is a plain loop in its own module:

    trainer = Trainer(config, drafter, examples, pad_id, accelerator, held_out)
    for step in trainer.steps():
        losses = [functools.partial(loss, batch) for batch in trainer.batches(step)]
        trainer.record(step, trainer.update(step, losses))

Everything random follows from (seed, step, micro step), never from a generator's state, so a run that was killed and
resumed takes exactly the steps of one that was not.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel

from ppow import PPOWDrafter

from . import checkpoints, provenance, report
from .config import ReinforceConfig, StageConfig, SupervisedConfig
from .data import Batch, Example, batch_indices, fingerprint, make_batch
from .files import move_in, scratch, telling
from .metrics import MetricsLog
from .optimizers import make_optimizer
from .stopping import Stopped, again, deferred_sigterm

# May differ between a run and its continuation: they do not change what is computed.
_FREE_TO_CHANGE = {
    "resume",
    "save_every",
    "keep_last",
    "log_every",
    "plan",
    "trackers",
    "output_dir",
    "eval_every",
    "push_to_hub",
    "shard_target",
    "data",  # what it holds is compared instead
    "eval_data",
    "skip_bad_rows",
}


class Trainer:
    """Runs optimizer steps on a drafter.

    Args:
        config: of the stage.
        drafter: in float32, on ``accelerator.device``; parameters with ``requires_grad`` are trained.
        examples: encoded texts.
        pad_id: token to pad with.
        accelerator: of this process.
        held_out: encoded texts to evaluate on.
    """

    log: MetricsLog  # of the main process

    def __init__(
        self,
        config: SupervisedConfig | ReinforceConfig,
        drafter: PPOWDrafter,
        examples: Sequence[Example],
        pad_id: int,
        accelerator: Accelerator,
        held_out: Sequence[Example],
    ):
        self.config, self.drafter, self.examples, self.pad_id = config, drafter, examples, pad_id
        self.accelerator = accelerator
        self.folder = Path(config.output_dir)
        self.parameters = [p for p in drafter.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(config, drafter)
        self.hub = None
        if config.push_to_hub and accelerator.is_main_process:
            from .hub import BackgroundPush

            self.hub = BackgroundPush(config.push_to_hub)
        self.micro_steps = config.accumulation * accelerator.num_processes
        if len(examples) < self.micro_steps * config.batch_size:
            raise ValueError(
                f"One optimizer step takes {self.micro_steps * config.batch_size} texts, the data has {len(examples)}. "
                "Lower batch_size or accumulation, or bring more data."
            )
        self.fingerprints = {"data": fingerprint(examples), "eval_data": fingerprint(held_out)}
        self.first_step = self._resume()
        on_main(accelerator, self._open_log)
        if config.trackers:
            flat = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, bool))}
            accelerator.init_trackers("ppow", config=flat)

    def _open_log(self) -> None:
        self.log = MetricsLog(self.folder / "metrics.jsonl")
        self.log.truncate_after(self.first_step)
        provenance.write(self.folder, self.config)

    def _resume(self) -> int:
        """Load the latest complete checkpoint when asked to; -> steps already done."""
        path = checkpoints.latest(self.folder / "checkpoints")
        if path is None:
            if (self.folder / "config.json").exists():
                raise ValueError(f"{self.folder} holds a model that no run here has made; choose another output_dir.")
            return 0
        if not self.config.resume:
            raise ValueError(
                f"{self.folder} already holds a run (checkpoint {path.name}). Pass --resume to continue it, or choose "
                "another output_dir."
            )
        state = checkpoints.load(path, self.drafter, self.optimizer)
        now = self.config.to_dict(without=_FREE_TO_CHANGE)
        if (made_by := state.get("command", self.config.command())) != self.config.command():
            raise ValueError(f"{self.folder} holds a run of `ppow {made_by}`; choose another output_dir.")
        if unknown := sorted(set(state["config"]) - set(now)):
            raise ValueError(
                f"{path} was made by a version with options that this one does not know ({', '.join(unknown)}), so it "
                f"cannot go on. Start a run from its drafter, --drafter {path}, into another output_dir."
            )
        fresh = {field.name: field.default for field in dataclasses.fields(self.config)}
        changed = sorted(k for k in now if state["config"].get(k, fresh[k]) != now[k])
        learned = state.get("data", {})
        changed += [f"what {key} holds" for key, found in self.fingerprints.items() if learned.get(key) != found]
        if changed or state["micro_steps"] != self.micro_steps:
            what = changed or [f"micro steps per step ({state['micro_steps']} -> {self.micro_steps})"]
            raise ValueError(f"Cannot resume {path}: {', '.join(what)} changed since. Restore it, or start a new run.")
        self._exchange()
        return state["step"]

    def announce(self, target: PreTrainedModel, held_out: Sequence[Example]) -> None:
        """Say where and on what the run trains: device, dtype, models, the texts kept and dropped."""
        self.accelerator.print(report.begun(self, target, held_out), flush=True)

    def steps(self) -> Iterator[int]:
        """Step numbers 1 .. config.steps that are still to do; saves checkpoints in between and the drafter at last.

        Raises:
            Stopped: after SIGTERM, once the step is done and saved.
        """
        with deferred_sigterm() as asked:
            yield from self._steps(asked)
        if self.hub is not None and asked():
            print("ppow: SIGTERM came in the last step: the drafter is saved and not pushed.", file=sys.stderr)
        elif self.hub is not None:
            self.hub.wait()
            self.hub.push(self.folder, self.config.steps)
            self.hub.wait()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            print(report.ended(self.config, self.folder, self.drafter.config.longest_window), flush=True)

    def _steps(self, asked: Callable[[], bool]) -> Iterator[int]:
        config = self.config
        self.bar = tqdm(
            total=config.steps,
            initial=self.first_step,
            desc=config.command(),
            disable=not self.accelerator.is_main_process,
        )
        for step in range(self.first_step + 1, config.steps + 1):
            self.started = time.perf_counter()
            yield step
            self.bar.update()
            stop = step < config.steps and anywhere(self.accelerator, asked())  # all end after the same step
            if step % config.save_every == 0 or step == config.steps or stop:
                self._save(step)
            if stop:
                self.bar.close()
                self.accelerator.end_training()
                told = (
                    f"stopped by SIGTERM after step {step} of {config.steps}; it is saved in {self.folder}. {again()}."
                )
                raise Stopped(told if self.accelerator.is_main_process else "")
        self.bar.close()
        finished_before = self.first_step == config.steps and (self.folder / "config.json").exists()
        if not finished_before:
            on_main(self.accelerator, self._finish)

    def _finish(self) -> None:
        self.log.check()
        with self.mean_weights():
            save_drafter(self.drafter, self.folder, self.config.dtype)
        self.log.close()

    def _save(self, step: int) -> None:
        def save() -> None:
            self.log.check()
            config = self.config.to_dict(without=_FREE_TO_CHANGE)
            state = {"command": self.config.command(), "config": config, "micro_steps": self.micro_steps}
            state["data"] = self.fingerprints
            with self.mean_weights():  # so that a checkpoint's drafter is the one to use
                saved = checkpoints.save(
                    self.folder / "checkpoints", step, self.drafter, self.optimizer, state, self.config.keep_last
                )
            if self.hub is not None:
                self.hub.push(saved, step)

        on_main(self.accelerator, save)

    def batches(self, step: int) -> list[Batch]:
        """This process's micro batches of ``step``, in order."""
        size, config, ours = self.config.batch_size, self.config, self.accelerator
        chosen = batch_indices(len(self.examples), size * self.micro_steps, config.seed, step - 1)
        batches = []
        for accumulated in range(config.accumulation):
            micro = accumulated * ours.num_processes + ours.process_index
            part = [self.examples[i] for i in chosen[micro * size : (micro + 1) * size]]
            seed = ((config.seed * 1_000_003 + step) * 1_000_003 + micro) & 0x7FFFFFFF
            batches.append(make_batch(part, self.pad_id, ours.device, seed))
        return batches

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of the drafter's forward."""
        if self.config.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=getattr(torch, self.config.dtype))

    def update(self, step: int, losses: Sequence[Callable[[], tuple[torch.Tensor, dict]]], times: int = 1) -> dict:
        """``times`` optimizer steps over the mean of ``losses`` (each -> loss, metrics), averaged over processes.

        The gradient's norm is clipped to ``max_grad_norm``.

        Returns:
            metrics of the last of them.

        Raises:
            ValueError: the run has diverged: loss, gradient or weights are not finite. No checkpoint holds that.
        """
        watched: dict[str, torch.Tensor] = {}
        for _ in range(times):
            metrics = self._update_once(step, losses, watched)
        watched["some weights are"] = largest(self.parameters)
        self._check(step, watched)
        self._average_weights(step)
        return metrics

    def _update_once(
        self, step: int, losses: Sequence[Callable[[], tuple[torch.Tensor, dict]]], watched: dict[str, torch.Tensor]
    ) -> dict:
        self.optimizer.zero_grad(set_to_none=True)
        collected = []
        for compute in losses:
            with self.autocast():
                loss, metrics = compute()
            (loss / len(losses)).backward()
            collected.append({"loss": loss.detach(), **metrics})
        mean, gradient = self.average(collected), self._reduce_gradient()
        for what, value in (("the loss is", mean["loss"]), ("the gradient is", gradient)):
            watched[what] = watched.get(what, 0.0) + value  # a sum is finite if all are
        scale = (self.config.max_grad_norm / (gradient + 1e-12)).clamp(max=1.0)
        torch._foreach_mul_([p.grad for p in self.parameters], scale)
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {**mean, "gradient_norm": gradient, "learning_rate": rate}

    def _check(self, step: int, watched: dict[str, torch.Tensor]) -> None:
        """Raise a ValueError, the same on every process, unless what is watched is finite: () each, read at once."""
        finite = torch.stack([value.float() for value in watched.values()]).isfinite().tolist()
        what = next((what for what, fine in zip(watched, finite) if not fine), None)
        if what is None:
            return
        good = checkpoints.latest(self.folder / "checkpoints")
        again = f"from the last checkpoint, --drafter {good}, or anew" if good else "anew (there is no checkpoint yet)"
        raise ValueError(
            f"Step {step}: {what} not finite, the run has diverged and stops. Where the loss began to rise is in "
            f"{self.folder / 'metrics.jsonl'}. Start {again}, into another --output-dir: with a --learning-rate below "
            f"{self.config.learning_rate:g}, with --warmup-steps, or with --dtype float32. If it happens at once, "
            "check the weights of target and drafter."
        )

    def _average_weights(self, step: int) -> None:
        """Take this step's weights into their mean.

        The optimizer's state holds it, and so every checkpoint: of weights and mean, ``twin`` is the one that the
        drafter does not have.
        """
        count = step - int(self.config.average_from * self.config.steps + 1e-9)  # of weights, these included
        if count < 1:
            return
        known, weights = self.optimizer.state, [p.detach() for p in self.parameters]
        states = [known[p] for p in self.parameters]
        if count == 1:
            for state, weight in zip(states, weights):
                state["twin"] = weight.clone()
        else:
            torch._foreach_lerp_([state["twin"] for state in states], weights, 1 / count)

    @contextlib.contextmanager
    def mean_weights(self) -> Iterator[None]:
        """Inside, the drafter has the mean of its weights, once there is one: what the run would save now."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap the drafter's weights and their mean, if there is one."""
        known = self.optimizer.state
        for p in self.parameters:
            state = known.get(p, {})
            if "twin" in state:
                own = p.clone()
                p.copy_(state["twin"])
                state["twin"] = own

    def average(self, metrics: Sequence[dict]) -> dict:
        """Mean of every metric over micro steps and processes."""
        mean = {key: torch.stack([m[key].float() for m in metrics]).mean(0) for key in metrics[0]}
        return dict(zip(mean, self._reduce(list(mean.values()))))

    def _reduce_gradient(self) -> torch.Tensor:
        """Average gradients over processes; -> their norm ()."""
        for p in self.parameters:
            if p.grad is None:  # a parameter that no loss of this step reached
                p.grad = torch.zeros_like(p)
        for p, mean in zip(self.parameters, self._reduce([p.grad for p in self.parameters])):
            p.grad = mean
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters])

    def _reduce(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Their means over processes, in one exchange."""
        if self.accelerator.num_processes == 1:
            return tensors
        flat = self.accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]

    def record(self, step: int, metrics: dict) -> None:
        """Show the step's metrics, and write them every ``log_every`` steps (and the last)."""
        if step % self.config.log_every and step != self.config.steps and "eval_loss" not in metrics:
            return
        values = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        values["seconds"] = time.perf_counter() - self.started
        on_main(self.accelerator, lambda: self.log.log(step, values))
        if self.accelerator.is_main_process:
            shown = ("loss", "reward", "acceptance_length", "eval_acceptance_length")
            self.bar.set_postfix({k: f"{values[k]:.3f}" for k in shown if k in values})
        self.accelerator.log({k: v for k, v in values.items() if not isinstance(v, list)}, step=step)


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Let the main process do something; the others wait for it, and end quietly when it fails.

    Raises:
        Exception: what ``action`` raised, on the main process; SystemExit(2) on the others.
    """
    failure = None
    if accelerator.is_main_process:
        try:
            action()
        except Exception as error:
            failure = error
    failed = anywhere(accelerator, failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise SystemExit(2)


def anywhere(accelerator: Accelerator, here: bool) -> bool:
    """Whether something holds on any process, given whether it holds on this one."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device)) > 0)


def largest(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest weight () by its amount; not finite if any is."""
    return torch.stack(torch._foreach_norm([p.detach() for p in parameters], math.inf)).max()


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine to zero after the last step; no fall where weights are averaged."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.average_from < 1:
        return config.learning_rate
    progress = (step - config.warmup_steps - 1) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def save_drafter(drafter: PPOWDrafter, folder: Path, dtype: str) -> None:
    """Write the drafter in ``dtype``, in shards below 16 MB, leaving the one in memory as it is."""
    weights = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in drafter.state_dict().items()}
    with telling(folder), scratch(folder / ".unfinished-drafter") as partial:
        drafter.save_pretrained(partial, state_dict=weights, max_shard_size="15MB")
        config = json.loads((partial / "config.json").read_text())  # which names the dtype of the one in memory
        (partial / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n")
        move_in(partial, folder)
