"""The corpus of pretrain.py: a weighted mix of row files and Python source -> own tokenizer -> packed tokens.

Ours; the paper starts from existing targets. Everything follows from the configuration and its seed, and is made once:

    work/tokenizer/     byte-level BPE with a ChatML template
    work/train.bin      uint16: document <|endoftext|> document <|endoftext|> ...
    work/heldout.bin    the same for the held-out rows
    work/corpus.json    what was read, under which licence; written last, so it says that the rest is there
"""

import hashlib
import importlib.metadata
import json
import os
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ppow.training.data import BadRows, Row, load_rows
from ppow.training.files import telling, whole, write_json

if TYPE_CHECKING:
    from .pretrain import PretrainConfig

END_OF_TEXT, IM_START, IM_END, PAD = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
# ChatML. The generation block tells which tokens are answers; the end-of-turn token is one, the model has to say it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Words carry their leading space, digits stand alone (a small model adds digit by digit), line breaks end a piece.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_CHARS = 20_000_000  # characters that the BPE is trained on; more does not change 4096 merges noticeably
SAMPLE_PROMPTS = 6

PERMISSIVE = re.compile(r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation)\b", re.IGNORECASE)
COPYLEFT = re.compile(r"GPL|MPL|EPL|General Public|Mozilla Public", re.IGNORECASE)
# Tests and tables teach little; the bounds leave out stubs and generated files.
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
NOT_READ |= {"ensurepip"}
SOURCE_BYTES = range(501, 60_000)


def prepare(config: "PretrainConfig", work: Path):
    """Make what ``work`` lacks, and read it.

    Returns:
        (tokenizer, training tokens (N,) uint16, held-out tokens (M,) uint16, the content of corpus.json)

    Raises:
        ValueError: a group without files, rows of another form, no rows left, less than one sequence of tokens.
    """
    done = work / "corpus.json"
    if not done.exists():
        train, heldout, record = build(config)
        tokenizer = train_tokenizer(train, config.vocab_size, config.max_positions)
        with telling(work / "tokenizer"):
            tokenizer.save_pretrained(work / "tokenizer")
        record["train_tokens"] = write_tokens(train, tokenizer, work / "train.bin")
        record["heldout_tokens"] = write_tokens(heldout, tokenizer, work / "heldout.bin")
        chats = [row["messages"][0]["content"] for row in heldout if "messages" in row]
        record["prompts"] = chats[:SAMPLE_PROMPTS]
        write_json(done, record)
    record = json.loads(done.read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    train, heldout = (np.fromfile(work / f"{name}.bin", dtype=np.uint16) for name in ("train", "heldout"))
    if len(train) <= config.sequence_length:
        raise ValueError(
            f"The corpus has {len(train)} tokens, not one sequence of {config.sequence_length} and the token after it; "
            "add groups or lower --sequence-length, with another --output."
        )
    return tokenizer, train, heldout, record


# -- rows --------------------------------------------------------------------------------------------------------------


def build(config: "PretrainConfig") -> tuple[list[dict], list[dict], dict]:
    """Training rows (repeated by weight, shuffled), held-out rows (each once) and a JSON record of what was read."""
    rng = random.Random(config.seed)
    train, heldout, record = [], [], {"groups": {}, "python": []}
    dropped = {"bad rows": 0, "longer than its group's limit": 0, "spells a special token": 0}
    for name, weight, max_chars in config.mix():
        bad = BadRows(config.skip_bad_rows)
        found = [row for path in group_files(Path(config.data), name) for row in read_texts(path, bad)]
        bad.report(f"{config.data}, group {name}")
        dropped["bad rows"] += len(bad.found)
        rows = [row for row in found if sum(map(len, texts(row))) <= max_chars]
        dropped["longer than its group's limit"] += len(found) - len(rows)
        dropped["spells a special token"] += sum(map(spells_special, rows))
        record["groups"][name] = {"weight": weight, "rows": len(rows)}
        train += split(rows, weight, config, rng, heldout)
    if config.python_share:
        chars = sum(len(text) for row in train for text in texts(row))
        wanted = chars * config.python_share / (1 - config.python_share)
        rows, record["python"] = read_python(config.python_packages, wanted, rng)
        train += split(rows, 1.0, config, rng, heldout)
    if not train:
        raise ValueError(f"--groups {','.join(config.groups)} left no rows of {config.data}; raise weights or limits.")
    rng.shuffle(train)
    rng.shuffle(heldout)
    record |= {"train_rows": len(train), "heldout_rows": len(heldout), "dropped": dropped}
    return train, heldout, record


def group_files(folder: Path, name: str) -> list[Path]:
    """The files ``name-NN.jsonl.xz``, in order. Raises ValueError where there are none."""
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"--data {folder} {problem}; give a folder of GROUP-NN.jsonl.xz files.")
    pattern = re.compile(r"(.+)-\d+\.jsonl\.xz")
    found = [(match[1], path) for path in sorted(folder.glob("*.jsonl.xz")) if (match := pattern.fullmatch(path.name))]
    files = [path for group, path in found if group == name]
    if not files:
        known = ", ".join(sorted({group for group, _ in found})) or "none"
        raise ValueError(f"No {name}-NN.jsonl.xz in {folder}; groups there: {known}. Correct --groups or --data.")
    return files


