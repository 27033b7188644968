"""What the clients ask on HF_ENDPOINT: repositories, trees, commits, refs, pull requests, and addresses of files."""

import base64
import binascii
import json
import re
from urllib.parse import parse_qs, unquote

import yaml

from .repository import LARGE, Entry, GitError, Repository, Stale, pointer
from .web import Refused, Reply, Request, as_json

REGULAR_LIMIT = 10 * 1024 * 1024  # larger files are LFS whatever they are called


# -- people and repositories -------------------------------------------------------------------------------------------


def whoami(hub, request: Request) -> Reply:
    who = hub.who(request)
    if who is None:
        raise Refused(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name in who.namespaces[1:]]
    token = {"accessToken": {"displayName": "test", "role": who.role}}
    return as_json({"type": "user", "name": who.user, "fullname": who.user, "orgs": orgs, "auth": token})


def create(hub, request: Request) -> Reply:
    who, wanted = hub.who(request), request.json()
    if who is None:
        raise Refused(401, "Invalid username or password.")
    name = f"{wanted.get('organization') or who.user}/{wanted['name']}"
    kind = f"{wanted.get('type') or 'model'}s"
    address = f"{hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
    if who.role != "write" or name.split("/")[0] not in who.namespaces:
        raise Refused(403, f"You don't have the rights to create a {kind[:-1]} under this namespace")
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    try:
        Repository.create(hub.folder_of(kind, name), {"private": private, "sdk": wanted.get("sdk")})
    except FileExistsError:
        return as_json({"error": "You already created this repo", "url": address}, 409)
    return as_json({"url": address, "name": name})


