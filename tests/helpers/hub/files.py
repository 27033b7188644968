"""The file store: signed addresses for large files, and Xet's content-addressed store.

No Hub token is ever seen here.
"""

import re
import time

from .objects import Damaged
from .web import Refused, Reply, Request, as_json


def upload_large(hub, request: Request, sha256: str) -> Reply:
    check_signature(hub, request)
    try:
        hub.objects.put(sha256, request.body)
    except Damaged as error:
        raise Refused(400, str(error)) from None
    return Reply()


def download(hub, request: Request, kind: str, name: str) -> Reply:
    check_signature(hub, request)
    content = hub.objects.read(kind, name)
    if content is None:
        raise Refused(404, "no such file")
    return Reply(content, 200, {"Content-Type": "application/octet-stream", "ETag": f'"{name}"'})


def upload_xorb(hub, request: Request, name: str) -> Reply:
    check_xet_token(hub, request, "write")
    try:
        return as_json({"was_inserted": hub.objects.put_xorb(name, request.body)})
    except Damaged as error:
        raise Refused(400, str(error)) from None


def upload_shard(hub, request: Request) -> Reply:
    check_xet_token(hub, request, "write")
    try:
        hub.objects.put_shard(request.body)
    except Damaged as error:
        raise Refused(400, str(error)) from None
    return as_json({"result": 1})


def reconstruction(hub, request: Request, name: str) -> Reply:
    check_xet_token(hub, request, "read")
    # a range of the file: this request's Range header is not one of its own answer
    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.pop("range", "bytes=0-")).groups()
    end = int(last) + 1 if last else None
    try:
        found = hub.objects.reconstruction(name, int(first), end, lambda xorb: hub.signed(f"/xorbs/{xorb}"))
    except Damaged as error:
        raise Refused(416, str(error)) from None
    if found is None:
        raise Refused(404, "no such file")
    return as_json(found)


def check_signature(hub, request: Request) -> None:
    if request.query.get("signature") != hub.signature(request.path):
        raise Refused(403, "the address is not signed")


def check_xet_token(hub, request: Request, needed: str) -> None:
    scope, expires, signature = (request.headers.get("authorization", "")[len("Bearer ") :].split(".") + ["", ""])[:3]
    if signature != hub.signature(f"{scope}.{expires}") or int(expires) < time.time():
        raise Refused(401, "no valid Xet token")
    if needed == "write" and scope != "write":
        raise Refused(403, "a Xet token for reading")


_HASH = "([0-9a-f]{64})"
ROUTES = [
    ("PUT", re.compile(f"/large/{_HASH}"), upload_large),
    ("GET", re.compile(f"/(large|xorbs)/{_HASH}"), download),
    ("POST", re.compile(f"/v1/xorbs/default/{_HASH}"), upload_xorb),
    ("POST", re.compile("/v1/shards"), upload_shard),
    ("GET", re.compile(f"/v1/reconstructions/{_HASH}"), reconstruction),
]
