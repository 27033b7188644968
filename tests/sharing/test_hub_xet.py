"""Xet: the real hf_xet client uploads to the tests' hub and downloads from it, alone and mixed with plain LFS."""

import hashlib
import json
import random
import re
import struct
import subprocess
import sys

import pytest
from huggingface_hub import HfApi

from hub import Fault
from hub.clients import environment
from hub.objects import Chunk, Damaged, Objects, chunks_of, unpack_lz4

pytest_plugins = ["hub.fixtures"]

PUSH = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("acme/x", exist_ok=True)
HfApi().upload_file(path_or_fileobj=sys.argv[1], path_in_repo="x.safetensors", repo_id="acme/x")
"""
PULL = """
import hashlib, sys
from huggingface_hub import hf_hub_download
print(hashlib.sha256(open(hf_hub_download("acme/x", "x.safetensors"), "rb").read()).hexdigest())
"""
MODES = {"xet": "0", "lfs": "1"}  # HF_HUB_DISABLE_XET


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Text, floats and noise, in two orders: how the first chunks pack best decides about the ones that follow."""
    draw, third, folder = random.Random(0), 500_000, tmp_path_factory.mktemp("weights")
    floats = b"".join(struct.pack("<f", draw.random()) for _ in range(third // 4))
    text, noise = b"a text that repeats itself " * (third // 27), draw.randbytes(third)
    (folder / "text").write_bytes(text + floats + noise)
    (folder / "floats").write_bytes(floats + text + noise)
    return folder


@pytest.fixture
def file(files):
    return files / "floats"


@pytest.fixture
def run(hub, tmp_path):
    """Run code as another machine: an empty home of its own."""

    def run(code: str, *arguments, mode: str = "xet", home: str = "home", fails: bool = False, **more) -> str:
        more |= {"HF_HUB_DISABLE_XET": MODES[mode], "HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms"}
        command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
        settings = environment(hub, tmp_path / home, **more)
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=280)
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout.strip()

    return run


def lines(hub, pattern: str) -> list[str]:
    return [request.line for request in hub.requests if re.search(pattern, request.line)]


@pytest.mark.parametrize(("up", "down"), [("xet", "xet"), ("xet", "lfs"), ("lfs", "xet")])
def test_every_client_reads_what_every_client_wrote(hub, run, file, up, down):
    run(PUSH, file, mode=up)
    assert run(PULL, mode=down, home="another") == hashlib.sha256(file.read_bytes()).hexdigest()
    by_xet = "files POST /v1/xorbs" if up == "xet" else "files PUT /large"
    assert len(lines(hub, by_xet)) == 1
    assert bool(lines(hub, "files GET /v1/reconstructions")) == (up == down == "xet")


@pytest.mark.parametrize(("name", "packings"), [("text", {0, 1}), ("floats", {0, 2})])
def test_every_packing_is_understood(hub, run, files, name, packings):
    """The hub takes a file in only when what it unpacks has the right sha256."""
    run(PUSH, files / name)
    (xorb,) = (hub.objects.folder / "xorbs").iterdir()
    packed = xorb.read_bytes()
    assert {packed[chunk.start + 4] for chunk in chunks_of(xorb.name, packed)} == packings


def test_no_hub_token_reaches_the_file_store(hub, run, file):
    run(PUSH, file)
    run(PULL, home="another")
    seen = [request for request in hub.requests if request.server == "files"]
    assert seen and not any("hf_" in f"{r.path}{r.query}{r.headers.get('authorization')}" for r in seen)
    secrets = [token.encode() for token in hub.tokens]
    assert not any(secret in request.body for request in seen for secret in secrets)


def test_an_upload_outlives_errors_and_cuts(hub, run, file):
    hub.faults += [Fault("POST /v1/xorbs", status=503), Fault("POST /v1/xorbs", cut_upload=100_000)]
    hub.faults += [Fault("POST /v1/shards", cut_reply=-1)]
    run(PUSH, file)
    assert all(fault.met.is_set() for fault in hub.faults)
    assert run(PULL, mode="lfs", home="another") == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_download_outlives_errors_and_cuts(hub, run, file):
    run(PUSH, file)
    hub.faults += [Fault("GET /v1/reconstructions", status=503), Fault("GET /xorbs", cut_reply=100_000)]
    assert run(PULL, home="another") == hashlib.sha256(file.read_bytes()).hexdigest()
    assert all(fault.met.is_set() for fault in hub.faults)


def test_an_upload_that_fails_leaves_nothing_to_see(hub, run, file):
    hub.faults.append(Fault("POST /v1/xorbs", times=100, status=403))
    run(PUSH, file, fails=True)
    api = HfApi(endpoint=hub.endpoint)
    assert api.list_repo_files("acme/x") == [".gitattributes"]
    hub.faults.clear()
    run(PUSH, file)
    assert "x.safetensors" in api.list_repo_files("acme/x")


def test_a_reading_token_gets_no_token_to_write(hub, run, file):
    HfApi(endpoint=hub.endpoint).create_repo("acme/x")
    reader = hub.add_token("alice", "read", orgs=("acme",))
    assert "403" in run(PUSH, file, fails=True, HF_TOKEN=reader)
    assert not lines(hub, "files POST /v1/xorbs")


# -- the store itself --------------------------------------------------------------------------------------------------


def test_a_reconstruction_covers_its_range(tmp_path):
    """Chunks of 10, 20 and 30 bytes of one xorb, then 5 of another: bytes 0-9, 10-29, 30-59, 60-64."""
    chunks = [Chunk("a", 4, 100, 108, 10), Chunk("a", 5, 108, 120, 20), Chunk("a", 6, 120, 150, 30)]
    chunks.append(Chunk("b", 0, 0, 9, 5))
    store = Objects(tmp_path)
    (tmp_path / "files" / "f").write_text(json.dumps(chunks))

    def spans(start, end):
        found = store.reconstruction("f", start, end, lambda xorb: f"at {xorb}")
        terms = [(t["hash"], t["range"]["start"], t["range"]["end"], t["unpacked_length"]) for t in found["terms"]]
        places = [
            (piece["url"], piece["url_range"]["start"], piece["url_range"]["end"])
            for pieces in found["fetch_info"].values()
            for piece in pieces
        ]
        return found["offset_into_first_range"], terms, places

    assert spans(0, None) == (0, [("a", 4, 7, 60), ("b", 0, 1, 5)], [("at a", 100, 149), ("at b", 0, 8)])
    assert spans(12, 31) == (2, [("a", 5, 7, 50)], [("at a", 108, 149)])
    assert spans(10, 30) == (0, [("a", 5, 6, 20)], [("at a", 108, 119)])
    assert spans(64, 1000) == (4, [("b", 0, 1, 5)], [("at b", 0, 8)])
    assert store.reconstruction("g", 0, None, str) is None
    with pytest.raises(Damaged, match="after the file's end"):
        spans(65, None)


def test_lz4():
    """A frame made by hand: literals "abc", a match 3 back of 7 bytes that overlaps itself, literals "!"; then a block
    that is not packed."""
    block = bytes([0x33]) + b"abc" + bytes([3, 0]) + bytes([0x10]) + b"!"
    plain = (0x80000000 | 2).to_bytes(4, "little") + b"xy"
    frame = bytes.fromhex("04224d18") + bytes([0x60, 0x40, 0]) + len(block).to_bytes(4, "little") + block + plain
    assert unpack_lz4(frame + bytes(4)) == b"abcabcabca!xy"


def test_what_is_damaged_is_refused(tmp_path):
    store = Objects(tmp_path)
    with pytest.raises(Damaged, match="sha256"):
        store.put("0" * 64, b"something")
    with pytest.raises(Damaged, match="cut off"):
        store.put_xorb("0" * 64, bytes([0, 9, 0, 0, 0, 9, 0, 0]) + b"too short"[:5])
    with pytest.raises(Damaged, match="cut off"):
        store.put_shard(bytes(48))
    assert not any((tmp_path / "large").iterdir()) and not any((tmp_path / "xorbs").iterdir())