def validate_card(hub, request: Request) -> Reply:
    """The front matter of a README: YAML, and a mapping."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", request.json()["content"], re.S)
    try:
        problem = None if isinstance(yaml.safe_load(found[1]) if found else {}, dict) else "the metadata is no mapping"
    except yaml.YAMLError as error:
        problem = f"invalid YAML: {error}"
    errors = [{"message": problem}] if problem else []
    return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def info(hub, request: Request, kind: str, name: str, revision: str = "main") -> Reply:
    repository = hub.open(request, kind, name)
    commit = commit_of(repository, revision)
    tree, facts, history = repository.tree(commit), repository.facts, repository.history(commit)
    files = [item(hub, entry) for entry in tree.values() if entry.kind == "file"]
    siblings = [{"rfilename": i["path"], "size": i["size"], "blobId": i["oid"]} for i in files]
    card = repository.blob(tree["README.md"].oid).decode() if "README.md" in tree else ""
    found = re.match(r"---\n(.*?)\n---", card, re.S)
    return as_json(
        {
            "id": name,
            "author": name.split("/")[0],
            "sha": commit,
            "private": facts["private"],
            "gated": False,
            "disabled": False,
            "lastModified": history[0]["date"],
            "createdAt": history[-1]["date"],
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "cardData": yaml.safe_load(found[1]) if found else {},
            "siblings": siblings,
            "sdk": facts["sdk"],
        }
    )


def commit_of(repository: Repository, revision: str) -> str:
    commit = repository.resolve(unquote(revision))
    if commit is None:
        raise Refused(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
    return commit


# -- files -------------------------------------------------------------------------------------------------------------


def item(hub, entry: Entry, last: dict | None = None) -> dict:
    """A file or folder as tree listings show it; ``last`` is the commit to name."""
    shown = {"type": entry.kind, "path": entry.path, "oid": entry.oid, "size": entry.size}
    if entry.lfs:
        sha256, size = entry.lfs
        shown["lfs"] = {"oid": sha256, "size": size, "pointerSize": len(pointer(sha256, size))}
        if xet := hub.objects.xet_hash(sha256):
            shown["xetHash"] = xet
    return shown | ({"lastCommit": last} if last else {})


def tree(hub, request: Request, kind: str, name: str, revision: str, path: str | None) -> Reply:
    repository = hub.open(request, kind, name)
    commit = commit_of(repository, revision)
    entries, folder = repository.tree(commit), unquote(path or "").strip("/")
    if folder and (folder not in entries or entries[folder].kind != "directory"):
        raise Refused(404, f"{folder} does not exist on {unquote(revision)}", "EntryNotFound")
    inside = f"{folder}/" if folder else ""
    found = [entry for entry in entries.values() if entry.path.startswith(inside)]
    if request.query.get("recursive", "").lower() not in ("true", "1"):
        found = [entry for entry in found if "/" not in entry.path[len(inside) :]]
    return as_json([item(hub, entry, last_commit(request, repository, commit)) for entry in found])


def paths_info(hub, request: Request, kind: str, name: str, revision: str) -> Reply:
    repository = hub.open(request, kind, name)
    commit = commit_of(repository, revision)
    if "json" in request.headers.get("content-type", ""):
        asked = request.json()
        paths, expand = asked["paths"], asked.get("expand")
    else:
        asked = parse_qs(request.body.decode())
        paths, expand = asked.get("paths", []), asked.get("expand", ["false"])[0].lower() in ("true", "1")
    entries = repository.tree(commit)
    last = repository.history(commit)[0] if expand else None
    return as_json([item(hub, entries[path], last) for path in paths if path in entries])


def last_commit(request: Request, repository: Repository, commit: str) -> dict | None:
    return repository.history(commit)[0] if request.query.get("expand", "").lower() in ("true", "1") else None


def resolve(hub, request: Request, kind: str | None, name: str, revision: str, path: str) -> Reply:
    kind = (kind or "models/").rstrip("/")
    repository = hub.open(request, kind, name)
    commit = commit_of(repository, revision)
    entry = repository.tree(commit).get(unquote(path))
    seen = {"X-Repo-Commit": commit}
    if entry is None or entry.kind != "file":
        missing = Refused(404, "Entry not found", "EntryNotFound").reply
        return missing._replace(headers={**missing.headers, **seen})
    if entry.lfs is None:
        return Reply(repository.blob(entry.oid), 200, {**seen, "ETag": f'"{entry.oid}"', "Accept-Ranges": "bytes"})
    sha256, size = entry.lfs
    seen |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(size), "Location": hub.signed(f"/large/{sha256}")}
    if xet := hub.objects.xet_hash(sha256):
        address = f"{hub.endpoint}/api/{kind}/{name}/xet-read-token/{commit}"
        seen |= {"X-Xet-Hash": xet, "Link": f'<{address}>; rel="xet-auth"'}
    return Reply(b"", 302, seen)


# -- commits -----------------------------------------------------------------------------------------------------------


def open_to_commit(hub, request: Request, kind: str, name: str) -> Repository:
    """A pull request may be opened by anyone who may write somewhere and can see the repository."""
    if "create_pr" not in request.query:
        return hub.open(request, kind, name, write=True)
    who = hub.who(request)
    if who is None or who.role != "write":
        raise Refused(403 if who else 401, "This token does not allow to open pull requests")
    return hub.open(request, kind, name)


def preupload(hub, request: Request, kind: str, name: str, revision: str) -> Reply:
    repository = open_to_commit(hub, request, kind, name)
    entries, answers = repository.tree(commit_of(repository, revision)), []
    for file in request.json()["files"]:
        path = file["path"]
        large = path.endswith(LARGE) or file["size"] > REGULAR_LIMIT
        answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in entries:
            answer["oid"] = entries[path].lfs[0] if entries[path].lfs else entries[path].oid
        answers.append(answer)
    return as_json({"files": answers})


def commit(hub, request: Request, kind: str, name: str, revision: str) -> Reply:
    repository = open_to_commit(hub, request, kind, name)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    files, deleted, header = operations(hub, lines)
    commit_of(repository, revision)
    ref = repository.branch_of(unquote(revision))
    if ref is None:
        raise Refused(400, f"{unquote(revision)} is not a branch")
    answer = {}
    try:
        if "create_pr" in request.query:
            with repository.lock:
                if header.get("parentCommit") not in (None, repository.refs()[ref]):
                    raise Stale(f"{ref} is at another commit")
                number, ref = open_pull_request(repository, header["summary"], ref)
            answer["pullRequestUrl"] = f"{address_of(hub, kind, name)}/discussions/{number}"
            header.pop("parentCommit", None)
        message = "\n\n".join(filter(None, (header["summary"], header.get("description"))))
        new = repository.commit(ref, message, files, deleted, header.get("parentCommit"))
    except Stale as error:
        raise Refused(412, f"A commit has happened since. Please refresh and try again. ({error})") from None
    except GitError as error:
        raise Refused(400, str(error)) from None
    address = f"{address_of(hub, kind, name)}/commit/{new}"
    return as_json({"success": True, "commitOid": new, "commitUrl": address, "hookOutput": "", **answer})


def operations(hub, lines: list[dict]) -> tuple[dict[str, bytes], list[str], dict]:
    """The lines of a commit -> files, deleted paths (folders end in /), and the header."""
    files, deleted, header = {}, [], None
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            header = value
        elif key == "file":
            try:
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            except binascii.Error:
                raise Refused(400, f"{value['path']} is not base64") from None
        elif key == "lfsFile":
            if not hub.objects.has(value["oid"], value["size"]):
                raise Refused(400, f"the LFS object {value['oid']} of {value['path']} was not uploaded")
            files[value["path"]] = pointer(value["oid"], value["size"])
        else:
            deleted.append(value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""))
    if header is None:
        raise Refused(400, "a commit needs a header")
    return files, [path for path in deleted if path not in files], header


def address_of(hub, kind: str, name: str) -> str:
    return f"{hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"


def lfs_batch(hub, request: Request, kind: str | None, name: str) -> Reply:
    """Where to upload large files; nothing for those that are here already."""
    hub.open(request, (kind or "models/").rstrip("/"), name)
    who = hub.who(request)
    if who is None or who.role != "write":
        raise Refused(403 if who else 401, "This token does not allow to upload")
    objects = []
    for wanted in request.json()["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        place = {} if hub.objects.has(oid, size) else {"upload": {"href": hub.signed(f"/large/{oid}"), "header": {}}}
        objects.append({"oid": oid, "size": size, "authenticated": True, **({"actions": place} if place else {})})
    return as_json({"transfer": "basic", "objects": objects})


def xet_token(hub, request: Request, kind: str, name: str, scope: str, revision: str) -> Reply:
    if scope == "write":
        open_to_commit(hub, request, kind, name)
    else:
        hub.open(request, kind, name)
    token, expires = hub.xet_token(scope)
    headers = {"X-Xet-Cas-Url": hub.files, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return as_json({"accessToken": token, "exp": expires, "casUrl": hub.files}, **headers)


# -- refs --------------------------------------------------------------------------------------------------------------


def refs(hub, request: Request, kind: str, name: str) -> Reply:
    answer = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
    for ref, commit in hub.open(request, kind, name).refs().items():
        group = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[ref.split("/")[1]]
        answer[group].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": commit})
    return as_json(answer)


def commits(hub, request: Request, kind: str, name: str, revision: str) -> Reply:
    repository = hub.open(request, kind, name)
    history = repository.history(commit_of(repository, revision))
    return as_json([{**entry, "message": "", "authors": [{"user": "hub"}]} for entry in history])


def add_branch(hub, request: Request, kind: str, name: str, branch: str) -> Reply:
    repository = hub.open(request, kind, name, write=True)
    return add_ref(repository, f"refs/heads/{unquote(branch)}", request.json().get("startingPoint", "main"))


def add_tag(hub, request: Request, kind: str, name: str, revision: str) -> Reply:
    repository = hub.open(request, kind, name, write=True)
    return add_ref(repository, f"refs/tags/{request.json()['tag']}", unquote(revision))


def add_ref(repository: Repository, ref: str, revision: str) -> Reply:
    try:
        repository.move(ref, commit_of(repository, revision))
    except Stale:
        raise Refused(409, f"Reference already exists: {ref}") from None
    return as_json({})


def delete_ref(hub, request: Request, kind: str, name: str, group: str, ref: str) -> Reply:
    repository = hub.open(request, kind, name, write=True)
    ref = f"refs/{'heads' if group == 'branch' else 'tags'}/{unquote(ref)}"
    if ref not in repository.refs():
        raise Refused(404, f"{ref} does not exist", "RevisionNotFound")
    repository.git("update-ref", "-d", ref)
    return as_json({})


def open_pull_request(repository: Repository, title: str, ref: str) -> tuple[int, str]:
    """A new pull request on top of ``ref``; -> its number and its own ref."""
    facts = repository.facts
    number = len(facts["discussions"]) + 1
    repository.move(f"refs/pr/{number}", repository.refs()[ref])
    repository.write_facts({**facts, "discussions": {**facts["discussions"], number: {"title": title, "into": ref}}})
    return number, f"refs/pr/{number}"


def merge(hub, request: Request, kind: str, name: str, number: str) -> Reply:
    """Move the branch to the pull request's commit; refused when the branch has moved on meanwhile."""
    repository = hub.open(request, kind, name, write=True)
    request_, all_refs = repository.facts["discussions"].get(number), repository.refs()
    if request_ is None:
        raise Refused(404, f"there is no pull request {number}")
    old, new = all_refs[request_["into"]], all_refs[f"refs/pr/{number}"]
    if old not in (entry["id"] for entry in repository.history(new)):
        raise Refused(409, "the branch has moved on; open the pull request again")
    repository.move(request_["into"], new, old)
    return as_json({})


