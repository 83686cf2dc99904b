import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc import environment
from hpc.environment import Finding
from hpc.topology import EXPLICIT, MARK, RENDEZVOUS
from nanodist.cli import doctor, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def plain_start(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "PMI", "OMPI")) or name in (*EXPLICIT, *RENDEZVOUS, "LOCAL_WORLD_SIZE", MARK):
            monkeypatch.delenv(name)


@pytest.fixture
def no_imports(monkeypatch):
    """Leave the imports of DeepSpeed and MPI out; a test of its own makes them."""
    monkeypatch.setattr(environment, "deepspeed_probe", lambda: None)
    monkeypatch.setattr(environment, "mpi_probe", lambda: None)


def test_the_table_says_what_is_there_and_the_exit_code_agrees(no_imports, tmp_path, capsys):
    code = main(["doctor", "--dir", str(tmp_path)])
    out = capsys.readouterr().out
    for name in ("python", "torch", "gpu", "cpu", "deepspeed", "compiler", "mpi", "slurm", "wandb", "disk", "onnx"):
        assert any(line.split()[1:2] == [name] for line in out.splitlines()), name
    assert out.strip().endswith("Pretraining can run here.") == (code == 0)


def test_json_holds_the_same_findings(no_imports, tmp_path, capsys):
    code = main(["doctor", "--json", "--dir", str(tmp_path)])
    answer = json.loads(capsys.readouterr().out)
    assert answer["can_pretrain"] == (code == 0)
    assert {"name", "status", "value", "hint", "required"} == set(answer["findings"][0])


@pytest.mark.parametrize("lacking", ["deepspeed", "kornia"])
def test_without_what_pretraining_needs_the_exit_code_is_one(no_imports, monkeypatch, tmp_path, capsys, lacking):
    version = environment.importlib.metadata.version

    def without(name):
        if name == lacking:
            raise environment.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(environment.importlib.metadata, "version", without)
    assert main(["doctor", "--dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "pip install 'nanodist[train]'" in out
    assert out.splitlines()[-1].startswith("Pretraining cannot run here:") and lacking in out.splitlines()[-1]


def test_a_broken_launcher_environment_is_said(no_imports, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor", "--dir", str(tmp_path)]) == 1
    assert "WORLD_SIZE" in capsys.readouterr().out


def test_only_rank_0_prints(no_imports, monkeypatch, tmp_path, capsys):
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    main(["doctor", "--dir", str(tmp_path)])
    assert capsys.readouterr().out == ""


def test_hints_stand_below_their_lines():
    lines = doctor.table(
        [Finding("a", "ok", "1"), Finding("bb", "missing", "no", "get it", required=True)]
    ).splitlines()
    assert lines == [
        "ok      a   1",
        "missing bb  no",
        "            get it",
        "",
        "Pretraining cannot run here: bb.",
    ]


def test_the_real_command_imports_deepspeed_elsewhere(tmp_path):
    code = "import sys; from nanodist.cli import main; main(['doctor', '--json']); sys.exit('deepspeed' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert {finding["name"] for finding in json.loads(done.stdout)["findings"]} >= {"deepspeed", "mpi"}
