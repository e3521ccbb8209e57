"""A Hub on loopback: enough of the Hugging Face Hub's HTTP interface to publish repositories and to read them back.

Models and datasets, branches, tags, private repositories. Weights and gzipped files go to a storage beside git, by the
protocol of Git LFS, and other files are sent within the commit; Xet, the Hub's newer storage, is switched off in the
client. Everything stays in memory, for a test to look at.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


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
    """A repository and its branches, each with its history, the newest commit last; tags name a commit."""

    kind: str
    name: str
    is_private: bool = False
    branches: dict[str, list[Commit]] = field(
        default_factory=lambda: {"main": [Commit("initial commit", {".gitattributes": b""})]}
    )
    tags: dict[str, Commit] = field(default_factory=dict)

    @property
    def commits(self) -> list[Commit]:
        """Those of the main branch."""
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        """Files by path, as they are now, without the one that every repository has."""
        return {path: content for path, content in self.commits[-1].files.items() if path != ".gitattributes"}

    def at(self, revision: str) -> Commit:
        """The commit of a branch's name, a tag or a hash."""
        if revision in self.branches:
            return self.branches[revision][-1]
        if revision in self.tags:
            return self.tags[revision]
        commits = (commit for branch in self.branches.values() for commit in branch)
        found = next((commit for commit in commits if commit.oid == revision), None)
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
    stored
        Content in the storage beside git, by its SHA-256; whether a commit names it or not.
    cut_after
        Bytes of an upload to that storage after which the connection is cut; None takes all.
    before_commit
        Called when a commit comes in, before it is looked at.
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
        self.stored: dict[str, bytes] = {}
        self.cut_after: int | None = None
        self.before_commit: Callable[[], None] | None = None

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
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": self.token if token is None else token,
        }

    @contextlib.contextmanager
    def connected(self, home: Path, token: str | None = None) -> Iterator[None]:
        """Let `huggingface_hub` and Transformers in this process speak to this Hub, as `environment` does in a new one.

        Not `datasets`, which copies the address when it is imported.
        """
        from unittest import mock

        import transformers
        from huggingface_hub import HfFileSystem, constants, hf_api

        changes = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(home / "token"),  # so that nobody's own token is sent
        }
        variables = {"HF_TOKEN": self.token if token is None else token, "HF_HUB_OFFLINE": "0"}
        HfFileSystem.clear_instance_cache()  # it keeps the address with what it listed there
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.multiple(constants, **changes))
            patches.enter_context(mock.patch.dict(os.environ, variables))
            # Clients that were made with another address; newer versions of Transformers have one of their own.
            clients = [hf_api.api]
            if hasattr(transformers.utils.hub, "hf_api"):
                clients.append(transformers.utils.hub.hf_api())
            for client in clients:
                patches.enter_context(mock.patch.object(client, "endpoint", self.url))
            yield
        HfFileSystem.clear_instance_cache()


class _Refused(Exception):
    """An answer that is an error: status, the Hub's code for it, what it says."""


def _refuse(status: int, code: str = "", message: str = "") -> Any:
    raise _Refused(status, code, message)


def _is_stored(path: str) -> bool:
    """Whether a file lies in the storage beside git."""
    return path.endswith((".safetensors", ".gz"))


