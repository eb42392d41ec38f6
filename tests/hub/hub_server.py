"""A small Hub: the part of the Hub's HTTP API that pushing and loading a checkpoint needs, in memory, on localhost."""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
USERS = {WRITER: "alice", READER: "alice", STRANGER: "bob"}


class Hub:
    """
    The server's state. `commits[repo]` holds (sha, files by path), oldest first; `private` the names of private
    repositories; `breaks`, also set by a POST to `/breaks/<what>`, what goes wrong: `"upload"` drops the connection
    while a weight file is uploaded, `"commit"` instead of committing, `"race"` lets somebody else commit first,
    `"answer"` after it has committed.
    """

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.breaks: str | None = None
        self.validated: list[str] = []
        self.lock = threading.Lock()

    def head(self, repo: str) -> tuple[str, dict[str, bytes]]:
        return self.commits[repo][-1]

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{repo}{len(self.commits.get(repo, []))}{sorted(files)}".encode()).hexdigest()
        self.commits.setdefault(repo, []).append((sha, files))
        return sha

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits[repo]
        return commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    # Answers

    def answer(self, status=200, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def break_off(self):
        self.close_connection = True
        self.connection.close()

    # Who asks for what

    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def may_read(self, repo):
        if repo in self.hub.commits and (repo not in self.hub.private or USERS.get(self.token) == repo.split("/")[0]):
            return True
        self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return False

    def may_write(self, repo):
        if self.token not in USERS:
            self.refuse(401, "Unauthorized", "Invalid credentials")
        elif self.token == READER or USERS[self.token] != repo.split("/")[0]:
            self.refuse(403, "Forbidden", "You do not have write access")
        else:
            return True
        return False

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if path == ["api", "whoami-v2"]:
            if self.token in USERS:
                self.answer(200, {"name": USERS[self.token], "type": "user", "orgs": []})
            else:
                self.refuse(401, "Unauthorized", "Invalid credentials")
        elif path[:2] == ["api", "models"]:
            repo = "/".join(path[2:4])
            if self.may_read(repo):
                self.get_info(repo, path[4:])
        elif len(path) > 4 and path[2] == "resolve" and self.may_read("/".join(path[:2])):
            self.get_file("/".join(path[:2]), path[3], "/".join(path[4:]))
        elif len(path) <= 4 or path[2] != "resolve":
            self.refuse(404, "EntryNotFound", "No such page")

    do_HEAD = do_GET

    def get_info(self, repo, rest):
        found = self.hub.find(repo, rest[1] if len(rest) > 1 else "main")
        if found is None:
            self.refuse(404, "RevisionNotFound", "No such revision")
            return
        sha, files = found
        if rest and rest[0] == "tree":
            folder = "".join(f"{part}/" for part in rest[2:])
            files = {name: content for name, content in files.items() if name.startswith(folder)}
            if not files:
                self.refuse(404, "EntryNotFound", f"{folder} is not there")
                return
            self.answer(200, [{"type": "file", "path": n, "size": len(f), "oid": oid(f)} for n, f in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, {"id": repo, "modelId": repo, "sha": sha, "private": repo in self.hub.private,
                              "siblings": siblings, "tags": []})  # fmt: skip

    def get_file(self, repo, revision, name):
        found = self.hub.find(repo, revision)
        if found is None or name not in found[1]:
            self.refuse(404, "EntryNotFound" if found else "RevisionNotFound", f"{name} is not there")
            return
        sha, files = found
        self.answer(200, files[name], ETag=f'"{oid(files[name])}"', X_Repo_Commit=sha, Accept_Ranges="none")

    def do_PUT(self):
        if self.hub.breaks == "upload":
            self.rfile.read(1000)
            self.break_off()
            return
        self.hub.objects[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer()

    def do_POST(self):
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        content = self.body()
        if path[4:5] == ["branch"]:
            self.answer()
        elif path == ["api", "validate-yaml"]:
            self.validate(json.loads(content)["content"])
        elif path[:1] == ["breaks"]:
            self.hub.breaks = path[1]
            self.answer()
        elif path == ["api", "repos", "create"]:
            asked = json.loads(content)
            repo = f"{asked.get('organization') or USERS.get(self.token)}/{asked['name']}"
            if not self.may_write(repo):
                return
            if repo in self.hub.commits:
                self.answer(409, {"error": "You already created this model repo", "url": f"{self.origin}/{repo}"})
                return
            self.hub.commit(repo, {".gitattributes": b""})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repo)
            self.answer(200, {"url": f"{self.origin}/{repo}", "name": repo, "id": repo})
        elif path[-1] == "verify":
            self.answer(200, {})
        elif path[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                {**o, "authenticated": True, "actions": {"upload": {"href": f"{self.origin}/lfs/{o['oid']}"}}}
                for o in json.loads(content)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif path[4:5] == ["preupload"]:
            repo = "/".join(path[2:4])
            if self.may_write(repo):
                modes = {
                    f["path"]: "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular"
                    for f in json.loads(content)["files"]
                }
                files = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
                self.answer(200, {"files": files})
        elif path[4:5] == ["commit"]:
            repo = "/".join(path[2:4])
            if self.may_write(repo):
                self.commit(repo, [json.loads(line) for line in content.splitlines() if line])
        else:
            self.refuse(404, "EntryNotFound", f"POST {self.path}")

    def commit(self, repo, lines):
        if self.hub.breaks == "commit":
            self.break_off()
            return
        if self.hub.breaks == "race":
            self.hub.commit(repo, {**self.hub.head(repo)[1], "notes.md": b"somebody else's"})
        sha, files = self.hub.head(repo)
        files, parent = dict(files), None
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                parent = value.get("parentCommit")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if parent not in (None, sha):
            self.refuse(412, "Conflict", "A commit has happened since")
            return
        new = self.hub.commit(repo, files)
        if self.hub.breaks == "answer":
            self.break_off()
            return
        self.answer(200, {"success": True, "commitOid": new, "commitUrl": f"{self.origin}/{repo}/commit/{new}",
                          "hookOutput": "", "pullRequestUrl": None})  # fmt: skip

    def validate(self, card):
        """Checks a card's metadata as the Hub does: there, parsed, with names, tags and results of their shapes."""
        self.hub.validated.append(card)
        try:
            data = yaml.safe_load(card.split("---\n")[1])
            assert re.fullmatch(r"[a-z0-9.-]+", data.get("license", "mit")), "license"
            assert isinstance(data["tags"], list) and all(isinstance(tag, str) for tag in data["tags"])
            for model in data.get("model-index", []):
                assert isinstance(model["name"], str)
                for result in model["results"]:
                    assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
                    assert all(metric["type"] and "value" in metric for metric in result["metrics"])
        except (AssertionError, KeyError, IndexError, TypeError, yaml.YAMLError) as error:
            self.answer(400, {"errors": [{"message": repr(error)}], "warnings": []})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    @property
    def origin(self):
        return f"http://{self.headers['Host']}"


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running_hub():
    """
    Yields:
        `tuple[Hub, str]`: Its state and its URL.
    """
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(url: str, home, token: str | None) -> dict[str, str]:
    """The variables with which a process takes the server for the Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    variables = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return {**kept, **variables, **({"HF_TOKEN": token} if token else {})}


__all__ = ["READER", "STRANGER", "WRITER", "Hub", "environment", "running_hub"]
