"""The Hub's API, as far as pushing and loading need it. See `server.py`."""

import base64
import fnmatch
import hashlib
import json
import os
import re
from typing import Any
from urllib.parse import parse_qs

import yaml

from .repository import LFS_PATTERNS, POINTER, Repository, timestamp
from .server import HubError, Request, route


REGULAR_MAX = 10 * 1024 * 1024  # above this a file is LFS whatever its name
API = r"/api/(?P<kind>model|dataset|space)s/"
NAME = r"(?P<name>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"
OID = r"(?P<oid>[0-9a-f]{64})"
WEB = r"/((?P<kind>dataset|space)s/)?" + NAME


# Users and repositories


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> int:
    if not request.user:
        raise HubError(401, "Invalid username or password.")
    user = request.user
    organisations = [name for name, members in request.hub.organisations.items() if user in members]
    return request.reply(
        200,
        {
            "type": "user",
            "id": user,
            "name": user,
            "fullname": user,
            "auth": {"accessToken": {"role": request.role}},
            "orgs": [{"type": "org", "name": name} for name in organisations],
        },
    )


@route("POST", "/api/repos/create")
def create(request: Request) -> int:
    asked = json.loads(request.body)
    namespace, kind = asked.get("organization") or request.user, asked.get("type") or "model"
    request.need_write(namespace, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    repository = Repository(request.hub.root, kind, f"{namespace}/{asked['name']}")
    answer = {"url": request.hub.url(repository), "name": repository.name, "id": repository.name}
    with request.hub.lock:
        if repository.exists:
            why = f"You already created this {kind} repo"
            raise HubError(409, why, body={"error": why, **answer})  # `exist_ok` reads the URL
        repository.create(request.user, asked.get("visibility") == "private")
    return request.reply(200, answer)


@route("POST", "/api/validate-yaml")
def validate(request: Request) -> int:
    errors, warnings = check_card(json.loads(request.body)["content"])
    return request.reply(400 if errors else 200, {"errors": errors, "warnings": warnings})


def check_card(text: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return errors and warnings about a card. Only its YAML is checked: the Hub's own schema is not public."""
    block = re.match(r"\s*---[^\S\r\n]*\r?\n(.*?)\r?\n---[^\S\r\n]*(\r?\n|$)", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return [{"message": f"YAML Metadata Error: {error}"}], []
    if metadata is not None and not isinstance(metadata, dict):
        return [{"message": "YAML Metadata Error: expected keys and values"}], []
    return [], [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]


# Repository contents


@route("GET", API + "(?P<name>[^/]+(/[^/]+)?)" + f"(/revision{REVISION})?", "read")  # a name alone: RepoNotFound
def info(request: Request, revision: str = "main") -> int:
    repository, commit = request.repository, request.commit_id(revision)
    files = [entry for entry in repository.entries(commit) if entry["type"] == "file"]
    return request.reply(
        200,
        {
            "id": repository.name,
            "author": repository.owner,
            "sha": commit,
            "private": repository.facts["private"],
            "siblings": [_sibling(entry, "blobs" in request.query) for entry in files],
            "tags": [],
            "createdAt": repository.facts["created"],
            "lastModified": timestamp(int(repository.git("log", "-1", "--format=%ct", commit))),
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
        },
    )


def _sibling(entry: dict[str, Any], blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": entry["path"]}
    lfs = entry.get("lfs")
    facts = {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
    return facts | {"lfs": lfs and {"sha256": lfs["oid"], **lfs}}


@route("GET", API + NAME + f"/tree{REVISION}(/(?P<folder>.+))?", "read")
def tree(request: Request, revision: str, folder: str = "") -> int:
    commit = request.commit_id(revision)
    recursive = request.query.get("recursive", [""])[0].lower() == "true"
    rows = request.repository.entries(commit, folder, recursive)
    headers = {"X-Repo-Commit": commit}
    if folder and not rows:
        raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
    begin = int(request.query.get("cursor", ["0"])[0])
    end = begin + request.hub.page
    if len(rows) > end:
        path = request.path.split("&cursor=")[0]
        headers["Link"] = f'<{request.hub.base}{path}&cursor={end}>; rel="next"'
    return request.reply(200, rows[begin:end], headers)


@route("POST", API + NAME + f"/paths-info{REVISION}", "read")
def paths_info(request: Request, revision: str) -> int:  # sent as a form, not as JSON
    wanted = {path.strip("/") for path in parse_qs(request.body.decode()).get("paths", [])}
    entries = request.repository.entries(request.commit_id(revision))
    return request.reply(200, [entry for entry in entries if entry["path"] in wanted])


@route("GET", API + NAME + "/refs", "read")
def references(request: Request) -> int:
    branches, tags, pulls = map(request.repository.references, ("refs/heads/", "refs/tags/", "refs/pr/"))
    return request.reply(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": pulls})


@route("GET", API + NAME + f"/commits{REVISION}", "read")
def commits(request: Request, revision: str) -> int:
    return request.reply(200, request.repository.history(request.commit_id(revision)))


@route("GET|HEAD", WEB + f"/resolve{REVISION}/(?P<path>.+)", "read")
def resolve(request: Request, revision: str, path: str) -> int:
    commit = request.commit_id(revision)
    entries = request.repository.entries(commit, os.path.dirname(path), recursive=False)
    entry = next((entry for entry in entries if entry["path"] == path and entry["type"] == "file"), None)
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": commit})
    if "lfs" not in entry:
        headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": commit}
        return request.content(request.repository.blob(entry["oid"]), headers)
    oid = entry["lfs"]["oid"]
    headers = {
        "X-Repo-Commit": commit,
        "X-Linked-Etag": f'"{oid}"',
        "X-Linked-Size": entry["size"],
        "Location": f"{request.hub.storage}/_get/{oid}?sig={request.hub.signature}",
    }
    if "xetHash" in entry:
        repository = request.repository
        token = f"{request.hub.base}/api/{repository.kind}s/{repository.name}/xet-read-token/{commit}"
        headers |= {"X-Xet-Hash": entry["xetHash"], "Link": f'<{token}>; rel="xet-auth"'}
    return request.reply(302, b"", headers)


# Storage of large files: signed URLs on another host, which must never receive the Hub's token


@route("GET|HEAD|PUT", "/_(?P<what>get|put)/" + OID)
def storage(request: Request, what: str, oid: str) -> int:
    if request.query.get("sig") != [request.hub.signature] or "Authorization" in request.headers:
        raise HubError(403, "bad signature, or the Hub's token was sent to the storage")
    if what == "get":
        return request.content(request.hub.lfs(oid).read_bytes(), {"ETag": f'"{oid}"'})
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "BadDigest")
    request.hub.lfs(oid).write_bytes(request.body)
    return request.reply(200)


@route("POST", WEB + r"\.git/info/lfs/objects/batch", "write")
def lfs_batch(request: Request) -> int:
    def answer(item: dict[str, Any]) -> dict[str, Any]:
        if request.hub.lfs(item["oid"]).exists():
            return item  # no actions: the Hub already has it
        put = f"{request.hub.storage}/_put/{item['oid']}?sig={request.hub.signature}"
        verify = f"{request.hub.url(request.repository)}.git/info/lfs/verify"
        return item | {"actions": {"upload": {"href": put}, "verify": {"href": verify}}}

    items = json.loads(request.body)["objects"]
    return request.reply(200, {"transfer": "basic", "objects": [answer(item) for item in items]})


@route("POST", WEB + r"\.git/info/lfs/verify", "write")
def lfs_verify(request: Request) -> int:
    return request.reply(200 if request.hub.lfs(json.loads(request.body)["oid"]).exists() else 404, {})


# Commits


@route("POST", API + NAME + f"/preupload{REVISION}", "write")
def preupload(request: Request, revision: str) -> int:
    asked = json.loads(request.body)
    entries = request.repository.entries(request.commit_id(revision))
    there = {entry["path"]: entry.get("lfs", entry)["oid"] for entry in entries}  # the sha256 of an LFS file
    rules = asked.get("gitIgnore")
    if rules is None and ".gitignore" in there:
        rules = request.repository.blob(there[".gitignore"]).decode()
    ignored = [line for line in (rules or "").splitlines() if line and line[0] != "#"]

    def answer(file: dict[str, Any]) -> dict[str, Any]:
        path = file["path"]
        large = file["size"] > REGULAR_MAX or _matches(os.path.basename(path), LFS_PATTERNS)
        return {
            "path": path,
            "shouldIgnore": _matches(path, ignored),
            "oid": there.get(path),
            "uploadMode": "lfs" if large and file["size"] else "regular",
        }

    return request.reply(200, {"commitOid": None, "files": [answer(file) for file in asked["files"]]})


def _matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


@route("POST", API + NAME + f"/commit{REVISION}", "write")
def commit(request: Request, revision: str) -> int:
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    repository = request.repository
    with request.hub.lock:
        parent = request.commit_id(revision)
        if not revision.startswith("refs/") and not repository.references(f"refs/heads/{revision}"):
            raise HubError(400, f"{revision} is not a branch")
        if not parent.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        there = {entry["path"] for entry in repository.entries(parent)}
        changes = [_change(request, line["key"], line["value"], there) for line in lines if line["key"] != "header"]
        changes.sort(key=lambda change: change[1] is not None)  # a folder is deleted before files are added to it
        reference, pull = revision if revision.startswith("refs/") else f"refs/heads/{revision}", None
        if request.query.get("create_pr"):
            number = 1 + len(repository.references("refs/pr/"))
            reference, pull = f"refs/pr/{number}", f"{request.hub.url(repository)}/discussions/{number}"
        message = "\n\n".join(text for text in (header["summary"], header.get("description")) if text)
        oid = repository.commit(reference, parent, request.user, message, changes)
    url = f"{request.hub.url(repository)}/commit/{oid}"
    return request.reply(200, {"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": pull})


def _change(request: Request, key: str, value: dict[str, Any], there: set[str]) -> tuple[str, bytes | None]:
    path = value["path"]
    if key == "file":
        content = base64.b64decode(value["content"])
        errors = check_card(content.decode())[0] if path == "README.md" else []
        if errors:
            raise HubError(400, errors[0]["message"])
        return path, content
    if key == "lfsFile":
        object_ = request.hub.lfs(value["oid"])
        if not object_.exists():
            refusal = "Your push was rejected because an LFS pointer pointed to a file that does not exist"
            raise HubError(400, f"{refusal}: {path}")
        return path, POINTER.format(value["oid"], object_.stat().st_size).encode()
    if path.rstrip("/") not in there:  # deletedFile, deletedFolder
        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
    return path.rstrip("/"), None


@route("POST", API + NAME + f"/(?P<what>branch|tag){REVISION}", "write")
def make_reference(request: Request, what: str, revision: str) -> int:
    asked, repository = json.loads(request.body or b"{}"), request.repository
    name = f"refs/tags/{asked['tag']}" if what == "tag" else f"refs/heads/{revision}"
    if repository.references(name):
        raise HubError(409, f"Reference already exists: {name}")
    start = revision if what == "tag" else asked.get("startingPoint", "main")
    repository.git("update-ref", name, request.commit_id(start))
    return request.reply(200, {})
