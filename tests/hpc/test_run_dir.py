import json
import math

import numpy as np
import pytest

from hpc.errors import UserError
from hpc.run_dir import (
    KILLED,
    MetricsWriter,
    RunDir,
    futile_starts,
    git_commit,
    metric_lines,
    package_versions,
    read_metrics,
)
from tests.hpc.small_disk import fill, small_disk

TOPOLOGY = {"rank": 0, "world_size": 2, "launcher": "torchrun"}


def steps(path):
    return [line["step"] for line in read_metrics(path)]


def test_a_new_run_directory_is_whole(tmp_path):
    run = RunDir.prepare(tmp_path / "runs" / "a", "seed: 1\n", "f00d", what={"seed": 1})
    assert run.recipe_path.read_text() == "seed: 1\n"
    assert run.record()["fingerprint"] == "f00d" and run.record()["starts"] == []
    folders = {path.name for path in run.path.iterdir()}
    assert folders == {"recipe.yaml", "run.json", "checkpoints", "wandb", "export", "report", "pictures"}


def test_resume_takes_the_machine_keys_of_the_new_recipe(tmp_path):
    RunDir.prepare(tmp_path / "a", "seed: 1\nworkers: 1\n", "f00d")
    run = RunDir.prepare(tmp_path / "a", "seed: 1\nworkers: 2\n", "f00d")
    assert "workers: 2" in run.recipe_path.read_text()


def test_a_directory_that_no_start_used_can_be_withdrawn_and_no_other(tmp_path):
    run = RunDir.prepare(tmp_path / "runs" / "a", "seed: 1\n", "f00d", what={"seed": 1})
    run.withdraw()
    assert not run.path.exists()
    run = RunDir.prepare(run.path, "seed: 2\n", "beef", what={"seed": 2})
    (run.path / "notes.txt").write_text("mine")
    run.withdraw()
    assert run.record()["fingerprint"] == "beef"  # and the same recipe may go on in it
    (run.path / "notes.txt").unlink()
    run.withdraw()
    run = RunDir.prepare(run.path, "seed: 3\n", "cafe", what={"seed": 3})
    run.begin_start(TOPOLOGY, first_step=1)
    run.withdraw()
    assert run.record()["fingerprint"] == "cafe" and run.recipe_path.exists()


@pytest.mark.parametrize("with_what", [True, False])
def test_another_fingerprint_is_refused_and_the_changed_keys_are_named(tmp_path, with_what):
    def prepare(lr, fingerprint):
        what = {"train": {"lr": lr}, "store": "abc"} if with_what else None
        return RunDir.prepare(tmp_path / "a", f"train: {{lr: {lr}}}\n", fingerprint, what=what)

    prepare(0.1, "f00d")
    before = (tmp_path / "a" / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"train\.lr: 0\.1 -> 0\.2") as caught:
        prepare(0.2, "beef")
    assert "f00d" in str(caught.value) and "store" not in str(caught.value)
    assert (tmp_path / "a" / "recipe.yaml").read_text() == before


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no run"):
        RunDir.prepare(tmp_path, "seed: 1\n", "f00d")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        RunDir.prepare(tmp_path / "file" / "run", "seed: 1\n", "f00d")


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}'])
def test_a_damaged_record_is_one_sentence(tmp_path, text):
    run = RunDir.prepare(tmp_path / "a", "seed: 1\n", "f00d")
    run.record_path.write_text(text)
    with pytest.raises(UserError, match=r"run\.json"):
        run.record()


def test_starts_say_where_they_ran_and_why_they_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = RunDir.prepare(tmp_path / "a", "seed: 1\n", "f00d")
    assert run.begin_start(TOPOLOGY, 1, hosts=["n2", "n1", "n1"], versions={"nanodist": "9.9"}) == 0
    run.end_start(10, "preempted")
    assert run.begin_start(TOPOLOGY, 11) == 1
    first, second = run.record()["starts"]
    assert first["hosts"] == ["n1", "n2"] and first["slurm_job_id"] == "77" and first["launcher"] == "torchrun"
    assert (first["first_step"], first["last_step"], first["reason"]) == (1, 10, "preempted")
    assert first["versions"]["nanodist"] == "9.9" and first["versions"]["torch"]
    assert first["began"].endswith("+00:00") and first["ended"] >= first["began"]
    assert second["reason"] is None and second["first_step"] == 11


