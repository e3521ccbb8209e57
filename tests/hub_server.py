"""A Hub on loopback: enough of the Hugging Face Hub's HTTP interface to publish repositories and to read them back.

Models and datasets, whole commits, no storage beside git: `huggingface_hub` is told to send every file within the
commit. Everything stays in memory, for a test to look at.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Commit:
    """A state of a repository: all its files by path, and what the commit changed."""

    message: str
    files: dict[str, bytes]
    added: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    parent: str = ""

    @cached_property
    def oid(self) -> str:
        listing = "".join(f"{path} {_blob_oid(content)}\n" for path, content in sorted(self.files.items()))
        return hashlib.sha1(f"{self.parent}\n{self.message}\n{listing}".encode()).hexdigest()


@dataclass
class Repository:
    """A repository and its history, the newest commit last."""

    kind: str
    name: str
    is_private: bool = False
    commits: list[Commit] = field(default_factory=lambda: [Commit("initial commit", {".gitattributes": b""})])

    @property
    def files(self) -> dict[str, bytes]:
        """Files by path, as they are now, without the one that every repository has."""
        return {path: content for path, content in self.commits[-1].files.items() if path != ".gitattributes"}

    def at(self, revision: str) -> Commit:
        """The commit of a branch's name or a hash."""
        if revision == "main":
            return self.commits[-1]
        found = next((commit for commit in self.commits if commit.oid == revision), None)
        return found or _refuse(404, "RevisionNotFound")


class HubServer(ThreadingHTTPServer):
    """Serves while it is entered.

    Parameters
    ----------
    token
        The one token that it knows. Only who has it may write, or read what is private; any other is refused.

    Attributes
    ----------
    repositories
        By kind ("model" or "dataset") and name.
    requests
        Method and path of everything that was asked.
    """

    daemon_threads = True
    # A client that fetches with eight threads is kept waiting a second where only five may queue.
    request_queue_size = 64

    def __init__(self, token: str = "hf_of_the_tests"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.server_close()

    def dataset(self, name: str) -> Repository:
        return self.repositories["dataset", name]

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables with which a new process speaks to this Hub, and keeps what it fetches below ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": self.token if token is None else token,
        }

    @contextlib.contextmanager
    def connected(self, home: Path, token: str | None = None) -> Iterator[None]:
        """Let `huggingface_hub` in this process speak to this Hub, as `environment` does in a new one.

        Not `datasets`, which copies the address when it is imported.
        """
        from unittest import mock

        from huggingface_hub import HfFileSystem, constants

        changes = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        variables = {"HF_TOKEN": self.token if token is None else token}
        HfFileSystem.clear_instance_cache()  # it keeps the address with what it listed there
        with mock.patch.multiple(constants, **changes), mock.patch.dict(os.environ, variables):
            yield
        HfFileSystem.clear_instance_cache()


class _Refused(Exception):
    """An answer that is an error: status, the Hub's code for it, what it says."""


def _refuse(status: int, code: str = "", message: str = "") -> Any:
    raise _Refused(status, code, message)


