"""HTTP for both servers: one dispatch, replies with ranges, a record of requests, and faults on demand."""

import contextlib
import json
import re
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit


class Refused(Exception):
    """An answer other than success, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str = "", **more: str):
        super().__init__(message)
        line = " ".join(message.encode("ascii", "replace").decode().split())  # of a header
        headers = {"X-Error-Message": line} | ({"X-Error-Code": code} if code else {})
        self.reply = Reply(json.dumps({"error": message, **more}).encode(), status, headers)


class Reply(NamedTuple):
    body: bytes = b""
    status: int = 200
    headers: dict = {}


def as_json(content, status: int = 200, **headers: str) -> Reply:
    return Reply(json.dumps(content).encode(), status, {"Content-Type": "application/json", **headers})


@dataclass
class Request:
    """What a client asked for, as the record of a hub keeps it."""

    server: str  # "api" or "files"
    method: str
    path: str  # still quoted
    query: dict
    headers: dict
    body: bytes = field(repr=False)

    @property
    def line(self) -> str:
        return f"{self.server} {self.method} {self.path}"

    def json(self) -> dict:
        return json.loads(self.body or b"{}")


@dataclass
class Fault:
    """Something that goes wrong with the next ``times`` requests whose line (``files PUT /lfs/...``) matches.

    Attributes:
        status: answered instead of doing anything.
        cut_upload: bytes of the request's body after which the connection is cut; nothing is done then.
        cut_reply: bytes of the answer's body after which the connection is cut; -1: not even its headers.
        seconds: waited before anything else.
        until: waited for before anything else: an event, or a barrier of several requests.
        met: set when the fault strikes.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    cut_upload: int | None = None
    cut_reply: int | None = None
    seconds: float = 0.0
    until: threading.Event | threading.Barrier | None = None
    met: threading.Event = field(default_factory=threading.Event)


class Server(ThreadingHTTPServer):
    """One port of a hub.

    Args:
        name: ``api`` or ``files``, how the record and the faults call it.
        hub: asked for faults, told of requests.
        routes: (method, compiled pattern of the quoted path, function of (hub, request, *groups) -> Reply).
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, name: str, port: int, hub, routes):
        self.name, self.hub, self.routes = name, hub, routes
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """Stop, and cut every connection as a crash would."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            cut(connection)

    def handle_error(self, request, client_address):
        """Connections that a client or a fault has cut are nothing to report; anything else is a mistake of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.hub.errors.append(traceback.format_exc())

    def answer(self, request: Request) -> Reply:
        method = "GET" if request.method == "HEAD" else request.method
        for allowed, pattern, function in self.routes:
            if allowed == method and (found := pattern.fullmatch(request.path)):
                try:
                    return function(self.hub, request, *found.groups())
                except Refused as refusal:
                    return refusal.reply
        return Refused(404, f"{request.method} {request.path} is not served here").reply


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.connections.add(self.connection)

    def finish(self):
        self.server.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_):
        """The hub keeps a record instead."""

    def serve(self):
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.server.name, self.command, url.path, query, headers, b"")
        fault = self.server.hub.strike(request.line)
        if fault:
            time.sleep(fault.seconds)
            if fault.until:
                fault.until.wait()
            if fault.cut_upload is not None:
                self.rfile.read(min(fault.cut_upload, int(headers.get("content-length", 0))))
                return self.cut()
        request.body = self.read_body(headers)
        if request.body is None:
            return self.cut()
        self.server.hub.requests.append(request)
        if fault and fault.status:
            reply = Refused(fault.status, "a fault of the test", "").reply
        else:
            reply = self.server.answer(request)
        self.send(reply, headers.get("range"), fault.cut_reply if fault else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self, headers: dict) -> bytes | None:
        """The whole body, or None when the client went away before its end."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(headers.get("content-length", 0))
        body = self.rfile.read(length)
        return body if len(body) == length else None

    def send(self, reply: Reply, wanted: str | None, cut_after: int | None) -> None:
        body, status, headers = reply.body, reply.status, dict(reply.headers)
        if wanted and status == 200 and self.command == "GET":
            body, status, headers = part_of(body, wanted, headers)
        if cut_after == -1:
            return self.cut()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut_after is None else body[:cut_after])
        if cut_after is not None:
            self.cut()

    def cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        cut(self.connection)


def cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def part_of(body: bytes, wanted: str, headers: dict) -> tuple[bytes, int, dict]:
    """Answer ``Range: bytes=a-b``; -> body, status, headers."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    start, end = int(found[1]), min(int(found[2] or len(body) - 1), len(body) - 1)
    if start > end:
        return b"", 416, {"Content-Range": f"bytes */{len(body)}"}
    return body[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(body)}"}
