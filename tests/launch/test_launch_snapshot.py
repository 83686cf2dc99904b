"""The code of a queued job stays what it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import SlurmResources, snapshot
from launch.submit import submit

pytest.importorskip("submitit")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in a checkout of its own, which stands for ours."""
    source = tmp_path / "checkout" / "specimen" / "__init__.py"
    (source.parent / "__pycache__").mkdir(parents=True)
    (source.parent / "__pycache__" / "x.pyc").write_bytes(b"x")
    source.write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(source.parent.parent)
    monkeypatch.setattr(snapshot, "PACKAGES", ("specimen",))
    snapshot.sources.cache_clear()
    yield source
    snapshot.sources.cache_clear()


def test_an_edit_does_not_change_a_job_that_waits(package, tmp_path):
    code = snapshot.freeze(tmp_path / "a 'jobs' $(touch owned)")
    assert code == snapshot.freeze(tmp_path / "a 'jobs' $(touch owned)")
    package.write_text("VALUE = 2\n")
    assert snapshot.freeze(code.parent.parent) == code  # one process submits one code
    snapshot.sources.cache_clear()
    assert snapshot.freeze(code.parent.parent) != code
    # The job begins in the checkout that was edited, as jobs of Slurm do.
    script = "\n".join([*snapshot.shell_lines(code), f"{sys.executable} -c 'import specimen; print(specimen.VALUE)'"])
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = [sys.executable, "-c", "import specimen; print(specimen.VALUE)"]
    ways = ((["bash", "-uc", script], clean), (python, {**clean, **snapshot.environment(code, clean)}))
    for line, environ in ways:
        done = subprocess.run(line, cwd=package.parent.parent, env=environ, capture_output=True, text=True, check=True)
        # Before Python 3.11 the working directory comes first; how it is kept out there is the next test.
        assert done.stdout.strip() == ("1" if sys.version_info >= (3, 11) else "2")
    assert not [*tmp_path.rglob("owned")] and not [*code.rglob("__pycache__")]


def test_python_of_a_job_does_not_look_into_its_working_directory_first(package, tmp_path, monkeypatch):
    """Where Python has no option for that, it is started another way."""
    code = snapshot.freeze(tmp_path / "jobs")
    package.write_text("VALUE = 2\n")
    (code / "say.py").write_text("import specimen, sys\nprint(specimen.VALUE, sys.argv[1:])\n")
    monkeypatch.setattr(sys, "version_info", (3, 10))
    line = f"{SlurmResources().python('slurm')} -u -m say 'a b'"
    environ = {**os.environ, "PYTHONPATH": str(code)}
    environ.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(line, shell=True, cwd=package.parent.parent, env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == "1 ['a b']", done.stderr


def test_a_job_says_what_changed_since_it_was_submitted(package, tmp_path):
    code = snapshot.freeze(tmp_path)
    record = json.loads((code / "environment.json").read_text())
    record["versions"] |= {"torch": "0.1", "never-installed": "1"}
    (code / "environment.json").write_text(json.dumps(record))
    other, packages = snapshot.changed({"NANODIST_CODE": str(code)})
    assert "not its snapshot" in other
    assert packages.startswith("2 packages changed") and "never-installed 1 -> none" in packages
    assert snapshot.changed({}) == []


def where():
    """Runs in the job."""
    import launch.snapshot

    return launch.snapshot.__file__, launch.snapshot.changed()


def test_a_local_job_runs_its_snapshot(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # where this function is
    place, changed = submit(where, SlurmResources(environment={"SPECIMEN": "a b"}), "local", tmp_path / "jobs").result()
    assert place.startswith(str(tmp_path / "jobs" / "code")) and changed == []
    assert "NANODIST_CODE" not in os.environ and "SPECIMEN" not in os.environ
