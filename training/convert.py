"""``ppow import`` and ``ppow export``: drafters from other trainers, and PPOW drafters for serving engines.

    ppow import yuhuili/EAGLE3-LLaMA3.1-Instruct-8B --target meta-llama/Llama-3.1-8B-Instruct --out drafter
    ppow export drafter --format vllm --out drafter-vllm

Both print what they mapped, dropped and assumed. The output folder appears whole or not at all. No pickle is written.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ppow import PPOWDrafter
from ppow.drafting_ppow import DEFAULT_WINDOW_SIZE
from ppow.target_ppow import check_pair

from .block_formats import from_dflash, is_dflash, to_dflash
from .config import ExportConfig, ImportConfig
from .export_formats import Exported, from_ppow
from .files import claim_beside, whole
from .foreign_files import find_file, read_config, read_json, read_tensors
from .gguf_format import read_gguf, write_gguf
from .import_formats import READ, Imported, Known, Row, to_ppow
from .loading import check_model, is_gguf, named, place_of

GGUF = "drafter.gguf"  # the one file of a folder that llama.cpp reads


def main(config: ImportConfig | ExportConfig) -> None:
    """Run ``ppow import`` or ``ppow export``. Raises ValueError for what cannot be imported, or not expressed."""
    if isinstance(config, ImportConfig):
        import_drafter(config)
    else:
        export_drafter(config)


def import_drafter(config: ImportConfig) -> None:
    """Write another trainer's drafter as a PPOW drafter, in its folder with code and ``custom_generate/``."""
    if not (is_gguf(config.source) and Path(config.source).is_file()):
        check_model("source", config.source)
    check_model("target", config.target)
    with named("target", config.target):
        target_config = AutoConfig.from_pretrained(**place_of(config.target))
    known = Known(config.rope_theta, config.norm_output, config.norm_before_residual, config.taps)
    imported = import_checkpoint(config.source, target_config, PPOWDrafter, known)
    print(report(f"{imported.dialect}, {len(imported.tensors)} tensors", imported.rows))
    if config.dry_run:
        return
    drafter = PPOWDrafter.class_for(imported.config.architecture).from_pretrained(
        None, config=imported.config, state_dict=imported.tensors, dtype=imported.config.dtype
    )
    folder = write_folder(config.out or f"{_name(config.source)}-ppow", drafter.save_pretrained)
    print(f"wrote {folder}: target.generate(..., assistant_model=PPOWDrafter.from_pretrained({str(folder)!r}))")


def import_checkpoint(
    source: str,
    target: PreTrainedModel | PreTrainedConfig | str,
    drafter_class: type[PreTrainedModel],
    known: Known = READ,
    **hub: Any,
) -> Imported:
    """Read another trainer's EAGLE-3 or DFlash drafter. ``PPOWDrafter.from_pretrained`` asks for this by name.

    Args:
        source: folder, Hub id or GGUF file of the drafter.
        target: its target: a model, a configuration, or a folder or Hub id.
        drafter_class: ``PPOWDrafter``, the package's or a repository's, whose tensors it must have.
        known: overrides what is assumed.
        **hub: of ``modeling_ppow.HUB_OPTIONS``, for ``source``.

    Returns:
        The drafter in our terms; nothing is written.

    Raises:
        ValueError: an unreadable checkpoint, an unknown format, or one that does not fit the target.
    """
    if not isinstance(target, PreTrainedConfig):
        target = target.config if hasattr(target, "config") else AutoConfig.from_pretrained(**place_of(target))
    if is_gguf(source):
        config, tensors = read_gguf(source, target)
    else:
        config, tensors = read_config(source, **hub), read_tensors(source, **hub)
    translate = from_dflash if is_dflash(config) else to_ppow
    return translate(config, tensors, target, drafter_class, known)


def export_drafter(config: ExportConfig) -> None:
    """Write a drafter, PPOW's or another trainer's, in an engine's format, and print the command that serves it."""
    target_config = embeddings = head = None
    if config.format == "gguf" and not (config.target and is_gguf(config.target) and Path(config.target).is_file()):
        raise ValueError(
            "--format gguf writes a drafter with its target's tokenizer: give --target the GGUF file of the target "
            "that llama.cpp is to serve."
        )
    if config.target:
        with named("target", config.target):
            target_config = AutoConfig.from_pretrained(**place_of(config.target))
    with named("drafter", config.drafter):
        drafter = PPOWDrafter.from_pretrained(config.drafter, target=config.target, dtype="auto")
    if config.target:
        with torch.device("meta"):  # the whole of it may not fit into memory
            target_model = AutoModelForCausalLM.from_config(target_config)
        check_pair(target_model, drafter)
        if config.format == "sglang" or config.format == "speculators" and drafter.config.share_target_embeddings:
            embeddings = _weight(config.target, target_model, "get_input_embeddings")
        if drafter.config.share_target_head and not drafter.config.is_block:
            head = _weight(config.target, target_model, "get_output_embeddings")
    tokens = getattr(drafter.generation_config, "window_size", None) or DEFAULT_WINDOW_SIZE
    target = config.target or drafter.config.target_name_or_path
    if drafter.config.is_block != (config.format == "dflash"):
        kind = "a block drafter" if drafter.config.is_block else "an EAGLE-3 drafter"
        raise ValueError(f"{config.drafter} is {kind}, and --format {config.format} is for the other kind.")
    if drafter.config.is_block:
        exported = to_dflash(drafter.config, drafter.state_dict())
    else:
        exported = from_ppow(
            drafter.config,
            drafter.state_dict(),
            config.format,
            target_config=target_config,
            target_embeddings=embeddings,
            target_head=head,
            speculative_tokens=tokens,
            target_name=target,
        )
    drafting = drafter.generation_config.to_diff_dict()
    if dropped := sorted(drafting.keys() - {"transformers_version", "window_size"}):
        exported.rows.append(Row("dropped", "generation_config", f"{', '.join(dropped)}: it has no field for it"))
    print(report(f"{config.format}, {len(exported.tensors)} tensors", exported.rows))
    if config.dry_run:
        return
    place = config.out or f"{_name(config.drafter)}-{config.format}"
    folder = write_folder(place, lambda path: save(exported, path, config.target if config.format == "gguf" else None))
    print(f"wrote {folder}; then")
    print(serving_command(config.format, target or "TARGET", str(folder), tokens))


