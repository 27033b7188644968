"""Large files by their sha256, and the Xet store: files as ranges of chunks in xorbs.

A file that came by Xet is put together and checked against its sha256 when its shard arrives, and kept whole besides,
so that clients with and without Xet can read it. Formats: github.com/huggingface/xet-core, xet_core_structures.
"""

import hashlib
import itertools
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

_END = b"\xff" * 32  # bookend of a shard's sections
_VERIFIED, _DESCRIBED = 1 << 31, 1 << 30


class Damaged(Exception):
    """What arrived is not what was announced."""


class Chunk(NamedTuple):
    """A chunk of a file: number ``index`` of xorb ``xorb``, its bytes there, and its length when unpacked."""

    xorb: str
    index: int
    start: int
    end: int
    length: int


class Objects:
    """The store of one hub, in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("large", "xorbs", "files", "hashes"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    # -- large files ---------------------------------------------------------------------------------------------------

    def has(self, sha256: str, size: int) -> bool:
        path = self.folder / "large" / sha256
        return path.is_file() and path.stat().st_size == size

    def read(self, kind: str, name: str) -> bytes | None:
        """A large file (``large``) or a xorb (``xorbs``); None when there is none."""
        path = self.folder / kind / name
        return path.read_bytes() if path.is_file() else None

    def put(self, sha256: str, content: bytes) -> None:
        """Keep a large file; Damaged when it is another one than its name says."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Damaged(f"{len(content)} bytes arrived, and their sha256 is not {sha256}")
        self._write("large", sha256, content)

    def _write(self, kind: str, name: str, content: bytes) -> None:
        handle, partial = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(partial, self.folder / kind / name)

    # -- Xet -----------------------------------------------------------------------------------------------------------

    def xet_hash(self, sha256: str) -> str | None:
        """How Xet calls a large file; None when it did not come by Xet."""
        path = self.folder / "hashes" / sha256
        return path.read_text() if path.is_file() else None

    def put_xorb(self, name: str, content: bytes) -> bool:
        """Keep a xorb; -> whether it is new."""
        chunks_of(name, content)
        new = not (self.folder / "xorbs" / name).is_file()
        self._write("xorbs", name, content)
        return new

    def put_shard(self, content: bytes) -> None:
        """Take in the files that a shard describes. Damaged when one does not give its sha256."""
        for name, sha256, terms in files_of(content):
            chunks = []
            for xorb, first, last in terms:
                stored = self.read("xorbs", xorb)
                if stored is None:
                    raise Damaged(f"a shard names xorb {xorb}, which was never uploaded")
                chunks += chunks_of(xorb, stored)[first:last]
            self.put(sha256, b"".join(unpack(self.read("xorbs", chunk.xorb), chunk) for chunk in chunks))
            self._write("files", name, json.dumps(chunks).encode())
            self._write("hashes", sha256, name.encode())

    def reconstruction(self, name: str, start: int, end: int | None, url) -> dict | None:
        """How to put bytes ``start`` to ``end`` (excluded) of a file together; None for an unknown file.

        Args:
            url: xorb -> where to fetch it.

        Raises:
            Damaged: the file ends before ``start``.
        """
        stored = self.read("files", name)
        if stored is None:
            return None
        chunks = [Chunk(*chunk) for chunk in json.loads(stored)]
        ends = list(itertools.accumulate(chunk.length for chunk in chunks))
        if start >= (ends[-1] if ends else 0):
            raise Damaged("the range starts after the file's end")
        wanted = [
            i for i in range(len(chunks)) if ends[i] > start and (end is None or ends[i] - chunks[i].length < end)
        ]
        terms, fetch = [], {}
        # consecutive chunks of one xorb are one term
        for _, group in itertools.groupby(wanted, key=lambda i: (chunks[i].xorb, chunks[i].index - i)):
            run = [chunks[i] for i in group]
            place = {"start": run[0].index, "end": run[-1].index + 1}
            xorb = run[0].xorb
            terms.append({"hash": xorb, "range": place, "unpacked_length": sum(chunk.length for chunk in run)})
            where = {"start": run[0].start, "end": run[-1].end - 1}
            fetch.setdefault(xorb, []).append({"range": place, "url": url(xorb), "url_range": where})
        skipped = start - (ends[wanted[0]] - chunks[wanted[0]].length)
        return {"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetch}


def chunks_of(xorb: str, content: bytes) -> list[Chunk]:
    """The chunks of a xorb, each behind a header of 8 bytes: version, packed length (3), scheme, length (3)."""
    chunks, at = [], 0
    while at < len(content) and content[at : at + 7] != b"XETBLOB":
        packed = int.from_bytes(content[at + 1 : at + 4], "little")
        length = int.from_bytes(content[at + 5 : at + 8], "little")
        chunks.append(Chunk(xorb, len(chunks), at, at + 8 + packed, length))
        at += 8 + packed
    if not chunks or chunks[-1].end > len(content):
        raise Damaged(f"xorb {xorb} is cut off")
    return chunks


def unpack(xorb: bytes, chunk: Chunk) -> bytes:
    """The content of a chunk: stored, LZ4, or LZ4 of its bytes grouped by their place modulo 4."""
    scheme, packed = xorb[chunk.start + 4], xorb[chunk.start + 8 : chunk.end]
    content = packed if scheme == 0 else unpack_lz4(packed)
    if scheme == 2:
        grouped, content, at = content, bytearray(len(content)), 0
        for place in range(4):
            size = len(content[place::4])
            content[place::4] = grouped[at : at + size]
            at += size
    if len(content) != chunk.length:
        raise Damaged(f"chunk {chunk.index} of xorb {chunk.xorb} does not have its length")
    return bytes(content)


def unpack_lz4(packed: bytes) -> bytes:
    """An LZ4 frame, unpacked."""
    flags = packed[4]
    at = 7 + (8 if flags & 0x08 else 0) + (4 if flags & 0x01 else 0)  # content size and dictionary id
    out = bytearray()
    while size := int.from_bytes(packed[at : at + 4], "little"):
        block = packed[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        at += 4 + len(block) + (4 if flags & 0x10 else 0)  # and its checksum
        if size >> 31:
            out += block
        else:
            _unpack_block(block, out)
    return bytes(out)


def _unpack_block(block: bytes, out: bytearray) -> None:
    at = 0

    def length(nibble: int) -> int:
        nonlocal at
        total, more = nibble, nibble == 15
        while more:
            total, more = total + block[at], block[at] == 255
            at += 1
        return total

    while at < len(block):
        token = block[at]
        at += 1
        literals = length(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            return
        back = block[at] | block[at + 1] << 8
        at += 2
        rest = length(token & 15) + 4
        while rest:  # a match may overlap what it writes
            piece = out[-back : len(out) - back + min(rest, back)]
            out += piece
            rest -= len(piece)


def files_of(shard: bytes) -> list[tuple[str, str, list[tuple[str, int, int]]]]:
    """Every file of a shard: Xet hash, sha256 and its (xorb, first chunk, last chunk excluded)."""
    found, at = [], 48  # behind the header
    while (name := shard[at : at + 32]) != _END:
        if len(name) < 32:
            raise Damaged("a shard is cut off")
        flags, count = struct.unpack_from("<II", shard, at + 32)
        entries = [shard[at + 48 * (i + 1) : at + 48 * (i + 2)] for i in range(count)]
        terms = [(hex_of(entry[:32]), *struct.unpack_from("<II", entry, 40)) for entry in entries]
        at += 48 * (1 + count * (2 if flags & _VERIFIED else 1))
        if not flags & _DESCRIBED:
            raise Damaged("a shard's file lacks its sha256")
        found.append((hex_of(name), hex_of(shard[at : at + 32]), terms))
        at += 48
    return found


def hex_of(digest: bytes) -> str:
    """Xet writes hashes as four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
