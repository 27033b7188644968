"""The frozen target as training needs it: read a text once, then verify every rollout of it in one forward."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from ppow.attention_ppow import without_cudnn_attention
from ppow.cache_ppow import CACHE_NAME, SlotCache
from ppow.fused_ppow import fuse, reachable
from ppow.target_ppow import WindowMasks, decoder_layers, read_taps

from .loading import load_model


@dataclass
class Reading:
    """What the target says about texts x (B, T).

    Attributes:
        taps: (B, T, n_taps * Ht) tapped hidden states.
        logits: (B, T, V); entry t is about x_{t+1}.
        cache: the target's keys over the text, for verifying windows against it; None when not asked for.
    """

    taps: torch.Tensor
    logits: torch.Tensor
    cache: SlotCache | None


class FrozenTarget:
    """A target that is only read.

    Args:
        model: the target; its parameters are frozen.
        taps: hidden-state indices to read.
    """

    def __init__(self, model: PreTrainedModel, taps: list[int]):
        self.model, self.taps = model.eval().requires_grad_(False), taps
        self.window_masks = WindowMasks(model)
        self.sharded = False

    @classmethod
    def load(cls, name: str, dtype: str, device: torch.device | str) -> "FrozenTarget":
        """Load a target from a Hub id or folder; taps are set once the drafter is known.

        On a GPU its norms, rotations and gates run as one kernel each, as on the fast path: its reading is a large part
        of a training step.
        """
        model = load_model(name, dtype=getattr(torch, dtype)).to(device)
        if reachable(model.get_input_embeddings().weight):
            fuse(model)
        return cls(model, [])

    @classmethod
    def load_sharded(cls, name: str, dtype: str, accelerator: Accelerator) -> "FrozenTarget":
        """Load a target with the weights of its blocks spread over the processes (FSDP): for one that does not fit.

        A block's weights are gathered while it runs. Embeddings, last norm and head stay whole on every process, since
        the drafter reads them too. The processes load one after another, so the host holds one copy at a time.

        Raises:
            ValueError: on a single process.
        """
        if accelerator.num_processes == 1:
            raise ValueError(
                "shard_target spreads the target over processes, and this run has one. Start several with "
                "`accelerate launch --num_processes N -m ppow.training.cli ...`, or leave shard_target out."
            )
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for turn in range(accelerator.num_processes):
            if turn == accelerator.process_index:
                model = load_model(name, dtype=getattr(torch, dtype))
                blocks = decoder_layers(model)
                for block in blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()) - set(blocks.parameters()))
                model.to(accelerator.device)
            accelerator.wait_for_everyone()
        target = cls(model, [])
        target.sharded = True
        return target

    def agree(self, count: int) -> int:
        """``count``; the largest of all processes' if they share this target, since they must run it equally often."""
        if not self.sharded:
            return count
        largest = torch.tensor(count, device=self.model.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)

    @torch.no_grad()
    @without_cudnn_attention()
    def read(self, input_ids: torch.Tensor, room: int = 0) -> Reading:
        """Read texts (B, T), padded on the right (padding comes after every real token, so it needs no mask).

        Args:
            room: keep the target's keys, with space for this many nodes of windows after them; 0 keeps nothing.
        """
        config = self.model.config.get_text_config(decoder=True)
        cache = SlotCache(config.num_hidden_layers, input_ids.shape[1] + room) if room else None
        keep = {"use_cache": room > 0, CACHE_NAME: cache}
        logits, taps = read_taps(self.model, self.taps, input_ids=input_ids, **keep)
        return Reading(taps, logits, cache)

    @torch.no_grad()
    @without_cudnn_attention()
    def continue_windows(
        self, reading: Reading, tokens: torch.Tensor, prefix: torch.Tensor, done: int = 0, length: int | None = None
    ) -> torch.Tensor:
        """Logits after every token of many short continuations of the same texts, in one forward (a forest).

        Args:
            reading: of the texts (B, T), with its cache. What it holds of the texts is left as it was.
            tokens: (B, R, n) continuations; row r continues after the first ``prefix[b, r]`` tokens of text b.
            prefix: (B, R) int64.
            done: tokens of every row that earlier calls, for the same rows, have put before these.
            length: tokens of a row when all calls are made; None: these are all.

        Returns:
            (B, R, n, V) logits after each token of each continuation.
        """
        cache = reading.cache
        assert cache is not None
        (batch, rows), window = prefix.shape, tokens.shape[-1]
        device, length = tokens.device, length or window
        text, count = cache.get_seq_length(), rows * length
        node_prefix = prefix.repeat_interleave(window, dim=1)  # (B, N)
        node = torch.arange(count, device=device).view(rows, length)  # all that the rows will hold
        new, node = node[:, done : done + window].flatten(), node.flatten()
        same = new[:, None] // length == node // length
        ancestors = (same & (new[:, None] >= node)).expand(batch, -1, -1)  # (B, N, R * length)
        depth, slot_depth = ((nodes % length).expand(batch, -1) for nodes in (new, node))
        slots, view = (text + node).expand(batch, -1), text + count
        masks = self.window_masks(node_prefix, ancestors, depth, slots, view, slot_depth=slot_depth)
        cache.open_window(slots[:, new], view)
        outputs = self.model(
            input_ids=tokens.flatten(1),
            attention_mask=masks,
            position_ids=node_prefix + depth,
            use_cache=True,
            return_dict=True,
            **{CACHE_NAME: cache},
        )
        cache.close_window()
        return outputs.logits.unflatten(1, (rows, window))


def log_norm(logits: torch.Tensor, rows: int = 256) -> torch.Tensor:
    """logsumexp of logits (.., V) -> (..) in float32 or better, ``rows`` rows at a time: no float32 copy of all."""
    flat = logits.flatten(0, -2)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.cat([part.to(wide).logsumexp(-1) for part in flat.split(rows)]).view(logits.shape[:-1])