def read_texts(path: Path, bad: BadRows) -> list[Row]:
    """The rows of a file; the template of this target knows no tools, so a chat that calls them is a bad row."""
    rows = []
    for row in load_rows(str(path), bad=bad):
        if all(message["content"] is not None for message in row.get("messages", ())):
            rows.append(row)
        else:
            bad.add(row.place, "a call of a tool has no text for a target without tools.")
    return rows


def texts(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"]] if "messages" in row else [row["text"]]


def spells_special(row: dict) -> bool:
    """Whether a text spells a special token, and would teach the model to break its own chat format."""
    return any(token in text for text in texts(row) for token in SPECIAL_TOKENS)


def split(rows: list[dict], weight: float, config: "PretrainConfig", rng: random.Random, heldout: list) -> list[dict]:
    """Each row floor(weight) or ceil(weight) times; rows held out go to ``heldout`` instead, once.

    Rows that start with the same text, such as the answers to one prompt, fall on the same side.
    """
    kept = []
    for row in rows:
        copies = int(weight) + (rng.random() < weight % 1)
        if not copies or spells_special(row):
            continue
        digest = hashlib.sha256(f"{config.seed}\n{texts(row)[0]}".encode()).digest()
        if int.from_bytes(digest[:8], "big") < config.heldout * 2**64:
            heldout.append(row)
        else:
            kept += [row] * copies
    return kept


def read_python(packages: list[str], max_chars: float, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Python files of the running environment in random order, and name, version and licence of their sources.

    Args:
        packages: installed distributions to read besides the standard library.
        max_chars: stop after so many characters.

    Raises:
        ValueError: a package that is not installed or not permissively licensed.
    """
    home = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in home.rglob("*.py") if not NOT_READ & set(path.relative_to(home).parts)]
    sources = [{"name": "Python standard library", "version": sys.version.split()[0], "licence": "PSF-2.0"}]
    for name in packages:
        licence = package_licence(name)
        if not PERMISSIVE.search(licence) or COPYLEFT.search(licence):
            raise ValueError(f"Package {name} has the licence {licence or 'unknown'!r}, not a permissive one; drop it.")
        own = [path for path in importlib.metadata.files(name) or [] if path.suffix == ".py"]
        files += [Path(path.locate()) for path in own if not NOT_READ & set(path.parts)]
        sources.append({"name": name, "version": importlib.metadata.version(name), "licence": licence})
    files = sorted(path for path in files if path.is_file() and path.stat().st_size in SOURCE_BYTES)
    rng.shuffle(files)
    rows, chars = [], 0
    for path in files:
        if chars >= max_chars:
            break
        rows.append({"text": path.read_text(encoding="utf-8", errors="replace")})
        chars += len(rows[-1]["text"])
    return rows, sources


def package_licence(name: str) -> str:
    """The licence that an installed distribution declares: SPDX expression, else classifiers, else free text."""
    try:
        meta = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"Package {name!r} is not installed; pip install it or drop it from --python-packages."
        ) from None
    classifiers = [line for line in meta.get_all("Classifier") or [] if line.startswith("License ::")]
    named = " / ".join(line.split(" :: ")[-1] for line in classifiers)
    return meta.get("License-Expression") or named or (meta.get("License") or "").partition("\n")[0]


# -- tokens ------------------------------------------------------------------------------------------------------------


def train_tokenizer(rows: list[dict], vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the first ``TOKENIZER_CHARS`` characters of ``rows``; eos ``<|im_end|>``, pad ``<|pad|>``."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_tokenizer_texts(rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_texts(rows: list[dict]) -> Iterator[str]:
    chars = 0
    for row in rows:
        # Role names are part of every rendered turn and deserve a token each.
        yield from (message["role"] for message in row.get("messages", ()))
        for text in texts(row):
            yield text
            chars += len(text)
        if chars > TOKENIZER_CHARS:
            return


def write_tokens(rows: list[dict], tokenizer, path: Path) -> int:
    """Write the rendered rows, ``<|endoftext|>`` after each, as uint16; returns the number of tokens."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    total = 0
    with whole(path) as partial, partial.open("wb") as file:
        for start in tqdm(range(0, len(rows), 1000), desc=f"tokenizing {path.stem}", unit="k rows", disable=None):
            rendered = [
                tokenizer.apply_chat_template(row["messages"], tokenize=False) if "messages" in row else row["text"]
                for row in rows[start : start + 1000]
            ]
            for ids in tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]:
                file.write(np.array([*ids, end], dtype=np.uint16).tobytes())
                total += len(ids) + 1
        file.flush()
        os.fsync(file.fileno())
    return total