_R = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
_FILES = r"/(datasets/|spaces/)?([^/]+/[^/]+)"
ROUTES = [
    (method, re.compile(pattern), function)
    for method, pattern, function in (
        ("GET", "/api/whoami-v2", whoami),
        ("POST", "/api/repos/create", create),
        ("POST", "/api/validate-yaml", validate_card),
        ("GET", _R, info),
        ("GET", _R + "/revision/([^/]+)", info),
        ("GET", _R + "/tree/([^/]+)(?:/(.*))?", tree),
        ("POST", _R + "/paths-info/([^/]+)", paths_info),
        ("POST", _R + "/preupload/([^/]+)", preupload),
        ("POST", _R + "/commit/([^/]+)", commit),
        ("GET", _R + "/xet-(read|write)-token/([^/]+)", xet_token),
        ("GET", _R + "/refs", refs),
        ("GET", _R + "/commits/([^/]+)", commits),
        ("POST", _R + "/branch/([^/]+)", add_branch),
        ("POST", _R + "/tag/([^/]+)", add_tag),
        ("DELETE", _R + "/(branch|tag)/([^/]+)", delete_ref),
        ("POST", _R + r"/discussions/(\d+)/merge", merge),
        ("POST", _FILES + r"\.git/info/lfs/objects/batch", lfs_batch),
        ("GET", _FILES + "/resolve/([^/]+)/(.+)", resolve),
    )
]
