import json
import sys

import pytest

from hpc.errors import UserError
from hpc.run_dir import MetricsWriter, RunDir, read_metrics
from hpc.tracking import Tracker, has_api_key, resolve_mode
from tests.hpc.small_disk import fill, small_disk

NOWHERE = {"NETRC": "/nonexistent"}


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return RunDir.prepare(tmp_path / "run", "seed: 1\n", "f00d")


class FakeRun:
    """Keeps what W&B would be sent."""

    def __init__(self, **arguments):
        self.arguments, self.sent, self.exit_code, self.starting_step = arguments, [], None, 0

    def define_metric(self, name, step_metric=None, hidden=False):
        self.__dict__.setdefault("axes", {})[name] = (step_metric, hidden)

    def log(self, values, step):
        self.sent.append(step)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch):
    """Replace ``wandb.init``; the list holds the runs that it started."""
    wandb = pytest.importorskip("wandb")
    runs = []
    monkeypatch.setattr(wandb, "init", lambda **arguments: runs.append(FakeRun(**arguments)) or runs[-1])
    return runs


@pytest.mark.parametrize(
    ("mode", "environ", "expected"),
    [
        ("auto", NOWHERE, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {**NOWHERE, "WANDB_MODE": "dryrun"}, "offline"),
        ("online", {**NOWHERE, "WANDB_MODE": "offline"}, "online"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_modes(mode, environ, expected):
    assert resolve_mode(mode, environ) == expected


def test_an_unknown_mode_is_named():
    with pytest.raises(UserError, match="'on'; allowed: auto, online, offline, disabled"):
        resolve_mode("on", {})
    with pytest.raises(UserError, match="WANDB_MODE is 'maybe'"):
        resolve_mode("auto", {"WANDB_MODE": "maybe"})


def test_a_key_in_netrc_counts(tmp_path):
    path = tmp_path / "netrc"
    path.write_text("machine api.wandb.ai login user password key\n")
    assert has_api_key({"NETRC": str(path)})
    assert not has_api_key({"NETRC": str(path), "WANDB_BASE_URL": "https://wandb.our.site"})


def test_disabled_writes_metrics_only(run_dir, fake):
    with Tracker(run_dir, is_main=True, mode="disabled") as tracker:
        tracker.log({"step": 1, "loss": 0.5})
    assert read_metrics(run_dir.metrics_path) == [{"step": 1, "loss": 0.5}]
    assert fake == [] and list(run_dir.wandb.iterdir()) == []


def test_other_ranks_write_nothing(run_dir, fake):
    with Tracker(run_dir, is_main=False, mode="offline") as tracker:
        tracker.log({"step": 1, "loss": 0.5})
    assert fake == [] and not run_dir.metrics_path.exists()


def test_offline_writes_real_files_under_one_id_and_says_nothing(run_dir, capfd):
    pytest.importorskip("wandb")
    ids = []
    for step in (1, 2):
        with Tracker(run_dir, is_main=True, mode="auto", project="p", config={"seed": 1}) as tracker:
            assert tracker.mode == "offline"
            tracker.log({"step": step, "loss": 1 / step})
            tracker.cover(step)
        ids.append((run_dir.wandb / "run_id").read_text().strip())
    assert ids[0] == ids[1]
    recorded = sorted(path.name for path in run_dir.wandb.glob("offline-run-*/*.wandb"))
    assert recorded == [f"run-{ids[0]}.wandb"] * 2
    assert [line["step"] for line in read_metrics(run_dir.metrics_path)] == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_offline_sends_each_step_once_when_a_checkpoint_covers_it(run_dir, fake):
    # Killed after steps 4 (checkpoint of 2), 3 (of 2: told too late), 6 (of 5), and done.
    for first, steps, covered in ((0, (1, 2, 3, 4), 2), (2, (3,), None), (2, (3, 4, 5, 6), 5), (5, (6, 7), 7)):
        tracker = Tracker(run_dir, is_main=True, mode="offline", first_step=first)
        for step in steps:
            tracker.log({"step": step})
        if covered:
            tracker.cover(covered)
    assert [run.sent for run in fake] == [[1, 2], [], [3, 4, 5], [6, 7]]
    assert len({run.arguments["id"] for run in fake}) == 1 and fake[2].arguments["resume"] == "allow"
    assert [line["step"] for line in read_metrics(run_dir.metrics_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_what_a_checkpoint_held_when_a_start_was_killed_is_sent_by_the_next(run_dir, fake):
    tracker = Tracker(run_dir, is_main=True, mode="offline")
    for step in (1, 2, 3):
        tracker.log({"step": step})  # a checkpoint of step 2 was written, and the kill came before it was told
    tracker = Tracker(run_dir, is_main=True, mode="offline", first_step=2)
    assert [run.sent for run in fake] == [[], [1, 2]]
    # The newest checkpoint is broken: what is trained again from step 1 is not sent again.
    tracker = Tracker(run_dir, is_main=True, mode="offline", first_step=1)
    for step in (2, 3):
        tracker.log({"step": step, "again": True})
    tracker.cover(3)
    assert fake[2].sent == [3]


def test_online_curves_are_live_and_go_on_where_the_server_stands(run_dir, fake, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    tracker = Tracker(run_dir, is_main=True, mode="online")
    tracker.log({"step": 1})
    tracker.log({"step": 2})
    assert fake[0].sent == [1, 2]
    monkeypatch.setattr(FakeRun, "starting_step", 3, raising=False)
    monkeypatch.setattr(FakeRun, "__init__", lambda self, **a: setattr(self, "sent", []))
    tracker = Tracker(run_dir, is_main=True, mode="online", first_step=1)
    for step in (2, 3):
        tracker.log({"step": step})
    assert fake[1].sent == [3]


def test_switching_wandb_on_later_sends_the_history(run_dir, fake):
    MetricsWriter(run_dir.metrics_path).write({"step": 1})
    tracker = Tracker(run_dir, is_main=True, mode="offline", first_step=1)
    tracker.log({"step": 2})
    tracker.cover(2)
    assert fake[0].sent == [1, 2]


def test_pictures_are_shown_under_their_names(run_dir, fake, monkeypatch):
    shown = []
    monkeypatch.setattr(FakeRun, "log", lambda self, values, step: shown.append((step, *values)))
    monkeypatch.setattr("wandb.Image", str)
    tracker = Tracker(run_dir, is_main=True, mode="offline")
    (run_dir.pictures / "pairs-00000002.png").write_bytes(b"")
    tracker.log({"step": 2})
    tracker.cover(2)
    tracker.log({"step": 3})
    tracker.cover(3)
    assert shown == [(2, "step"), (2, "pictures/pairs"), (3, "step")]


def test_metrics_have_sections_and_stand_over_steps(run_dir, fake, monkeypatch):
    names = {"lr": "optimizer/lr", "loss": "train/loss", "images_per_s": "throughput/images_per_s"}
    names |= {"term_kl": "terms/kl", "eval_knn": "evaluation/knn", "validation_iou": "validation/iou"}
    names |= {"alignment": "measures/alignment", "step": "step", "samples_seen": "samples_seen", "epoch": "epoch"}
    given = []
    monkeypatch.setattr(FakeRun, "log", lambda self, values, step: given.append(values))
    line = dict.fromkeys(names, 1)
    with Tracker(run_dir, is_main=True, mode="offline") as tracker:
        tracker.log(line)
        tracker.cover(1)
    assert given == [dict.fromkeys(names.values(), 1)]
    assert read_metrics(run_dir.metrics_path) == [line]
    hidden = ("step", True)
    assert fake[0].axes == {"step": (None, True), "samples_seen": hidden, "epoch": hidden, "*": ("step", False)}


def test_online_without_a_key_records_offline(run_dir, fake, capsys):
    tracker = Tracker(run_dir, is_main=True, mode="online")
    assert tracker.mode == "offline" and fake[0].arguments["mode"] == "offline"
    assert "no API key" in capsys.readouterr().err


def test_an_exception_ends_the_run_as_failed(run_dir, fake):
    with pytest.raises(RuntimeError), Tracker(run_dir, is_main=True, mode="offline"):
        raise RuntimeError
    assert fake[0].exit_code == 1


def test_missing_wandb_warns_once_and_training_goes_on(run_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    with Tracker(run_dir, is_main=True, mode="online") as tracker:
        tracker.log({"step": 1})
        assert tracker.mode == "disabled"
    assert capsys.readouterr().err.count("warning") == 1
    assert [line["step"] for line in read_metrics(run_dir.metrics_path)] == [1]


def test_a_failing_start_falls_back_to_offline(run_dir, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "k")

    def init(**arguments):
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route\nto host")
        return FakeRun(**arguments)

    monkeypatch.setattr(wandb, "init", init)
    assert Tracker(run_dir, is_main=True, mode="online").mode == "offline"
    warning = capsys.readouterr().err
    assert "no route to host" in warning and warning.count("\n") == 1


def test_a_log_that_fails_warns_once_and_metrics_go_on(run_dir, fake, capsys):
    with Tracker(run_dir, is_main=True, mode="offline") as tracker:
        fake[0].log = lambda *args, **kwargs: 1 / 0
        for step in (1, 2):
            tracker.log({"step": step})
            tracker.cover(step)
    assert capsys.readouterr().err.count("warning") == 1
    lines = [json.loads(text) for text in run_dir.metrics_path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch, fake, capsys):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    with small_disk(tmp_path / "disk", "256k") as disk:
        run_dir = RunDir.prepare(disk / "run", "seed: 1\n", "f00d")
        ballast = fill(disk)
        with Tracker(run_dir, is_main=True, mode="offline") as tracker:
            tracker.log({"step": 1})
            ballast.unlink()
            tracker.log({"step": 2})
        assert [line["step"] for line in read_metrics(run_dir.metrics_path)] == [1, 2]
        # W&B's id could not be kept, so that its runs were closed and the next start begins one that knows all steps.
        assert all(run.exit_code == 1 for run in fake) and not (run_dir.wandb / "run_id").exists()
        assert all("\n" not in line and "warning" in line for line in capsys.readouterr().err.splitlines())
        with Tracker(run_dir, is_main=True, mode="offline", first_step=2) as tracker:
            tracker.log({"step": 3})
            tracker.cover(3)
        assert fake[-1].sent == [1, 2, 3]
