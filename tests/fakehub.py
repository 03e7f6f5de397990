"""A Hub on this machine: repositories in memory behind real HTTP, strict about what it is sent, with faults on order.

It speaks as much of the Hub's protocol as pushing and loading need. Large files go by git-lfs; commits are atomic.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png")
EMPTY = "0" * 40


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    """A commit: its id, what it says, and every file by path."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A repository: commits, and the branches and pull requests that point to them."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=lambda: {EMPTY: Commit(EMPTY, "", {})})
    heads: dict[str, str] = field(default_factory=lambda: {"main": EMPTY})

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.heads.get(revision, revision))

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.heads["main"]].files


@dataclass
class Fault:
    """What goes wrong: the next `times` requests of this kind are answered by `status`, or dropped where it is 0."""

    method: str
    path: str
    status: int
    times: int
    message: str = "no"


class FakeHub:
    """The server; `url` is its address."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []  # of what must carry no token
        self.authorizations: set[str] = set()
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fails(self, method: str, path: str, status: int, times: int = 1, message: str = "no") -> None:
        """Order a fault. `path` is a regular expression; status 0 drops the connection."""
        self.faults.append(Fault(method, path, status, times, message))

    def commits(self, name: str) -> list[Commit]:
        """Every commit of a repository after the empty one."""
        return list(self.repositories[name].commits.values())[1:]

    def sent(self) -> bytes:
        """Everything that was ever sent to it, but for the headers."""
        files = [content for repo in self.repositories.values() for c in repo.commits.values() for content in c.files]
        return b"\n".join([*self.bodies, *self.blobs.values(), "\n".join(files).encode()])


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    try:
        yield hub
    finally:
        hub.close()


def card_errors(text: str) -> list[str]:
    """What the Hub would say against a model card's metadata."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if not found:
        return ["no metadata"]
    data = yaml.safe_load(found[1])
    if not isinstance(data, dict):
        return ["metadata should be a mapping"]
    errors = [
        f"{name} should be {kind.__name__}"
        for name, kind in (("license", str), ("tags", list), ("library_name", str), ("pipeline_tag", str))
        if name in data and not isinstance(data[name], kind)
    ]
    base = data.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
        errors.append(f"base_model should be an id: {base}")
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append("license_name is missing")
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            errors.append("model-index needs name and results")
        for result in model.get("results", []):
            if not result.get("task", {}).get("type"):
                errors.append("result without task type")
            if not all(isinstance(result.get("dataset", {}).get(key), str) for key in ("type", "name")):
                errors.append("result without data set")
            for metric in result.get("metrics", []):
                value = metric.get("value")
                if not metric.get("type") or not isinstance(value, (int, float)) or value != value:
                    errors.append("metric without type or value")
    return errors


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(
        self, status: int, data: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> None:
        body = raw if raw is not None else b"" if data is None else json.dumps(data).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_request(self) -> None:
        raw = urlsplit(self.path).path  # a revision with slashes comes quoted
        path = unquote(raw)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            self.hub.authorizations.add(self.headers.get("Authorization", ""))
            fault = next(
                (f for f in self.hub.faults if f.times and f.method == self.command and re.search(f.path, path)), None
            )
            if fault is not None:
                fault.times -= 1
        if fault is not None and not fault.status:
            self.rfile.read(min(16, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        data = self.body() if self.command in ("POST", "PUT") else b""
        if fault is not None:
            self.answer(fault.status, {"error": fault.message}, {"X-Error-Message": fault.message})
            return
        for pattern, method, route in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, raw)):
                with self.hub.lock:
                    if method in ("POST", "PUT") and not path.startswith("/lfs/"):
                        self.hub.bodies.append(data)
                    route(self, data, *(group and unquote(group) for group in found.groups()))
                return
        self.answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def commit_at(self, name: str, revision: str) -> Commit | None:
        repository = self.repository(name)
        if repository is None:
            return None
        commit = repository.at(revision)
        if commit is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    # -- routes -------------------------------------------------------------------------------------------------------

    def create(self, data: bytes) -> None:
        asked = json.loads(data)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo", **answer})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private)
        self.answer(200, answer)

    def branch(self, data: bytes, name: str, branch: str) -> None:
        repository = self.repository(name)
        if repository is not None:
            exists = branch in repository.heads
            repository.heads.setdefault(branch, repository.heads["main"])
            self.answer(409 if exists else 200, {"error": "Reference already exists"} if exists else {})

    def validate(self, data: bytes) -> None:
        errors = card_errors(json.loads(data)["content"])
        self.answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def whoami(self, data: bytes) -> None:
        self.answer(200, {"name": "me", "type": "user", "orgs": []})

    def preupload(self, data: bytes, name: str, revision: str) -> None:
        commit = self.commit_at(name, revision)
        if commit is None:
            return
        files = []
        for asked in json.loads(data)["files"]:
            path = asked["path"]
            large, old = path.endswith(LARGE), commit.files.get(path)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else git_id(old)
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, data: bytes, name: str) -> None:
        objects = []
        for asked in json.loads(data)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, data: bytes, oid: str) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            self.answer(400, {"error": "not what was announced"})
            return
        self.hub.blobs[oid] = data
        self.answer(200, {})

    def commit(self, data: bytes, name: str, revision: str) -> None:
        repository, parent = self.repository(name), self.commit_at(name, revision)
        if repository is None or parent is None:
            return
        files, message = dict(parent.files), ""
        for line in data.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        oid = hashlib.sha1(data + parent.oid.encode()).hexdigest()
        repository.commits[oid] = Commit(oid, message, files)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}
        if "create_pr=1" in self.path:
            number = sum(head.startswith("refs/pr/") for head in repository.heads) + 1
            repository.heads[f"refs/pr/{number}"] = oid
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        else:
            repository.heads[revision] = oid
        self.answer(200, answer)

    def resolve(self, data: bytes, name: str, revision: str, path: str) -> None:
        commit = self.commit_at(name, revision)
        if commit is None:
            return
        content = commit.files.get(path)
        known = {"X-Repo-Commit": commit.oid}
        if content is None:
            self.answer(404, {"error": "Entry not found"}, {**known, "X-Error-Code": "EntryNotFound"})
            return
        oid = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_id(content)
        headers = {**known, "ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
        if path.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self.answer(200, headers=headers, raw=content)

    def info(self, data: bytes, name: str, revision: str | None = None) -> None:
        commit = self.commit_at(name, revision or "main")
        if commit is not None:
            self.answer(
                200,
                {
                    "id": name,
                    "sha": commit.oid,
                    "private": self.hub.repositories[name].private,
                    "tags": [],
                    "siblings": [{"rfilename": path} for path in commit.files],
                },
            )

    def tree(self, data: bytes, name: str, revision: str, below: str | None = None) -> None:
        commit = self.commit_at(name, revision)
        if commit is None:
            return
        if below and not any(path.startswith(f"{below}/") for path in commit.files):
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        entries = []
        for path, content in commit.files.items():
            if below and not path.startswith(f"{below}/"):
                continue
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 130,
                }
            entries.append(entry)
        self.answer(200, entries)


_NAME, _REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
_API = rf"/api/models/{_NAME}"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    (r"/api/whoami-v2", "GET", _Handler.whoami),
    (r"/api/repos/create", "POST", _Handler.create),
    (r"/api/validate-yaml", "POST", _Handler.validate),
    (rf"{_API}/branch/{_REVISION}", "POST", _Handler.branch),
    (rf"{_API}/preupload/{_REVISION}", "POST", _Handler.preupload),
    (rf"{_API}/commit/{_REVISION}", "POST", _Handler.commit),
    (rf"{_API}/tree/{_REVISION}(?:/(.*))?", "GET", _Handler.tree),
    (rf"{_API}(?:/revision/{_REVISION})?", "GET", _Handler.info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "POST", _Handler.batch),
    (r"/lfs/([0-9a-f]+)", "PUT", _Handler.upload),
    (rf"/{_NAME}/resolve/{_REVISION}/(.+)", "GET", _Handler.resolve),
    (rf"/{_NAME}/resolve/{_REVISION}/(.+)", "HEAD", _Handler.resolve),
]
