import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpc.checkpoint import files
from hpc.errors import UserError
from hpc.loop import Keepers, NonFinite, Preempted, train
from hpc.optimizers import OptimizerConfig
from hpc.run_dir import RunDir
from hpc.saving import NotSaved, restore
from hpc.step import train_step
from hpc.task import Plan, SavingConfig, TrainState
from tests.hpc.plain import PlainEngine, Quadratic

SAVING = SavingConfig(every_steps=5, keep=2)
PLAN = Plan(10, 4, 4, OptimizerConfig(name="sgd", lr=0.01, warmup_steps=2), SAVING)


@pytest.fixture
def run(tmp_path):
    return RunDir.prepare(tmp_path / "run", "seed: 0\n", "f")


def _train(run, task, plan=PLAN, keepers=None, state=None, covered=None):
    lines, said = [], []
    engine = PlainEngine(task.module)
    state = state or TrainState()
    restore(task, engine, run, state, warn=said.append)
    tracker = SimpleNamespace(log=lines.append, cover=covered or (lambda step: None))
    train(task, engine, plan, run, tracker, state, None, keepers, said.append)
    return engine, lines, said


def _saved(run):
    return sorted(p.name for p in run.checkpoints.glob("step-*"))


def test_logs_saves_and_schedules(run):
    task = Quadratic()
    engine, lines, said = _train(run, task)
    assert [line["step"] for line in lines] == [1, 4, 8, 10] and task.moved == 10 and not said
    named = {
        "step",
        "epoch",
        "samples_seen",
        "loss",
        "lr",
        "images_per_s",
        "data_wait_share",
        "gradient_norm",
        "spread",
    }
    assert set(lines[0]) == named and lines[-1]["samples_seen"] == 40 and lines[-1]["epoch"] == 1.0
    assert engine.rates == [PLAN.learning_rate(step) for step in range(10)] and engine.rates[1] == 0.01
    assert _saved(run) == ["step-00000005", "step-00000010"]


def test_the_tracker_is_told_what_checkpoints_hold(run):
    covered = []
    _train(run, Quadratic(), covered=covered.append)
    assert covered[-1] == 10 and set(covered) <= {5, 10}  # of step 5 as soon as it is written


def test_resumes_from_the_newest_whole_checkpoint(run):
    _train(run, Quadratic())
    whole = (run.checkpoints / "step-00000010" / "model.safetensors").read_bytes()
    (run.checkpoints / "step-00000010" / "state.json").write_text("{")
    _, lines, said = _train(run, Quadratic())
    assert "state.json does not match its hash; continuing from step-00000005" in said[0]
    assert [line["step"] for line in lines] == [8, 10]
    assert (run.checkpoints / "step-00000010" / "model.safetensors").read_bytes() == whole


def test_a_complete_run_does_nothing(run):
    _train(run, Quadratic())
    engine, lines, _ = _train(run, Quadratic())
    assert engine.rates == [] and lines == []


def test_a_checkpoint_of_another_model_is_refused(run):
    _train(run, Quadratic())
    other = Quadratic()
    other.module = nn.Linear(4, 1)
    with pytest.raises(UserError, match=r"cannot resume .*'weight' has shape \(1, 3\), not \(1, 4\)"):
        _train(run, other)


