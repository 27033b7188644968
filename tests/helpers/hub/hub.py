"""The hub itself: its folder, tokens and permissions, and its two servers."""

import contextlib
import hashlib
import hmac
import re
import secrets
import threading
import time
from pathlib import Path
from typing import NamedTuple

from . import api, files
from .objects import Objects
from .ports import reserved_port
from .repository import Repository
from .web import Fault, Refused, Request, Server

KINDS = ("models", "datasets", "spaces")


class Token(NamedTuple):
    """Who an access token stands for, and what it may do until when."""

    user: str
    role: str  # "read" or "write"
    namespaces: tuple[str, ...]
    expires: float


class Hub:
    """A running hub. Use as a context manager, or call :meth:`stop`.

    Args:
        folder: where everything is kept.
        port: of HF_ENDPOINT; 0: a free one. Files are served on another free port.

    Attributes:
        requests: everything that was asked, for tests to look at.
        errors: tracebacks of the hub's own mistakes; a test fails when there are any.
    """

    def __init__(self, folder: Path, port: int = 0):
        self.objects = Objects(folder / "objects")
        self.repositories = folder / "repositories"
        self.tokens: dict[str, Token] = {}
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.faults: list[Fault] = []
        self._secret = secrets.token_bytes(16)
        self._lock = threading.Lock()
        self._held = contextlib.ExitStack()  # nobody else gets the ports between a stop and a start
        self._ports = (port or self._held.enter_context(reserved_port()), self._held.enter_context(reserved_port()))
        self.start()

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self._held.close()

    def start(self) -> None:
        """Serve, after :meth:`stop` on the same ports."""
        self._api = Server("api", self._ports[0], self, api.ROUTES)
        self._files = Server("files", self._ports[1], self, files.ROUTES)

    def stop(self) -> None:
        """Cut every connection, as a crash would."""
        self._api.close()
        self._files.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def files(self) -> str:
        """Address of the file store; on a host name of its own, where clients must not send the Hub's token."""
        return f"http://localhost:{self._ports[1]}"

    def strike(self, line: str) -> Fault | None:
        """The fault that befalls a request, if any; it is used up by one."""
        with self._lock:
            fault = next((fault for fault in self.faults if fault.times and re.search(fault.pattern, line)), None)
            if fault:
                fault.times -= 1
                fault.met.set()
            return fault

    # -- people --------------------------------------------------------------------------------------------------------

    def add_token(self, user: str, role: str = "write", orgs: tuple[str, ...] = (), seconds: float = 86400) -> str:
        """A new access token that expires after ``seconds``."""
        token = f"hf_{secrets.token_hex(17)}"
        self.tokens[token] = Token(user, role, (user, *orgs), time.time() + seconds)
        return token

    def who(self, request: Request) -> Token | None:
        """Who asks; None without a token. Refuses unknown and expired ones."""
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        if not text:
            return None
        token = self.tokens.get(text)
        if scheme.lower() != "bearer" or token is None or token.expires < time.time():
            raise Refused(401, "Invalid credentials in Authorization header")
        return token

    def open(self, request: Request, kind: str, name: str, write: bool = False) -> Repository:
        """A repository that whoever asks may read (or write), or a refusal as the Hub words it."""
        who, folder = self.who(request), self.folder_of(kind, name)
        repository = Repository(folder) if (folder / "hub.json").is_file() else None
        inside = who is not None and name.split("/")[0] in who.namespaces
        if repository is None or (repository.facts["private"] and not inside):
            raise Refused(404 if who else 401, "Repository not found", "RepoNotFound")
        if write and who is None:
            raise Refused(401, "Invalid username or password.")
        if write and (who.role != "write" or not inside):
            raise Refused(403, "You don't have the rights to write to this repository")
        return repository

    def folder_of(self, kind: str, name: str) -> Path:
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            raise Refused(400, f"Invalid repo name: {name}")
        return self.repositories / kind / f"{name}.git"

    # -- signed addresses ----------------------------------------------------------------------------------------------

    def signature(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()[:32]

    def signed(self, path: str) -> str:
        """An address in the file store that needs no token."""
        return f"{self.files}{path}?signature={self.signature(path)}"

    def xet_token(self, scope: str, seconds: int = 3600) -> tuple[str, int]:
        """A token of the Xet store for ``read`` or ``write``, and when it expires."""
        expires = int(time.time()) + seconds
        return f"{scope}.{expires}.{self.signature(f'{scope}.{expires}')}", expires