@pytest.mark.parametrize(("logged", "last_step"), [([1, 2, 3], 3), ([], None)])
def test_a_start_without_an_end_was_killed(tmp_path, logged, last_step):
    run = RunDir.prepare(tmp_path / "a", "seed: 1\n", "f00d")
    run.begin_start(TOPOLOGY, 1)
    writer = MetricsWriter(run.metrics_path)
    for step in logged:
        writer.write({"step": step})
    run.begin_start(TOPOLOGY, 1)
    first = run.record()["starts"][0]
    assert first["reason"] == KILLED and first["last_step"] == last_step


def test_what_is_known_of_the_former_end_is_recorded_where_it_recorded_none(tmp_path):
    run = RunDir.prepare(tmp_path / "a", "seed: 1\n", "f00d")
    known = "killed for memory (Slurm: OUT_OF_MEMORY)"
    run.begin_start(TOPOLOGY, 1, former_end="of no start")
    run.begin_start(TOPOLOGY, 1, former_end=known)
    run.end_start(5, "preempted: SIGUSR2")
    run.begin_start(TOPOLOGY, 6, former_end=known)
    assert [start["reason"] for start in run.record()["starts"]] == [known, "preempted: SIGUSR2", None]


@pytest.mark.parametrize(
    ("restart", "known", "said"),
    [
        ("2", "killed for memory (n2)", "killed for memory (n2); rank 0 failed: closed by peer"),
        ("2", "a rank failed with exit code 1", "failed: closed by peer"),
        ("3", "killed for memory (n2)", "failed: closed by peer"),  # that was a start which recorded nothing
    ],
)
def test_what_killed_another_rank_comes_before_the_error_of_rank_0(tmp_path, monkeypatch, restart, known, said):
    run = RunDir.prepare(tmp_path / "a", "seed: 1\n", "f00d")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run.begin_start(TOPOLOGY, 1)
    run.end_start(5, "failed: closed by peer")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    run.begin_start(TOPOLOGY, 1, former_end=known)
    assert [start["reason"] for start in run.record()["starts"]] == [said, None]


def _record(*starts):
    return {"starts": [{"first_step": first, "reason": reason} for first, reason in starts]}


@pytest.mark.parametrize(
    ("starts", "count"),
    [
        ([], 0),
        ([(1, None)], 0),
        ([(1, "failed: a"), (1, None)], 1),
        ([(1, KILLED), (1, "failed: a"), (1, "killed for memory"), (1, None)], 3),
        ([(1, "failed: a"), (1, "failed: a"), (21, None)], 0),  # the second got to a checkpoint of step 20
        ([(1, "failed: a"), (21, "failed: a"), (21, None)], 1),
        ([(1, "failed: a"), (1, "preempted: SIGUSR2"), (1, "interrupted"), (1, KILLED), (1, None)], 2),
        ([(1, "failed: a"), (1, "preempted: SIGUSR2"), (9, KILLED), (9, None)], 1),
        ([(1, "failed: a"), (101, "completed"), (101, None)], 0),
    ],
)
def test_starts_without_progress_are_counted(starts, count):
    assert futile_starts(_record(*starts)) == count


@pytest.mark.parametrize(("first_step", "count"), [(1, 2), (21, 0), (None, 1)])
def test_a_start_to_come_tells_whether_the_last_one_progressed(first_step, count):
    assert futile_starts(_record((1, "failed: a"), (1, None)), first_step) == count


def test_a_crash_loop_is_counted_over_real_records(tmp_path):
    run = RunDir.prepare(tmp_path / "a", "seed: 1\n", "f00d")
    for first, count in [(1, 0), (1, 1), (1, 2), (11, 0), (11, 1)]:
        assert futile_starts(run.record(), first) == count
        run.begin_start(TOPOLOGY, first)


def test_a_full_disk_at_the_end_of_a_start_is_a_warning_and_at_its_begin_an_error(tmp_path, capsys):
    with small_disk(tmp_path / "disk", "128k") as disk:
        run = RunDir.prepare(disk / "a", "seed: 1\n", "f00d")
        run.begin_start(TOPOLOGY, 1)
        ballast = fill(disk)
        run.end_start(7, "completed")
        (warning,) = capsys.readouterr().err.splitlines()
        assert "run.json cannot be written (No space left on device)" in warning
        with pytest.raises(UserError, match=r"run\.json cannot be written: No space left"):
            run.begin_start(TOPOLOGY, 8)
        assert run.record()["starts"][0]["reason"] is None and len(run.record()["starts"]) == 1
        ballast.unlink()
        run.end_start(7, "completed")
        assert run.record()["starts"][0]["reason"] == "completed"


