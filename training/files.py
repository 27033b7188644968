"""Writing files so that nobody ever reads half of one, that no two runs share, and that a full disk is told of by name.

Nothing is written in its place: a file or folder is made beside it first, then moved there. What fails to be written is
removed again.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from safetensors import SafetensorError

LOCK = ".lock"  # in the folder of a run

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# -- whole or not at all -----------------------------------------------------------------------------------------------


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as indented JSON, all of it or nothing; makes the folder."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file to the place that this gives; afterwards it is ``path``, or, whatever went wrong, it is gone.

    Raises:
        ValueError: ``path`` is a device or the like, which would be replaced.
        OSError: naming ``path``; see :func:`telling`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is neither a file nor a folder; name another place to write to.")
    with telling(path), scratch(path.with_name(f".{path.name}.partial")) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A file or folder that may be made at ``path``, and is gone afterwards unless it was moved away."""
    remove(path)
    try:
        yield path
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """Inside, a failed write raises an OSError that names ``path``, and says what is free where the disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is safetensors' word for a full disk
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or not isinstance(
            error, OSError
        )
        free = f" {free_bytes(path)} bytes are free there; make room, or choose another place." if full else ""
        raise OSError(f"Could not write {path}: {error}.{free}") from error


def free_bytes(path: Path) -> int:
    """What is free on the disk of ``path``, which need not exist."""
    path = path.absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def append(file: FileIO, content: bytes) -> None:
    """Append to a file that was opened unbuffered (``buffering=0``): all of it, on the disk, or nothing.

    Raises:
        OSError: naming the file; see :func:`telling`.
    """
    before, left = os.fstat(file.fileno()).st_size, memoryview(content)
    with telling(Path(file.name)):
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def move_in(partial: Path, folder: Path) -> None:
    """Move what a finished ``partial`` folder holds into ``folder`` and remove it.

    config.json goes first out of ``folder`` and last into it, so a folder with a config is complete. A move that was
    interrupted is repaired by doing it again from a new ``partial``.
    """
    (folder / "config.json").unlink(missing_ok=True)
    for entry in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        place = folder / entry.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(entry, place)
    partial.rmdir()


# -- one run at a time -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claim_folder(folder: str | Path, option: str = "--output-dir") -> Iterator[None]:
    """Have an output folder to oneself; it is made when missing, and gone afterwards if nothing was put there.

    The claim is a lock of the operating system on a hidden file in the folder, so it ends with the process, however
    that ends. Of several processes of one run, let the main one claim.

    Raises:
        ValueError: another run has the folder, or ``folder`` is a file.
        OSError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file; name a folder.")
    with _claim(folder / LOCK, f"{option} {folder}"):
        yield


@contextlib.contextmanager
def claim_file(path: str | Path, option: str = "--output") -> Iterator[None]:
    """Have an output file, which may not exist yet, to oneself. As :func:`claim_folder`; the lock lies beside it."""
    if Path(path).is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it.")
    with claim_beside(Path(path), option):
        yield


@contextlib.contextmanager
def claim_beside(path: Path, option: str) -> Iterator[None]:
    """Have a file or folder to oneself whose folder is anybody's."""
    with _claim(path.with_name(f".{path.name}.lock"), f"{option} {path}"):
        yield


@contextlib.contextmanager
def _claim(lock: Path, what: str) -> Iterator[None]:
    made = [folder for folder in lock.parents if not folder.exists()]  # deepest first
    try:
        try:
            file = _open_locked(lock)
        except OSError as error:
            raise OSError(f"{what} cannot be written to: {error}.") from error
        if file is None:
            with contextlib.suppress(OSError):
                what += f" ({lock.read_text(encoding='utf-8')})"
            raise ValueError(
                f"Another run is writing to {what}. Wait for its end, stop it, or choose another place for this one."
            )
        with file:
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}".encode())
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows keeps open files; there it stays, and locks nothing
                    if leads_to(lock, file):
                        lock.unlink()
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _open_locked(lock: Path) -> FileIO | None:
    """The lock file, open and locked; None when another process has it."""
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(lock, "ab", buffering=0)  # noqa: SIM115
        except FileNotFoundError:  # whoever had it is just cleaning up
            continue
        try:
            if not _lock(file):
                file.close()
                return None
        except BaseException:
            file.close()
            raise
        if leads_to(lock, file):
            return file
        file.close()  # whoever had it took the file away meanwhile


def _lock(file: FileIO) -> bool:
    """Lock an open file without waiting; -> whether it was free. Released when the file is closed or the process ends.

    A file system that knows no locks keeps nobody out.
    """
    try:
        if sys.platform == "win32":
            file.seek(1 << 30)  # after what the file says, which others are to read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            return True
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


def leads_to(path: Path, file: FileIO) -> bool:
    """Whether ``path`` leads to the open file: it was not removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
