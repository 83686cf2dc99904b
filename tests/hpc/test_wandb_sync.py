"""Offline records of several starts, sent by the real client to a stand-in of W&B's server."""

import json

import numpy as np
import pytest
from PIL import Image

from hpc.errors import UserError
from hpc.run_dir import RunDir
from hpc.tracking import Tracker
from hpc.wandb_sync import find_offline, send
from nanodist.cli import main
from tests.wandb_server import WandbServer

pytest.importorskip("wandb")


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
        with Tracker(run, is_main=True, mode="offline", project="tem", first_step=first) as tracker:
            for step in range(first + 1, last + 1):
                tracker.log({"step": step, "loss": 1 / step})
            Image.fromarray(np.full((8, 8), first, np.uint8)).save(run.pictures / f"pairs-{covered:08d}.png")
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
        rows = [row for row in server.history[offline.run_id] if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, 10))
        assert [row["loss"] for row in rows] == pytest.approx([1 / step for step in range(1, 10)])
        pictures = [name for _, name in server.files if name.startswith("media/images/pictures/pairs")]
        assert len(pictures) == 3
        assert {json.loads(u["config"])["_wandb"]["value"]["t"] is not None for u in server.upserts[offline.run_id]}
        sent = len(server.upserts[offline.run_id])
        # What was sent is not sent again.
        assert main(["sync", str(folder)]) == 0
        assert capsys.readouterr().out == "1 offline runs: 0 records sent\n"
        assert len(server.upserts[offline.run_id]) == sent


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
