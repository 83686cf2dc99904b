"""Offline records of several starts, sent by the real client to a stand-in of W&B's server."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hpc import lineage, wandb_after
from hpc.errors import UserError
from hpc.run_dir import RunDir
from hpc.tracking import Tracker
from hpc.wandb_sync import find_offline, send
from nanodist.cli import main
from tests.wandb_server import WandbServer

pytest.importorskip("wandb")


SHARD = SimpleNamespace(file="shard-000000.tar", xxh3="ab" * 16, bytes=123)
STORE = SimpleNamespace(path="/data/virus", manifest_hash="52" * 32, manifest=SimpleNamespace(shards=[SHARD]))


def checkpoint(run, step):
    """What a checkpoint says of itself."""
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir(exist_ok=True)
    files = {"model.safetensors": {"bytes": 4, "xxh3_128": f"{step:032x}"}}
    (folder / "index.json").write_text(json.dumps({"files": files}))
    (folder / "model.safetensors").write_bytes(b"abcd")
    (run.checkpoints / "latest").write_text(folder.name)


@pytest.fixture
def three_starts(tmp_path, monkeypatch):
    """A run directory of a run that was killed, preempted, and then completed, recorded by the real W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    run = RunDir.prepare(tmp_path / "runs" / "tem", "seed: 1\n", "f00d")
    ends = ("killed", "preempted: SIGUSR2", "completed")
    for (first, last, covered), reason in zip(((0, 5, 4), (4, 7, 7), (7, 9, 9)), ends, strict=True):
        run.begin_start({"rank": 0}, first + 1)
        how = {"inputs": lambda: lineage.of_data(STORE), "upload": first == 7}
        with Tracker(run, is_main=True, mode="offline", project="tem", first_step=first, **how) as tracker:
            for step in range(first + 1, last + 1):
                tracker.log({"step": step, "loss": 1 / step})
            Image.fromarray(np.full((8, 8), first, np.uint8)).save(run.pictures / f"pairs-{covered:08d}.png")
            checkpoint(run, covered)
            tracker.cover(covered)
        if reason != "killed":
            run.end_start(last, reason)
    return run


def test_three_offline_starts_are_one_run_with_each_step_once(three_starts, monkeypatch, capsys):
    folder = three_starts.path.parent
    (offline,) = find_offline([folder])
    assert len(offline.files) == 3 and not offline.busy
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        assert main(["sync", str(folder)]) == 0
        assert capsys.readouterr().out == "1 offline runs: 3 records sent\n"
        assert list(server.history) == [offline.run_id]
        rows = [row for row in server.history[offline.run_id] if "train/loss" in row]
        assert [row["step"] for row in rows] == list(range(1, 10))
        assert [row["train/loss"] for row in rows] == pytest.approx([1 / step for step in range(1, 10)])
        pictures = [name for _, name in server.files if name.startswith("media/images/pictures/pairs")]
        assert len(pictures) == 3
        # W&B's own words: 5 is the place, from one on, of the metric that is the axis.
        defined = json.loads(server.upserts[offline.run_id][-1]["config"])["_wandb"]["value"]["m"]
        axes = {one.get("2", one.get("1")): one.get("5") for one in defined}
        assert {defined[axes[name] - 1]["1"] for name in ("*", "samples_seen", "epoch")} == {"step"}
        assert {json.loads(u["config"])["_wandb"]["value"]["t"] is not None for u in server.upserts[offline.run_id]}
        sent = len(server.upserts[offline.run_id])
        # What was sent is not sent again.
        assert main(["sync", str(folder)]) == 0
        assert capsys.readouterr().out == "1 offline runs: 0 records sent\n"
        assert len(server.upserts[offline.run_id]) == sent