def test_a_full_disk_costs_no_line_and_warns_once(tmp_path, capsys):
    with small_disk(tmp_path / "disk", "128k") as disk:
        path = disk / "metrics.jsonl"
        writer = MetricsWriter(path)
        for step in range(1, 11):
            writer.write({"step": step, "text": "x" * 700})
        ballast = fill(disk)
        for step in range(11, 41):
            writer.write({"step": step, "text": "x" * 700})
        assert steps(path)[-1] < 40 and path.stat().st_size % 4096 == 0  # full to the last page, within a line
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and "metrics.jsonl cannot be written (No space left on device)" in warning
        ballast.unlink()
        writer.write({"step": 41})
        assert steps(path) == list(range(1, 42)) and len(metric_lines(path)) == len(path.read_text().splitlines()) == 41
        fill(disk)
        for step in range(42, 60):
            writer.write({"step": step, "text": "x" * 700})
        assert capsys.readouterr().err == ""
        writer.close()
        assert "lines for" in (warning := capsys.readouterr().err) and "are lost" in warning
        whole = steps(path)
        assert whole == list(range(1, whole[-1] + 1)) and whole[-1] < 59
        assert f"the last {59 - whole[-1]} lines" in warning
        writer.close()


def test_a_file_that_cannot_be_opened_yet_is_written_later(tmp_path, capsys):
    path = tmp_path / "later" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1})
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err
    path.parent.mkdir()
    writer.write({"step": 2})
    writer.close()
    assert steps(path) == [1, 2] and capsys.readouterr().err == ""


def test_metrics_are_there_before_close_and_are_never_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": np.float32(0.5)})
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
    writer.close()
    old = path.read_bytes()
    MetricsWriter(path).write({"step": 2, "loss": 0.25})
    assert path.read_bytes().startswith(old) and steps(path) == [1, 2]


def test_what_is_not_finite_is_null_and_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write({"step": 1, "loss": math.nan, "lr": math.inf, "epoch": 0})
    (line,) = (json.loads(text) for text in path.read_text().splitlines())
    assert line == {"step": 1, "loss": None, "lr": None, "epoch": 0, "nonfinite": ["loss", "lr"]}


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_torn_last_line_costs_only_itself(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": 0.5})
    writer.write({"step": 2, "loss": 0.25})
    writer.close()
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(path) == ([1, 2] if cut == 1 else [1])  # without its line break the last line is still whole
    MetricsWriter(path).write({"step": 3, "loss": 0.125})
    assert steps(path) == ([1, 2, 3] if cut == 1 else [1, 3])


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for start, step in [(0, 2), (0, 4), (0, 6), (0, 8), (1, 4), (1, 6), (2, 6)]:
        writer.write({"step": step, "start": start})
    history = [(line["step"], line["start"]) for line in read_metrics(path)]
    assert history == [(2, 0), (4, 1), (6, 2)]  # step 8 belongs to a start that is dead
    assert len(metric_lines(path)) == 7


def test_an_evaluation_of_the_same_step_joins_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    lines = [{"step": 2, "loss": math.nan, "lr": 0.1}, {"step": 2, "score": 0.7}, {"step": 4, "loss": 0.2}]
    for line in (*lines, {"step": 2, "loss": 0.5, "lr": 0.1}, {"step": 2, "score": 0.6}, {"step": 4, "loss": 0.1}):
        writer.write(line)
    assert read_metrics(path) == [{"step": 2, "loss": 0.5, "lr": 0.1, "score": 0.6}, {"step": 4, "loss": 0.1}]
    writer.write({"step": 4, "score": math.inf})
    assert read_metrics(path)[1] == {"step": 4, "loss": 0.1, "score": None, "nonfinite": ["score"]}
    writer.write({"step": 4, "score": 0.1})
    assert read_metrics(path)[1] == {"step": 4, "loss": 0.1, "score": 0.1}


def test_no_metrics_yet_is_an_empty_history(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_versions_and_commit_never_fail(monkeypatch):
    assert package_versions()["python"].startswith("3.")
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
