"""``nanodist export --push`` against a server that speaks as much of the hub's protocol as the client asks for."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from hpc.errors import UserError
from nanodist.export.push import push, require_push

TOKEN = "hf_secretsecretsecret"


class Hub(BaseHTTPRequestHandler):
    """Keeps what is uploaded in ``server.files``; large kinds of files come by the protocol of Git LFS."""

    def log_message(self, *args):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        self.answer({"id": "me/virus", "sha": "0" * 40, "siblings": []})

    def do_PUT(self):
        self.server.blobs[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer({})

    def do_POST(self):
        body, base = self.body(), f"http://127.0.0.1:{self.server.server_port}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or self.server.refuses:
            return self.answer({"error": f"{self.headers.get('Authorization')} may not write here"}, 403)
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            return self.answer({"url": f"{base}/me/virus", "name": "me/virus"})
        if self.path.endswith("/preupload/main"):
            paths = [one["path"] for one in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            return self.answer(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{base}/blob/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if self.path.endswith("/commit/main"):
            self.commit([json.loads(line) for line in body.splitlines()])
            return self.answer({"commitUrl": f"{base}/me/virus/commit/{'1' * 40}", "commitOid": "1" * 40})
        return self.answer({"errors": [], "warnings": []})  # the card's front matter is asked about

    def commit(self, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.blobs, server.made, server.refuses = {}, {}, {}, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # As HF_ENDPOINT and HF_HUB_DISABLE_XET set them before the client is imported.
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join(timeout=10)
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "virus"
    (made / "onnx").mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# virus\n")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (made / "onnx" / "model.json").write_text("{}")
    return made


def test_every_file_arrives_as_it_is(hub, folder, capsys):
    where = push(folder, "me/virus")
    assert where.endswith("/me/virus/commit/" + "1" * 40)
    local = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert hub.files == local
    assert hashlib.sha256(local["model.safetensors"]).hexdigest() in hub.blobs
    assert hub.made["name"] == "virus" and (hub.made.get("visibility") == "private" or hub.made.get("private") is True)
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_refusal_is_one_sentence_without_the_token(hub, folder):
    hub.refuses = True
    with pytest.raises(UserError, match="is written, but was not uploaded to me/virus: ") as caught:
        push(folder, "me/virus")
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_without_token_or_name_nothing_is_begun(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--push needs a token of the hub: set HF_TOKEN"):
        require_push("me/virus")
    for wrong in ("virus", "../x", "me/virus/deep", "me/-x"):
        with pytest.raises(UserError, match="give OWNER/NAME"):
            require_push(wrong)
