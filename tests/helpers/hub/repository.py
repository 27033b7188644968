"""A bare git repository under the Hub's rules, driven through the ``git`` binary."""

import contextlib
import functools
import json
import os
import re
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

LARGE = (".safetensors", ".parquet", ".arrow", ".bin", ".png", ".zip", ".gz")  # what .gitattributes gives to LFS
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
_NONE = "0" * 40


class Stale(Exception):
    """The branch has moved on from the parent that a commit names."""


class GitError(Exception):
    """What git refused, in its own words."""


class Entry(NamedTuple):
    """One line of a tree; ``lfs`` is (sha256, size) where the blob is a pointer."""

    path: str
    kind: str  # "file" or "directory"
    oid: str
    size: int
    lfs: tuple[str, int] | None


class Repository:
    """A repository of the Hub.

    Args:
        folder: the bare repository; its ``hub.json`` holds what git does not know.
    """

    _locks: dict[Path, threading.Lock] = {}

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = self._locks.setdefault(folder, threading.Lock())

    @classmethod
    def create(cls, folder: Path, facts: dict) -> "Repository":
        """A repository whose main branch holds .gitattributes; FileExistsError when there is one."""
        folder.mkdir(parents=True)
        repository = cls(folder)
        repository.git("init", "--quiet", "--bare", "--initial-branch=main", str(folder))
        repository.write_facts({**facts, "discussions": {}})
        repository.commit("refs/heads/main", "initial commit", {".gitattributes": ATTRIBUTES}, (), parent=None)
        return repository

    @property
    def facts(self) -> dict:
        return json.loads((self.folder / "hub.json").read_text())

    def write_facts(self, facts: dict) -> None:
        partial = self.folder / "hub.json.partial"
        partial.write_text(json.dumps(facts))
        os.replace(partial, self.folder / "hub.json")

    def git(self, *arguments: str, given: bytes = b"", **environment: str) -> bytes:
        """Run git here; -> its output."""
        people = {f"GIT_{who}_{what}": "hub" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = subprocess.run(
            ["git", "--git-dir", str(self.folder), *arguments],
            input=given,
            capture_output=True,
            env={"PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", **people, **environment},
        )
        if done.returncode or b"Ignoring path" in done.stderr:  # update-index skips a path that it does not take
            raise GitError(done.stderr.decode(errors="replace").strip())
        return done.stdout

    # -- refs ----------------------------------------------------------------------------------------------------------

    def refs(self) -> dict[str, str]:
        """Every ref -> the commit it points at."""
        lines = self.git("for-each-ref", "--format=%(refname) %(objectname) %(*objectname)").decode().splitlines()
        return {name: (peeled or oid) for name, oid, peeled in (line.split(" ") for line in lines)}

    def resolve(self, revision: str) -> str | None:
        """A branch, tag, ``refs/...`` name or full commit sha -> the commit sha, or None."""
        refs = self.refs()
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in refs:
                return refs[name]
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            with contextlib.suppress(GitError):
                return self.git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
        return None

    def branch_of(self, revision: str) -> str | None:
        """The ref that a commit to ``revision`` moves; None for tags, shas and what does not exist."""
        name = revision if revision.startswith("refs/pr/") else f"refs/heads/{revision}"
        return name if name in self.refs() else None

    def move(self, ref: str, new: str, old: str = _NONE) -> None:
        """Point ``ref`` elsewhere, atomically; Stale when it is not at ``old`` (by default: when it exists)."""
        try:
            self.git("update-ref", ref, new, old)
        except GitError as error:
            raise Stale(str(error)) from None

    # -- content -------------------------------------------------------------------------------------------------------

    def tree(self, commit: str) -> dict[str, Entry]:
        """Path -> entry, folders included."""
        return _read_tree(self.folder, commit)

    def blob(self, oid: str) -> bytes:
        return self.git("cat-file", "blob", oid)

    def history(self, commit: str) -> list[dict]:
        """Newest first: sha, time and title of every commit."""
        dates = "--date=format-local:%Y-%m-%dT%H:%M:%S.000Z"
        lines = self.git("log", dates, "--format=%H%x00%cd%x00%s", commit, TZ="UTC").decode().splitlines()
        return [dict(zip(("id", "date", "title"), line.split("\0"))) for line in lines]

    def commit(self, ref: str, message: str, files: dict[str, bytes], deleted, parent: str | None) -> str:
        """Commit on top of ``ref``; -> the new commit.

        Args:
            files: path -> content (a pointer for a large file).
            deleted: paths; one that ends in / is a folder.
            parent: what ``ref`` has to be at; None: wherever it is.

        Raises:
            Stale: ``ref`` is not at ``parent``.
            GitError: a path that git does not take.
        """
        with self.lock, tempfile.TemporaryDirectory() as scratch:
            head = self.refs().get(ref)
            if parent is not None and head != parent:
                raise Stale(f"{ref} is at {head}, not at {parent}")
            index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
            self.git("read-tree", head or "--empty", **index)
            lines = [f"0 {_NONE}\t{path}" for path in self._expand(head, deleted)]
            for path, content in files.items():
                oid = self.git("hash-object", "-w", "--stdin", given=content).decode().strip()
                lines.append(f"100644 {oid}\t{path}")
            self.git("update-index", "-z", "--index-info", given="\0".join([*lines, ""]).encode(), **index)
            tree = self.git("write-tree", **index).decode().strip()
            above = ["-p", head] if head else []
            new = self.git("commit-tree", tree, *above, given=message.encode()).decode().strip()
            self.move(ref, new, head or _NONE)
            return new

    def _expand(self, head: str | None, deleted) -> list[str]:
        """Deleted files and folders -> files."""
        known = [path for path, entry in self.tree(head).items() if entry.kind == "file"] if head else []
        paths = []
        for gone in deleted:
            found = [path for path in known if path == gone or (gone.endswith("/") and path.startswith(gone))]
            if not found:
                raise GitError(f"A file with this name doesn't exist: {gone}")
            paths += found
        return paths


def pointer(sha256: str, size: int) -> bytes:
    """What git keeps of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@functools.lru_cache(maxsize=256)
def _read_tree(folder: Path, commit: str) -> dict[str, Entry]:
    """A commit never changes, so what it holds is read once."""
    repository, entries = Repository(folder), {}
    for line in repository.git("ls-tree", "-r", "-t", "-l", "-z", commit).decode().split("\0")[:-1]:
        meta, path = line.split("\t", 1)
        _, kind, oid, size = meta.split()
        lfs = None
        if kind == "blob" and int(size) < 200 and (found := _POINTER.fullmatch(repository.blob(oid))):
            lfs = (found[1].decode(), int(found[2]))
        if kind == "tree":
            entries[path] = Entry(path, "directory", oid, 0, None)
        else:
            entries[path] = Entry(path, "file", oid, lfs[1] if lfs else int(size), lfs)
    return entries