def _etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_stored(path) else _blob_oid(content)


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
        length = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT" and self.server.cut_after is not None:
            self.rfile.read(min(length, self.server.cut_after))
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.body = self.rfile.read(length)
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

    do_POST = do_PUT = do_HEAD = do_GET

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
        self._answer_json(
            {
                "files": [
                    {
                        "path": path,
                        "oid": _etag(path, files[path]) if path in files else None,
                        "uploadMode": "lfs" if _is_stored(path) else "regular",
                        "shouldIgnore": False,
                    }
                    for path in paths
                ]
            }
        )

    def store_batch(self, kind: str, name: str) -> None:
        self._repository(kind, name, to_write=True)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.stored:
                path = f"{self.server.url}/stored/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": path}, "verify": {"href": f"{path}/verify"}}
            answers.append(answer)
        self._answer_json({"transfer": "basic", "objects": answers})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            _refuse(400, message="The content is not what it was said to be")
        self.server.stored[oid] = self.body
        self._answer(b"")

    def verify(self, oid: str) -> None:
        if len(self.server.stored.get(oid, b"")) != json.loads(self.body)["size"]:
            _refuse(404, message="There is no such content")
        self._answer_json({})

    def branch(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name, to_write=True)
        if revision in repository.branches:
            _refuse(409, message="That branch is there")
        start = repository.at(json.loads(self.body or b"{}").get("startingPoint", "main"))
        repository.branches[revision] = [start]
        self._answer_json({})

    def tag(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name, to_write=True)
        repository.tags[json.loads(self.body)["tag"]] = repository.at(revision)
        self._answer_json({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name, to_write=True)
        if self.server.before_commit is not None:
            self.server.before_commit()
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
            elif operation == "lfsFile":
                stored = self.server.stored.get(line["value"]["oid"])
                files[path] = _refuse(400, message=f"{path} was not sent") if stored is None else stored
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
        repository.branches[revision].append(commit)
        folder = "" if repository.kind == "model" else f"{repository.kind}s/"
        url = f"{self.server.url}/{folder}{repository.name}/commit/{commit.oid}"
        self._answer_json({"success": True, "commitOid": commit.oid, "commitUrl": url})

    def validate_yaml(self) -> None:
        card = json.loads(self.body)
        errors = metadata_errors(card["content"]) if card["repoType"] == "model" else []
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._answer(json.dumps(answer).encode(), 400 if errors else 200, {"Content-Type": "application/json"})

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

    def refs(self, kind: str, name: str) -> None:
        repository = self._repository(kind, name)
        heads = {branch: commits[-1] for branch, commits in repository.branches.items()}
        self._answer_json(
            {
                key: [
                    {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit.oid}
                    for name, commit in found.items()
                ]
                for key, folder, found in (("branches", "heads", heads), ("tags", "tags", repository.tags))
            }
            | {"converts": []}
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
        headers = {"ETag": f'"{_etag(path, content)}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            if start >= len(content):
                _refuse(416, message="There are no such bytes")
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        self._answer(content, status, headers)


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """Files and folders of a commit by path, in the order of paths."""
    entries = {}
    for path, content in commit.files.items():
        entries[path] = {"type": "file", "path": path, "size": len(content), "oid": _blob_oid(content)}
        if _is_stored(path):
            entries[path]["lfs"] = {"oid": _etag(path, content), "size": len(content), "pointerSize": 130}
    for folder in {str(parent) for path in commit.files for parent in Path(path).parents} - {"."}:
        entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": _blob_oid(folder.encode())}
    return dict(sorted(entries.items()))


def metadata_errors(card: str) -> list[str]:
    """What is wrong with the metadata of a model card, by those of the Hub's rules that our cards can break."""
    head = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError as error:
        return [f"The head is no YAML: {error}"]
    if not isinstance(found, dict):
        return ["The head is a mapping"]
    errors = []
    for key, known in _KNOWN.items():
        if key in found and found[key] not in known:
            errors.append(f'"{key}" must be one of {", ".join(sorted(known))}')
    for key in ("base_model", "datasets"):
        names = found.get(key, [])
        for name in [names] if isinstance(names, str) else names:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
                errors.append(f'"{key}" with value "{name}" is not a name on the Hub')
    tags = found.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be a list of strings')
    for model in found.get("model-index", []):
        for result in model.get("results", []):
            for key, part in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not result[key].get(part):
                    errors.append(f'"model-index[0].results[0].{key}.{part}" is required')
            for metric in result["metrics"]:
                if not metric.get("type") or not isinstance(metric.get("value"), (int, float, str)):
                    errors.append('"metrics" must have a type and a value')
        if not model.get("name"):
            errors.append('"model-index[0].name" is required')
    return errors


# Some of the Hub's words, those that a card of ours may use among them.
_KNOWN = {
    "license": {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "other"},
    "pipeline_tag": {"feature-extraction", "fill-mask", "tabular-classification", "text-classification", "other"},
    "library_name": {"transformers", "peft", "sklearn", "scvi-tools"},
}
_API = "/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)[.]git/info/lfs/objects/batch", _Handler.store_batch),
    ("PUT", "/stored/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("POST", "/stored/(?P<oid>[0-9a-f]{64})/verify", _Handler.verify),
    ("POST", f"{_API}/branch/(?P<revision>[^/]+)", _Handler.branch),
    ("POST", f"{_API}/tag/(?P<revision>[^/]+)", _Handler.tag),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("POST", f"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"{_API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", f"{_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", f"{_API}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", f"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", _Handler.tree),
    ("GET", "/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
