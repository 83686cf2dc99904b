"""A local stand-in for W&B's server: what its client sends of runs is kept, so that tests can look at it.

It answers the few GraphQL operations, the file stream and the uploads that ``wandb`` 0.17 to 0.31 use for a run.
"""

import gzip
import json
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer:
    """``with WandbServer() as server``: listens on ``server.url`` until the end of the block.

    Attributes:
        history: run id -> metric rows in the order in which the server has them.
        files: (run id, name) -> bytes.
        upserts: run id -> the variables of each upsert.
        views: the variables of each dashboard that was saved.
        artifacts: id -> what the client said of each artifact; equal digests of one name are one, as W&B has it.
        made, used: (run id, artifact id), in the order of the requests.
        broken: while it is set, every request is answered with status 500.
    """

    def __init__(self):
        self.history = defaultdict(list)
        self.files = {}
        self.upserts = defaultdict(list)
        self.views = []
        self.artifacts, self.made, self.used = {}, [], []
        self.broken = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = _body(self)
                if server.broken:
                    _reply(self, {"errors": [{"message": "out of order"}]}, 500)
                elif self.path == "/graphql":
                    _reply(self, {"data": server.answer(json.loads(body))})
                elif self.path.endswith("/file_stream"):
                    server.stream(self.path.split("/")[-2], json.loads(body))
                    _reply(self, {"exitcode": None, "limits": {}})
                else:
                    _reply(self, {}, 404)

            def do_PUT(self):
                _, _, run, name = self.path.split("/", 3)
                server.files[run, name] = _body(self)
                _reply(self, {})

            def do_GET(self):
                _reply(self, {})

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request):
        """The data that answers a GraphQL request."""
        variables = request.get("variables") or {}
        operation = request.get("operationName") or request["query"].split("(")[0].split()[-1]
        if operation == "UpsertBucket":
            run = variables["name"]
            self.upserts[run].append(variables)
            return {"upsertBucket": {"bucket": self._bucket(run, variables), "inserted": len(self.upserts[run]) == 1}}
        if operation == "RunResumeStatus":
            run = variables["name"]
            bucket = self._bucket(run, self.upserts[run][-1]) if self.upserts.get(run) else None
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "lab"}, "bucket": bucket}}
        if operation == "CreateRunFiles":
            run = variables["run"]
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{run}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        if operation == "UpsertView2":
            self.views.append(variables)
            view = {"id": "v", "name": variables["name"], "type": variables["type"], "spec": variables["spec"]}
            return {"upsertView": {"view": {"displayName": variables["displayName"], **view}, "inserted": True}}
        if operation.endswith(("Artifact", "ArtifactManifest", "ArtifactFiles")):
            return self._artifact(operation, variables)
        if operation in ("Viewer", "ServerInfo", "GetDefaultEntity"):
            return {"viewer": {"id": "u", "entity": "lab", "username": "lab", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _artifact(self, operation, variables):
        """What artifacts take: each is created, gets a manifest and perhaps files, and is committed."""
        told = variables.get("input") or variables
        if operation == "CreateArtifact":
            names = [name for name in told if name.startswith("artifactCollectionName")]
            key = f"{told[names[0]]}:{told['digest']}"
            known = key in self.artifacts and self.artifacts[key]["committed"]
            self.artifacts.setdefault(key, {**told, "name": told[names[0]], "manifest": None, "committed": False})
            self.made.append((told["runName"], key))
            state = "COMMITTED" if known else "PENDING"
            return {"createArtifact": {"artifact": {"id": key, "state": state, "artifactSequence": {}}}}
        if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            key = told.get("artifactID") or told["artifactManifestID"]
            file = {"id": "f", "uploadUrl": f"{self.url}/put/manifests/{key}", "uploadHeaders": []}
            name = operation[0].lower() + operation[1:]
            return {name: {"artifactManifest": {"id": key, "file": file}}}
        if operation == "CreateArtifactFiles":
            names = [(one["artifactID"], one["name"]) for one in told["artifactFiles"]]
            nodes = [
                {
                    "storagePath": name,
                    "uploadUrl": f"{self.url}/put/artifacts/{key}/{name}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": key},
                }
                for key, name in names
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if operation == "CommitArtifact":
            one = self.artifacts[told["artifactID"]]
            one["committed"] = True
            return {"commitArtifact": {"artifact": {"id": told["artifactID"], "digest": one["digest"]}}}
        if operation == "UseArtifact":
            self.used.append((told["runName"], told["artifactID"]))
            return {"useArtifact": {"artifact": {"id": told["artifactID"]}}}
        return {}

    def _bucket(self, run, variables):
        rows = self.history[run]
        return {
            "id": run,
            "name": run,
            "displayName": variables.get("displayName"),
            "description": "",
            "config": variables.get("config"),
            "summaryMetrics": json.dumps(rows[-1] if rows else {}),
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "tags": [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
            "sweepName": None,
            "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "lab"}},
        }

    def stream(self, run, body):
        """Take rows in at the offset that the client gives, as W&B's file stream does."""
        part = (body.get("files") or {}).get("wandb-history.jsonl")
        if part:
            rows = self.history[run]
            rows[part["offset"] :] = [json.loads(line) for line in part["content"]]


def _body(handler):
    data = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    return gzip.decompress(data) if handler.headers.get("Content-Encoding") == "gzip" else data


def _reply(handler, value, status=200):
    data = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