def _blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """Each route is a method: its pattern stands in `_ROUTES`, whose groups are its arguments."""

    server: HubServer

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {parts.path}")
        self.query = parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self.has_token = self._checked_token()
            for method, pattern, route in _ROUTES:
                if method == self.command.replace("HEAD", "GET") and (found := re.fullmatch(pattern, parts.path)):
                    return route(self, **{name: unquote(text or "") for name, text in found.groupdict().items()})
            _refuse(404, "EntryNotFound", f"There is nothing at {self.path}")
        except _Refused as refused:
            status, code, message = refused.args
            self._answer(
                json.dumps({"error": message}).encode(), status, {"X-Error-Code": code, "X-Error-Message": message}
            )

    do_POST = do_HEAD = do_GET

    def _checked_token(self) -> bool:
        sent = self.headers.get("Authorization")
        if sent is not None and sent != f"Bearer {self.server.token}":
            _refuse(401, message="Invalid credentials in Authorization header")
        return sent is not None

    def _answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            if text:
                self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer_json(self, content: Any) -> None:
        self._answer(json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def _repository(self, kind: str, name: str, to_write: bool = False) -> Repository:
        if to_write and not self.has_token:
            _refuse(401, message="Invalid username or password.")
        found = self.server.repositories.get((kind.removesuffix("s") or "model", name))
        if found is None or (found.is_private and not self.has_token):
            _refuse(404 if self.has_token else 401, "RepoNotFound", "Repository not found")
        return found

    # -- writing -----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        settings = json.loads(self.body)
        if not self.has_token:
            _refuse(401, message="Invalid username or password.")
        kind = settings.get("type", "model")
        name = "/".join(filter(None, [settings.get("organization"), settings["name"]]))
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.server.repositories:
            return self._answer(json.dumps({"error": "You already created it", "url": url}).encode(), 409)
        is_private = bool(settings.get("private")) or settings.get("visibility") == "private"
        self.server.repositories[kind, name] = Repository(kind, name, is_private)
        return self._answer_json({"url": url})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        files = self._repository(kind, name, to_write=True).at(revision).files
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        oids = {path: _blob_oid(files[path]) if path in files else None for path in paths}
        modes = {"uploadMode": "regular", "shouldIgnore": False}
        self._answer_json({"files": [{"path": path, "oid": oids[path], **modes} for path in paths]})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name, to_write=True)
        parent = repository.at(revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", parent.oid) != parent.oid:
            _refuse(412, message="A commit has happened since.")
        files, added, deleted = dict(parent.files), [], []
        for line in lines[1:]:
            operation, path = line["key"], line["value"]["path"]
            if operation == "file":
                files[path] = base64.b64decode(line["value"]["content"])
                added.append(path)
            elif operation == "deletedFile":
                files.pop(path, None) if path in files else _refuse(400, message=f"{path} is not there")
                deleted.append(path)
            elif operation == "deletedFolder":
                inside = [other for other in files if other.startswith(path.rstrip("/") + "/")]
                deleted += [other for other in inside if files.pop(other) is not None]
            else:
                _refuse(400, message=f"This Hub takes no {operation}")
        commit = Commit(header["summary"], files, tuple(added), tuple(deleted), parent.oid)
        repository.commits.append(commit)
        folder = "" if repository.kind == "model" else f"{repository.kind}s/"
        url = f"{self.server.url}/{folder}{repository.name}/commit/{commit.oid}"
        self._answer_json({"success": True, "commitOid": commit.oid, "commitUrl": url})

    def validate_yaml(self) -> None:
        self._answer_json({"errors": [], "warnings": []})

    # -- reading -----------------------------------------------------------------------------------------------------

    def info(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        commit = repository.at(revision or "main")
        self._answer_json(
            {
                "_id": "0",
                "id": name,
                "sha": commit.oid,
                "private": repository.is_private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def tree(self, kind: str, name: str, revision: str, path: str) -> None:
        entries = _entries(self._repository(kind, name).at(revision))
        inside = path + "/" if path else ""
        found = {other: entry for other, entry in entries.items() if other.startswith(inside)}
        if path and not found:
            _refuse(404, "EntryNotFound", f"{path} is not there")
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            found = {other: entry for other, entry in found.items() if "/" not in other.removeprefix(inside)}
        self._answer_json(list(found.values()))

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        entries = _entries(self._repository(kind, name).at(revision))
        paths = parse_qs(self.body.decode()).get("paths", [])
        self._answer_json([entries[path] for path in paths if path in entries])

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        commit = self._repository(kind, name).at(revision)
        if path not in commit.files:
            _refuse(404, "EntryNotFound", f"{path} is not there")
        content, status = commit.files[path], 200
        headers = {"ETag": f'"{_blob_oid(content)}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            if start >= len(content):
                _refuse(416, message="There are no such bytes")
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        self._answer(content, status, headers)


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """Files and folders of a commit by path, in the order of paths."""
    entries = {
        path: {"type": "file", "path": path, "size": len(content), "oid": _blob_oid(content)}
        for path, content in commit.files.items()
    }
    for folder in {str(parent) for path in commit.files for parent in Path(path).parents} - {"."}:
        entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": _blob_oid(folder.encode())}
    return dict(sorted(entries.items()))


_API = "/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"{_API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", f"{_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", f"{_API}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", f"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", _Handler.tree),
    ("GET", "/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
