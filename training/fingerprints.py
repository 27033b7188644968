"""Which weights a result belongs to: fingerprints of weights files, so that nobody's figures end up on another's card.

A fingerprint is a SHA-256 over every tensor's name, dtype, shape and bytes, in the order of their names. It does not
depend on how the tensors are spread over files, nor on what else a repository holds. Of a target's tensors that are
larger than ``SAMPLED`` bytes four blocks are read, evenly spaced from first to last byte: 64 KiB each, so that 8B
parameters take some 20 MB to read and not 16 GB. Training, merging and quantizing change all of a weight, and are seen.
A drafter is small and read whole.
"""

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from .loading import is_gguf, place_of

SAMPLED = 1 << 16
_BLOCK = SAMPLED // 4
_HEADER = 100_000_000  # bytes that safetensors allows for a file's table of tensors


def fingerprint(name: str | Path, whole: bool = False, revision: str | None = None) -> str | None:
    """Of a model's weights, as 64 hexadecimal digits.

    Args:
        name: a folder, a GGUF file, or a Hub id whose files are in the local cache (loading the model brings them
            there).
        whole: read every byte, as is done for drafters.
        revision: of a Hub id.

    Returns:
        None where the weights are not on this machine, or neither in model*.safetensors files nor in a GGUF file.

    Raises:
        SafetensorError: a file that is damaged.
    """
    if is_gguf(name):
        return _of_gguf(name, revision)
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for tensor, facts in table(file).items():
            tensors[tensor] = file, facts
    digest = hashlib.sha256()
    for tensor in sorted(tensors):
        file, facts = tensors[tensor]
        digest.update(json.dumps([tensor, facts["dtype"], facts["shape"]]).encode())
        with file.open("rb") as content:
            first, end = facts["place"]
            for start, size in blocks(first, end, whole):
                content.seek(start)
                if len(read := content.read(size)) < size:
                    raise SafetensorError(f"{file} is truncated in {tensor}")
                digest.update(read)
    return digest.hexdigest() if tensors else None


def _of_gguf(name: str | Path, revision: str | None) -> str | None:
    """Of a GGUF file, here or in the Hub's cache: its size and 256 blocks of it."""
    place = place_of(name)
    file = Path(name)
    if not file.is_file():
        found = try_to_load_from_cache(place["pretrained_model_name_or_path"], place["gguf_file"], revision=revision)
        if not isinstance(found, str):
            return None
        file = Path(found)
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        for i in range(256):
            content.seek(i * max(0, size - _BLOCK) // 255)
            digest.update(content.read(_BLOCK))
    return digest.hexdigest()


def table(file: Path) -> dict[str, dict]:
    """The tensors of a safetensors file: name -> ``dtype``, ``shape`` and ``place`` (first byte and the one behind)."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        try:
            entries = json.loads(content.read(size) if size <= _HEADER else b"")
        except ValueError:
            raise SafetensorError(f"{file} has no table of tensors") from None
    entries.pop("__metadata__", None)
    return {
        name: {**entry, "place": tuple(8 + size + offset for offset in entry["data_offsets"])}
        for name, entry in entries.items()
    }


def blocks(first: int, end: int, whole: bool) -> list[tuple[int, int]]:
    """What is read of a tensor's bytes, as (start, size)."""
    size = end - first
    if whole or size <= SAMPLED:
        return [(first, size)]
    return [(first + i * (size - _BLOCK) // 3, _BLOCK) for i in range(4)]
