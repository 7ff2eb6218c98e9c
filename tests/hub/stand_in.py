"""A stand-in for the hub: the part of its HTTP API that an upload and a download use, over localhost."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from tests.local_server import QuietHandler, running_server

TOKEN = "hf_right"
OWNER = "me"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict] = field(default_factory=list)

    @property
    def head(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


@dataclass
class Hub:
    """State of the stand-in.

    Attributes:
        repositories: by "owner/name".
        failures: pattern of "METHOD path" -> status to answer instead.
        requests: "METHOD path" in order.
        ignored: names that a .gitignore keeps out.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)

    def respond(self, method: str, path: str, headers: dict, body: bytes) -> tuple[int, dict, bytes]:
        """Return status, headers and body of the answer to a request."""
        self.requests.append(f"{method} {path}")
        for pattern, status in self.failures.items():
            if re.search(pattern, f"{method} {path}"):
                return status, {"X-Error-Message": f"made to fail with {status}"}, b"{}"
        if path.startswith("/blobs/"):  # as on S3, the address itself allows it
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}, b""
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
        if path == "/api/whoami-v2":
            return reply({"type": "user", "name": OWNER, "orgs": []})
        if path == "/api/validate-yaml":
            return reply({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", self.describe),
            (r"/api/models/([^/]+/[^/]+)/tree/[^/]+", self.tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/[^/]+", self.commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.resolve),
        ):
            if found := re.fullmatch(pattern, path):
                if found[1] not in self.repositories:
                    return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
                return answer(*found.groups(), body)
        raise AssertionError(f"{method} {path} is not known to the stand-in")

    def create(self, wish: dict) -> tuple[int, dict, bytes]:
        name = f"{wish.get('organization') or OWNER}/{wish['name']}"
        if name.partition("/")[0] != OWNER:
            return 403, {"X-Error-Message": "no rights to create a model there"}, b"{}"
        private = wish.get("private", wish.get("visibility") == "private")
        self.repositories[name] = Repository(private, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return reply({"url": f"{self.address}/{name}", "name": name, "id": "1"})

    def describe(self, name: str, body: bytes) -> tuple[int, dict, bytes]:
        repository = self.repositories[name]
        siblings = [{"rfilename": file} for file in repository.files]
        facts = {"id": name, "modelId": name, "private": repository.private, "sha": repository.head}
        return reply({**facts, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, name: str, body: bytes) -> tuple[int, dict, bytes]:
        files = self.repositories[name].files
        return reply([{"type": "file", "path": p, "size": len(c), "oid": git_hash(c)} for p, c in files.items()])

    def preupload(self, name: str, body: bytes) -> tuple[int, dict, bytes]:
        answers = []
        for entry in json.loads(body)["files"]:
            there = self.repositories[name].files.get(entry["path"])
            is_large = entry["path"].endswith((".safetensors", ".bin", ".model", ".png", ".jpg"))
            oid = None if there is None else hashlib.sha256(there).hexdigest() if is_large else git_hash(there)
            mode = "lfs" if is_large else "regular"
            is_ignored = entry["path"] in self.ignored
            answers.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": is_ignored, "oid": oid})
        return reply({"files": answers})

    def batch(self, name: str, body: bytes) -> tuple[int, dict, bytes]:
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"href": f"{self.address}/blobs/{entry['oid']}"}
            has = entry["oid"] in self.blobs
            objects.append({**entry, **({} if has else {"actions": {"upload": upload}})})
        return reply({"transfer": "basic", "objects": objects})

    def commit(self, name: str, body: bytes) -> tuple[int, dict, bytes]:
        repository, lines = self.repositories[name], [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", repository.head) != repository.head:
            return 412, {"X-Error-Message": "A commit has happened since"}, b"{}"
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append(header)
        return reply({"commitUrl": f"{self.address}/{name}/commit/{repository.head}", "commitOid": repository.head})

    def resolve(self, name: str, file: str, body: bytes) -> tuple[int, dict, bytes]:
        repository = self.repositories[name]
        if file not in repository.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = repository.files[file]
        return 200, {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": repository.head}, content


def reply(content: object) -> tuple[int, dict, bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """Yield a stand-in that answers on a free port."""
    hub, lock, errors = Hub(), threading.Lock(), []

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.read_body()
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:
                with lock:
                    status, extra, content = hub.respond(self.command, unquote(urlsplit(self.path).path), headers, body)
            except Exception as error:
                errors.append(error)
                status, extra, content = 400, {}, b"{}"
            self.send(status, content, extra)

        do_GET = do_HEAD = do_POST = do_PUT = answer

    with running_server(Handler) as server:
        hub.address = server.address
        yield hub
    assert errors == []
