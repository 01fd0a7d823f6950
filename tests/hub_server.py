"""An HTTP server on loopback that speaks as much of the Hub's protocol as its client needs to publish and to load."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import huggingface_hub

# Seconds for which the client tries again, at most, where the Hub cannot be reached; before 1.0 no option changes it.
PATIENCE = 3 if int(huggingface_hub.__version__.split(".")[0]) else 50

TOKEN = "hf_right"


@dataclass
class Repo:
    private: bool
    commits: list = field(default_factory=list)  # (hash, {name: content}, names kept by LFS)
    branches: dict = field(default_factory=dict)  # name -> hash
    read_only: bool = False  # for the owner of the right token

    def files(self, revision):
        revision = self.branches.get(revision, revision)
        return next(((h, files, lfs) for h, files, lfs in self.commits if h == revision), None)


class HubServer(ThreadingHTTPServer):
    """`repos`: id -> `Repo`; a Space has "spaces/" before its id.

    `faults`: file name -> list of faults, one for each download, the first first.

    Faults: "truncate" (fewer bytes than said), "short" (fewer bytes, and says so), "corrupt" (as many, one changed),
    "gone" (nothing answers from the middle of this download on).

    `refused`: what the owner of the right token may not make: organisations, and "spaces", which cost money.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.blobs, self.faults, self.refused, self.down, self.log = {}, {}, {}, set(), False, []

    def handle_error(self, request, client_address):
        pass  # clients that hang up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args):
        pass

    def dispatch(self):
        hub, url = self.server, urlparse(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(url.path)
        hub.log.append(f"{self.command} {path}")
        if hub.down:
            self.close_connection = True
            return self.connection.close()
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return getattr(self, method)(*match.groups(), query=parse_qs(url.query))
        self.error(404, "NoRoute", f"no route {self.command} {path}")

    def reply(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, code, message):
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def authorised(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, repo_id, write=False):
        """The repository, or None after having refused."""
        repo = self.server.repos.get(repo_id)
        if "Authorization" in self.headers and not self.authorised():
            return self.error(401, "", "Invalid credentials in Authorization header")
        if repo is None or ((repo.private or write) and not self.authorised()):
            return self.error(401 if not self.authorised() else 404, "RepoNotFound", "Repository not found")
        if write and repo.read_only:
            return self.error(403, "", f"Forbidden: you don't have the rights to write to {repo_id}")
        return repo

    # ---- reading

    def resolve(self, repo_id, revision, name, query):
        repo = self.repo(repo_id)
        if repo is None:
            return
        found = repo.files(revision)
        if found is None:
            return self.error(404, "RevisionNotFound", "Invalid rev id")
        commit, files, lfs = found
        if name not in files:
            self.send_response(404)
            for key, value in {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit, "Content-Length": "0"}.items():
                self.send_header(key, value)
            return self.end_headers()
        content = files[name]
        etag = hashlib.sha256(content).hexdigest() if name in lfs else git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name in lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        start, status = 0, 200
        if asked := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "")):
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        content = content[start:]
        fault = None
        if self.command == "GET" and self.server.faults.get(name):
            fault = self.server.faults[name].pop(0)
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "short":
            content = content[: len(content) // 2]
        if fault in ("truncate", "gone"):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.server.down = fault == "gone"
            self.close_connection = True
            return
        self.reply(status, content, **headers)

    def info(self, repo_id, revision, query):
        repo = self.repo(repo_id)
        if repo is not None:
            commit, files, _ = repo.files(revision or "main") or ("", {}, ())
            siblings = [{"rfilename": name} for name in files]
            self.reply(200, {"id": repo_id, "sha": commit, "private": repo.private, "siblings": siblings})

    # ---- writing

    def create(self, query):
        if not self.authorised():
            return self.error(401, "", "Invalid username or password.")
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if asked.get("type") == "space":
            assert asked["sdk"] == "gradio"
            repo_id = f"spaces/{repo_id}"
        made = {"url": f"{self.server.url}/{repo_id}", "id": repo_id, "name": repo_id}
        if repo_id in self.server.repos:
            return self.reply(409, {"error": "You already created this model repo", **made})
        if asked["organization"] in self.server.refused:
            return self.error(403, "", f"Forbidden: you don't have the rights to create a repo under {repo_id}")
        if asked.get("type") == "space" and "spaces" in self.server.refused:
            return self.error(402, "", "a Gradio Space needs a subscription")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repos[repo_id] = Repo(private=bool(private))
        self.reply(200, made)

    def validate(self, query):
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, repo_id, revision, query):
        repo = self.repo(repo_id, write=True)
        if repo is None:
            return
        if revision not in {"main", *repo.branches}:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.reply(200, {"files": files})

    def branch(self, repo_id, name, query):
        repo = self.repo(repo_id, write=True)
        if repo is None:
            return
        if name in {"main", *repo.branches}:
            return self.error(409, "", f"Reference already exists: refs/heads/{name}")
        repo.branches[name] = repo.branches.get("main", "")
        self.reply(200)

    def lfs_batch(self, repo_id, query):
        if self.repo(repo_id, write=True) is None:
            return
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
            for item in json.loads(self.body)["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid, query):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, "", "the content has another oid")
        self.server.blobs[oid] = self.body
        self.reply(200)

    def commit(self, repo_id, branch, query):
        repo = self.repo(repo_id, write=True)
        if repo is None:
            return
        _, files, lfs = repo.files(branch) or ("", {}, set())
        files, lfs = dict(files), set(lfs)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
                lfs.add(value["path"])
        commit = hashlib.sha1(f"{repo_id} {len(repo.commits)} {sorted(files)}".encode()).hexdigest()
        repo.commits.append((commit, files, lfs))
        repo.branches[branch] = commit
        url = f"{self.server.url}/{repo_id}/commit/{commit}"
        self.reply(200, {"success": True, "commitUrl": url, "commitOid": commit, "pullRequestUrl": None})


ID = r"((?:spaces/)?[\w.-]+/[\w.-]+)"
API = r"/api/(?:models/)?" + ID  # the address of a Space in the API is /api/spaces/...
ROUTES = {
    "/api/repos/create": "create",
    "/api/validate-yaml": "validate",
    rf"{API}/preupload/(.+)": "preupload",
    rf"{API}/branch/(.+)": "branch",
    rf"{API}/commit/(.+)": "commit",
    rf"{API}(?:/revision/(.+))?": "info",
    rf"/{ID}\.git/info/lfs/objects/batch": "lfs_batch",
    r"/lfs/(\w+)": "lfs_put",
    rf"/{ID}/resolve/([^/]+)/(.+)": "resolve",
}


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve(server):
    """Run a server in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
