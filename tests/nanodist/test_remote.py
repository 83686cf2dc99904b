"""Stores over http: blocks through a bounded folder, with retries; and shards staged to a disk of the node."""

from __future__ import annotations

import http.server
import multiprocessing
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc.errors import UserError
from nanodist.decoding import remote as fetching
from nanodist.decoding.remote import Cache, fetch
from nanodist.shards import Loader, Order, PackOptions, Store, pack
from nanodist.shards.local import stage
from nanodist.shards.remote import open_remote

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


@pytest.fixture
def store(tmp_path):
    (tmp_path / "src").mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "src" / f"m{number:02d}.png")
    return pack([tmp_path / "src"], tmp_path / "store", PackOptions(tile=None, shard_mb=0.05, encoding="raw"))


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges; ``fail`` says what becomes of the n-th request for a shard."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.fail = folder, [], lambda n: ""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.server.folder / self.path.lstrip("/")
        span = self.headers.get("Range")
        how = ""
        if path.suffix == ".tar":
            self.server.asked.append((path.name, span))
            how = self.server.fail(len(self.server.asked))
        if how == "error" or not path.is_file():
            self.send_response(503 if how else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        if span:
            low, high = map(int, span.removeprefix("bytes=").split("-"))
            data = data[low : high + 1]
        if how == "short":
            data = data[: len(data) // 2]
        if how == "flip":
            data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(store, monkeypatch):
    monkeypatch.setattr(fetching, "_FIRST_WAIT_S", 0.01)
    with Server(store.path) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def address(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_a_store_over_http_is_the_store(store, server, tmp_path):
    there = open_remote(address(server), cache=Cache(str(tmp_path / "cache"), 1 << 30))
    assert there.manifest_hash == store.manifest_hash and there.keys == store.keys
    order = Order(40, 0, 8)
    with Loader(there, order, 0, 1) as loader, Loader(store, order, 0, 1) as local:
        for _ in range(10):
            np.testing.assert_array_equal(next(loader).images, next(local).images)
    # Each shard is one block here, fetched once; a second loader, or one in processes, fetches none.
    assert len(server.asked) == len(store.manifest.shards) == len(set(server.asked))
    with Loader(pickle.loads(pickle.dumps(there)), order, 0, 1) as again:
        np.testing.assert_array_equal(next(again).images[0], store.read(order.batch(0)[0][1]))
    assert len(server.asked) == len(store.manifest.shards)


def test_processes_read_remote_shards_too(store, server, tmp_path):
    there = open_remote(address(server), cache=Cache(str(tmp_path / "cache"), 1 << 30))
    there.manifest.options["x"] = 1
    type(there).costs_decoding = property(lambda _: True)
    try:
        with Loader(there, Order(40, 0, 8), 0, 1, workers=2) as loader:
            for step in range(30):
                batch = next(loader)
                assert batch.step == step
                np.testing.assert_array_equal(batch.images, np.stack([store.read(int(i)) for i in batch.indices]))
    finally:
        del type(there).costs_decoding


def test_failures_are_tried_again(store, server, tmp_path):
    there = open_remote(address(server), cache=Cache(str(tmp_path / "cache"), 1 << 30))
    server.fail = lambda n: {1: "error", 2: "short", 3: "error", 5: "flip"}.get(n, "")
    for i in range(40):
        np.testing.assert_array_equal(there.read(i), store.read(i))
    assert len(server.asked) == len(store.manifest.shards) + 4
    server.fail = lambda n: "error"
    lost = open_remote(address(server), cache=Cache(str(tmp_path / "other"), 1 << 30))
    with pytest.raises(UserError, match=r"shard-000000.tar, sample m00: the shard cannot be read .*, 5 times"):
        lost.read(0)
    # A network that fails is no damaged sample: nothing may stand in for it.
    with (
        Loader(lost, Order(40, 0, 8), 0, 1, corrupt="replace") as loader,
        pytest.raises(UserError, match="cannot be read"),
    ):
        next(loader)


def test_the_folder_stays_bounded(store, server, tmp_path):
    most = 2 * store.manifest.shards[0].bytes
    there = open_remote(address(server), cache=Cache(str(tmp_path / "cache"), most))
    for epoch in range(2):
        for i in range(40):
            np.testing.assert_array_equal(there.read(i), store.read(i))
            kept = sum(path.stat().st_size for path in (tmp_path / "cache" / "blocks").glob("*/*"))
            assert kept <= most + store.manifest.shards[0].bytes, epoch
    assert len(server.asked) == 2 * len(store.manifest.shards)


def test_no_such_store(server, tmp_path):
    cache = Cache(str(tmp_path / "cache"), 1 << 30)
    with pytest.raises(UserError, match=r"has no manifest\.json, so it is no store"):
        open_remote(address(server) + "/nothing", cache=cache)
    with pytest.raises(UserError, match=r"cannot be read"):
        open_remote("http://127.0.0.1:9", cache=cache)
    with pytest.raises(UserError, match="cannot be read"):
        fetch("nonsense://x")


def _staged(path, folder, rank):
    stage(Store.open(path), folder, rank)


def test_staging_copies_each_shard_once_whichever_ranks_ask(store, tmp_path):
    folder = tmp_path / "local"
    ranks = [
        multiprocessing.get_context("fork").Process(target=_staged, args=(store.path, folder, r)) for r in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    (target,) = folder.iterdir()
    times = {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert set(times) == {shard.file for shard in store.manifest.shards}
    staged = stage(store, folder)
    assert {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")} == times
    for shard in store.manifest.shards:  # the originals are not needed any more
        (store.path / shard.file).unlink()
    np.testing.assert_array_equal(staged.read(7).shape, (64, 64))
    assert staged.manifest_hash == store.manifest_hash


def test_staging_refuses_a_damaged_shard_and_a_full_disk(store, tmp_path, monkeypatch):
    path = store.path / store.manifest.shards[1].file
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path.name} is damaged"):
        stage(store, tmp_path / "local")
    assert not list((tmp_path / "local").glob(f"*/*{path.name}*.tmp"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match=r"0.0 GiB free and the shards need"):
        stage(store, tmp_path / "other")


def test_a_store_in_a_bucket_streams_into_processes(store, tmp_path, monkeypatch):
    pytest.importorskip("flask_cors")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3fs = pytest.importorskip("s3fs")
    for name, value in {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("bucket")
        files.put(str(tmp_path / "store"), "bucket/store", recursive=True)
        remote = open_remote("s3://bucket/store", cache=Cache(str(tmp_path / "cache"), 1 << 30))
        with Loader(remote, Order(40, 0, 8), 0, 1, workers=2) as loader:
            for batch in (next(loader) for _ in range(10)):
                assert np.array_equal(batch.images, np.stack([store.read(i) for i in batch.indices.tolist()]))
        assert 0 < remote.files.traffic.bytes_read <= remote.shard_bytes + 40 * 512
    finally:
        server.stop()