def report(title: str, rows: list[Row]) -> str:
    """The table that both commands print."""
    width = max((len(row.what) for row in rows), default=0)
    lines = [f"{row.action:<9}{row.what:<{width}}  {row.how}" for row in rows]
    return "\n".join([f"{'format':<9}{title}", *lines])


def save(exported: Exported, folder: Path, gguf_target: str | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` (one file: EAGLE's own loader knows no shards), or a GGUF file.

    Args:
        exported: what to write.
        folder: where.
        gguf_target: of the format gguf, the target's GGUF file.
    """
    if gguf_target:
        write_gguf(exported.config, exported.tensors, gguf_target, folder / GGUF)
        return
    save_file(exported.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(exported.config, indent=2) + "\n", encoding="utf-8")


def write_folder(place: str, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a hidden folder beside ``place``, then rename it: all of it appears, or nothing.

    Raises:
        ValueError: ``place`` exists and is not an empty folder, or another export is writing it.
        OSError: the disk is full, or not to be written on.
    """
    folder = Path(place).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name another place with --out, or remove it.")
    with claim_beside(folder, "--out"), whole(folder) as partial:
        partial.mkdir()
        write(partial)
        if folder.exists():
            folder.rmdir()
    return folder


def serving_command(form: str, target: str, drafter: str, tokens: int) -> str:
    """The command that serves ``target`` with the exported ``drafter``, drafting chains of ``tokens``.

    Args:
        form: one of ``export_formats.FORMATS``, or dflash.
        target: Hub id or folder.
        drafter: the exported folder.
        tokens: drafted tokens per verification.
    """
    if form in ("speculators", "vllm"):
        options = {"method": "eagle3", "model": drafter, "num_speculative_tokens": tokens}
        return shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(options)])
    if form == "dflash":
        options = {"method": "dflash", "model": drafter, "num_speculative_tokens": tokens}
        return shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(options)])
    if form == "sglang":
        options = {
            "model-path": target,
            "speculative-algorithm": "EAGLE3",
            "speculative-draft-model-path": drafter,
            "speculative-num-steps": tokens,
            "speculative-eagle-topk": 1,
            "speculative-num-draft-tokens": tokens + 1,
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return shlex.join(["python", "-m", "sglang.launch_server", *arguments])
    if form == "gguf":
        draft = ["-md", f"{drafter}/{GGUF}", "--spec-type", "draft-eagle3", "--spec-draft-n-max", str(tokens)]
        return shlex.join(["llama-server", "-m", target, *draft])
    if form == "eagle":
        return f"EaModel.from_pretrained(base_model_path={target!r}, ea_model_path={drafter!r}, use_eagle3=True)"
    return f"train on from {drafter} with SpecForge; to serve it, export with --format vllm or sglang"


def _weight(target: str, model: PreTrainedModel, of: str) -> torch.Tensor:
    """(V, Ht) embeddings or head of a target, read alone; ``model`` is the target on no device.

    Args:
        of: what gives them, "get_input_embeddings" or "get_output_embeddings".
    """
    layer = getattr(model, of)()
    if getattr(layer, "bias", None) is not None:
        raise ValueError(f"The head of {target} has a bias, for which no engine's format has a place in a drafter.")
    if is_gguf(target):
        return getattr(AutoModelForCausalLM.from_pretrained(**place_of(target), dtype="auto"), of)().weight.data
    weight = layer.weight
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    file = find_file(target, "model.safetensors")
    if index := find_file(target, "model.safetensors.index.json"):
        file = find_file(target, read_json(index)["weight_map"].get(name, ""))
    if file is None:
        raise ValueError(f"{target} has no safetensors with {name}, which this format needs beside the drafter.")
    with named("target", target), safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def _name(source: str) -> str:
    return Path(source.rstrip("/")).name.removesuffix(".gguf") or "drafter"