def test_lineage_goes_from_the_store_over_checkpoints_to_the_export(three_starts, tmp_path, monkeypatch, capfd):
    run = three_starts
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"wxyz")
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    told = {"figures": {"probe/linear/8": 0.5}, "pictures": {"pictures/label-efficiency": picture.getvalue()}}
    assert wandb_after.tell(run.path, lambda: [lineage.of_folder(folder)], **told)
    assert not wandb_after.tell(tmp_path, lambda: [lineage.of_folder(folder)])
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        assert main(["sync", str(run.path)]) == 0
    assert capfd.readouterr() == ("1 offline runs: 4 records sent\n", "")
    run_id = (run.wandb / "run_id").read_text().strip()
    # Three starts named the store, and a checkpoint was named by the start that wrote it and by the next: one version.
    assert sorted({key.partition(":")[0] for key in server.artifacts}) == [
        "checkpoint-f00d",
        "checkpoint-f00d-files",
        lineage.of_folder(folder).name,
        "store-525252525252",
    ]
    (store,) = [key for key in server.artifacts if key.startswith("store-")]
    assert server.used == [(run_id, store)] * 3 and (run_id, store) not in server.made
    versions = {key: one for key, one in server.artifacts.items() if one["name"] == "checkpoint-f00d"}
    assert [json.loads(one["metadata"])["step"] for one in versions.values()] == [4, 7, 9]
    assert {alias["alias"] for alias in [*versions.values()][-1]["aliases"]} == {"latest", "step-9", "final"}
    assert all((run_id, key) in server.made for key in server.artifacts if key != store)
    manifest = json.loads(server.files["manifests", store])["contents"]
    assert "xxh3=abab" in manifest["shard-000000.tar"]["ref"] and manifest["shard-000000.tar"]["size"] == 123
    # The third start sends the files of its checkpoint, and nothing else is uploaded; no path of the machine is told.
    uploaded = {name.rpartition("/")[2] for kind, name in server.files if kind == "artifacts"}
    assert (
        uploaded == {"model.safetensors"} and b"abcd" in server.files.values() and b"wxyz" not in server.files.values()
    )
    assert not any(str(tmp_path).encode() in data for (kind, _), data in server.files.items() if kind == "manifests")
    (shown,) = [row for row in server.history[run_id] if "pictures/label-efficiency" in row]
    assert shown["step"] == 9


def test_what_ended_is_told_only_of_a_run_that_ended(three_starts, capsys):
    record = three_starts.record()
    record["starts"][-1]["reason"] = None
    three_starts.record_path.write_text(json.dumps(record))
    assert not wandb_after.tell(three_starts.path, lambda: [])
    assert "still going" in capsys.readouterr().err


def test_a_source_is_a_checkpoint_an_export_or_nothing(three_starts, tmp_path):
    newest = lineage.of_source(three_starts.path)
    assert (
        newest
        == lineage.of_source(three_starts.checkpoints / "step-00000009")
        == lineage.newest_checkpoint(three_starts.path)
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert lineage.of_source(tmp_path / "a") == lineage.of_source(tmp_path / "b") != newest
    assert lineage.of_source("timm:resnet18") is None and lineage.of_source(tmp_path / "none") is None
    many = SimpleNamespace(shards=[SHARD] * (lineage.MOST_FILES + 1))
    (store,) = lineage.of_data(SimpleNamespace(path="s3://x/big", manifest_hash="1" * 64, manifest=many), object())
    assert [one.name for one in store.files] == ["manifest.json"] and store.facts["folder"] == "big"


def test_a_lineage_that_fails_warns_and_curves_go_on(three_starts, capsys):
    def broken():
        raise ValueError("no such store")

    with Tracker(three_starts, is_main=True, mode="offline", first_step=9, inputs=broken) as tracker:
        tracker.log({"step": 10})
        assert tracker.mode == "offline"
    assert "no lineage (no such store)" in capsys.readouterr().err


def test_the_record_of_a_start_that_runs_waits_for_its_end(three_starts):
    record = three_starts.record()
    record["starts"][-1]["reason"] = None
    three_starts.record_path.write_text(json.dumps(record))
    (offline,) = find_offline([three_starts.path])
    assert (len(offline.files), len(offline.busy)) == (2, 1)
    (offline,) = find_offline([three_starts.path], unfinished=True)
    assert (len(offline.files), len(offline.busy)) == (3, 0)


def test_without_a_login_or_a_run_one_sentence_says_it(three_starts, tmp_path):
    (offline,) = find_offline([three_starts.path])
    with pytest.raises(UserError, match="no W&B API key: run 'wandb login'"):
        send(offline)
    with pytest.raises(UserError, match="holds no run"):
        find_offline([tmp_path / "runs" / "tem" / "wandb"])
    with pytest.raises(UserError, match="does not exist"):
        find_offline([tmp_path / "nowhere"])