@pytest.mark.parametrize("kind", ["bad_loss", "bad_gradient"])
def test_what_is_not_finite_changes_nothing_and_names_the_samples(run, kind):
    task = Quadratic(**{kind: (3,)})
    engine = PlainEngine(task.module)
    before = task.module.weight.detach().clone()
    batch = SimpleNamespace(step=3, keys=["a", "b"], wait_seconds=0.0)
    result = train_step(task, engine, batch, 0.1)
    assert not result.taken and torch.equal(task.module.weight, before) and (task.moved, task.skipped) == (0, 1)
    what = kind.removeprefix("bad_")
    with pytest.raises(NonFinite, match=rf"the {what} is not finite at step 4; .*s3-0, s3-1"):
        _train(run, Quadratic(**{kind: (3,)}))
    (line,) = (run.path / "nonfinite" / "rank-0.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 4 and record["samples"][:2] == ["s3-0", "s3-1"] and len(record["samples"]) == 20


def test_a_skipped_step_counts_and_leaves_the_optimizer_alone(run):
    skip = dataclasses.replace(PLAN, non_finite="skip")
    task = Quadratic(bad_gradient=(3,))
    engine, lines, said = _train(run, task, skip)
    assert task.moved == 9 and task.skipped == 1 and len(engine.rates) == 9
    assert any("step 4" in text and "skipped" in text for text in said)
    # Step 4 was logged, and has no figures of a gradient.
    assert lines[1]["step"] == 4 and "gradient_norm" not in lines[1] and lines[-1]["step"] == 10


def test_too_many_skipped_steps_in_a_row_end_the_run(run):
    plan = dataclasses.replace(PLAN, steps=30, non_finite="skip")
    with pytest.raises(NonFinite, match="10 steps in a row"):
        _train(run, Quadratic(bad_loss=range(2, 30)), plan)


class Asked:
    """Preemption that is asked for after some steps."""

    def __init__(self, after):
        self.left = after

    @property
    def reason(self):
        self.left -= 1
        return "SIGUSR2" if self.left < 0 else None


def test_preempted_at_any_step_and_continued_is_the_undisturbed_run(run, tmp_path):
    _, whole, _ = _train(run, Quadratic(), dataclasses.replace(PLAN, log_every_steps=1))
    other = RunDir.prepare(tmp_path / "other", "seed: 0\n", "f")
    lines, plan = [], dataclasses.replace(PLAN, log_every_steps=1)
    state = TrainState()
    for after in (2, 0, 3):
        task, engine, state = Quadratic(), None, TrainState()
        engine = PlainEngine(task.module)
        restore(task, engine, other, state, warn=lines.append)
        with pytest.raises(Preempted, match="SIGUSR2"):
            tracker = SimpleNamespace(log=lines.append, cover=lambda step: None)
            train(task, engine, plan, other, tracker, state, None, Keepers(Asked(after)))
        assert _saved(other)[-1] == f"step-{state.step:08d}"
    assert state.step == 8
    _, rest, _ = _train(other, Quadratic(), plan)
    figures = ("step", "loss", "lr", "gradient_norm")
    assert [[line[f] for f in figures] for line in lines + rest] == [[line[f] for f in figures] for line in whole]


def test_asked_at_the_last_step_the_run_is_complete(run):
    _train(run, Quadratic(), keepers=Keepers(Asked(9)))
    assert _saved(run)[-1] == "step-00000010"


def test_evaluations_are_logged_and_rank_the_checkpoints(run):
    saving = SavingConfig(every_steps=1, keep=1, keep_best=1)
    plan = dataclasses.replace(PLAN, saving=saving, evaluate_every_steps=4)
    task = Quadratic()
    _, lines, _ = _train(run, task, plan)
    evaluated = [(line["step"], line["eval_knn"]) for line in lines if "eval_knn" in line]
    assert evaluated == [(4, pytest.approx(0.1)), (8, pytest.approx(0.2)), (10, pytest.approx(0.3))]
    assert not any("score" in line for line in lines)
    assert _saved(run)[-1] == "step-00000010"


def test_each_evaluation_is_saved_where_the_best_stay_and_nothing_else_is_ranked(run):
    saving = SavingConfig(every_steps=3, keep=9, keep_best=1)
    _train(run, Quadratic(), dataclasses.replace(PLAN, saving=saving, evaluate_every_steps=4))
    scores = {name: files.read_state(run.checkpoints / name)["score"] for name in _saved(run)}
    ranked = {int(name[5:]): score for name, score in scores.items()}
    assert ranked == {3: None, 4: -0.1, 6: None, 8: -0.2, 9: None, 10: pytest.approx(-0.3)}


def test_a_task_that_is_finished_ends_the_run_and_stays_ended(run):
    plan = dataclasses.replace(PLAN, evaluate_every_steps=2)
    task = Quadratic(enough=2)
    _, lines, _ = _train(run, task, plan)
    assert lines[-1]["step"] == 4 and _saved(run)[-1] == "step-00000004"
    _, lines, _ = _train(run, task, plan)
    assert not lines


@pytest.mark.parametrize("background", [False, True])
def test_a_write_that_fails_is_said_and_the_next_is_tried(run, monkeypatch, background):
    real, calls = files.put, []

    def write(checkpoints, step, *rest):
        calls.append(step)
        if step == 4:
            raise OSError(28, "No space left on device")
        return real(checkpoints, step, *rest)

    monkeypatch.setattr(files, "put", write)
    saving = SavingConfig(every_steps=2, keep=9, background=background)
    _, _, said = _train(run, Quadratic(), dataclasses.replace(PLAN, saving=saving))
    assert calls == [2, 4, 6, 8, 10] and len(said) == 1
    assert "No space left on device" in said[0] and "training goes on" in said[0]
    assert _saved(run) == [f"step-{step:08d}" for step in (2, 6, 8, 10)]


def test_the_last_write_has_to_succeed(run, monkeypatch):
    real = files.put

    def write(checkpoints, step, *rest):
        if step == 10:
            raise OSError(28, "No space left on device")
        return real(checkpoints, step, *rest)

    monkeypatch.setattr(files, "put", write)
    with pytest.raises(NotSaved, match="No space left on device"):
        _train(run, Quadratic())
    assert _saved(run) == ["step-00000005"]
