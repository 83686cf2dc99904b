import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.errors import UserError
from hpc.topology import EXPLICIT, MARK, RENDEZVOUS, detect
from launch import SlurmResources
from launch.__main__ import main
from launch.jobs import RecipeJob
from launch.submit import submit, wait

submitit = pytest.importorskip("submitit")
ROOT = Path(__file__).parents[2]
EXPORTED = (*EXPLICIT, *RENDEZVOUS, "LOCAL_WORLD_SIZE", MARK)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No launcher's variables, this checkout importable in jobs, and a folder of one's own."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "PMI")) or name in EXPORTED:
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake_slurm(monkeypatch, tmp_path):
    """A ``sbatch`` that keeps the script, and the other programs of Slurm as doing nothing."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in {
        "sbatch": f'cp "$1" {tmp_path}/script\necho Submitted batch job 42',
        "srun": "",
        "sacct": "",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "script"


def place():
    """Runs in the job."""
    topology = detect()
    return topology.rank, topology.world_size, topology.launcher, topology.master_port


def fail():
    """Runs in the job."""
    print("warning: low vacuum", file=sys.stderr)
    raise ValueError("the specimen drifted")


def test_processes_of_a_local_job_know_their_places(tmp_path, monkeypatch):
    # What a training in this very process leaves in the environment must not become the job's.
    exported: dict[str, str] = {}
    detect().export(exported)
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    job = submit(place, SlurmResources(tasks_per_node=2), "local", tmp_path / "logs")
    places = job.results()
    assert [found[:3] for found in places] == [(0, 2, "submitit"), (1, 2, "submitit")]
    assert places[0][3] == places[1][3]
    assert wait(job) is None
    assert (tmp_path / "logs").stat().st_mode & 0o077 == 0


def test_a_failed_local_job_says_why_in_few_words(tmp_path):
    reason = wait(submit(fail, SlurmResources(tasks_per_node=2), "local", tmp_path / "logs"))
    assert reason is not None
    assert reason.splitlines() == ["ValueError: the specimen drifted", "warning: low vacuum"]


def test_a_debug_job_runs_here(tmp_path):
    job = submit(place, SlurmResources(), "debug", tmp_path / "logs")
    assert wait(job) is None and job.result()[:3] == (0, 1, "none")
    assert "drifted" in str(wait(submit(fail, SlurmResources(), "debug", tmp_path / "logs")))


def test_a_batch_script_asks_for_what_the_site_says(fake_slurm, tmp_path):
    resources = SlurmResources(
        partition="gpu", nodes=2, gpus_per_node=4, cpus_per_task=6, time_min=30, modules=("a b; $(touch owned)",)
    )
    job = submit(RecipeJob("simclr"), resources, "slurm", tmp_path / "logs", name="n")
    assert job.job_id == "42"
    script = fake_slurm.read_text()
    wanted = ["partition=gpu", "nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "cpus-per-task=6", "time=30"]
    wanted += ["requeue", "signal=USR2@180", "open-mode=append"]
    for option in wanted:
        assert f"#SBATCH --{option}\n" in script
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert "--cpus-per-task=6" in srun
    assert "module load 'a b; $(touch owned)'" in script
    subprocess.run(["bash", "-n", str(fake_slurm)], check=True)
    assert not (tmp_path / "owned").exists()


def test_slurm_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cannot be submitted to slurm"):
        submit(place, SlurmResources(), "slurm", tmp_path / "logs")


@pytest.mark.parametrize(
    ("cluster", "resources", "message"),
    [
        ("moon", SlurmResources(), "cluster is 'moon'; allowed: slurm, local, debug"),
        ("local", SlurmResources(nodes=2), "nodes must be 1, not 2"),
        ("debug", SlurmResources(tasks_per_node=2), "use 'local' for several"),
    ],
)
def test_what_a_cluster_cannot_give_is_refused(tmp_path, cluster, resources, message):
    with pytest.raises(UserError, match=message):
        submit(place, resources, cluster, tmp_path / "logs")


def test_the_command_finds_a_misspelled_key_before_the_queue(fake_slurm, capsys):
    assert main(["submit", "pretrain", "simclr", "--cluster", "slurm", "train.stepz=3"]) == 2
    assert "train.stepz" in capsys.readouterr().err
    assert not fake_slurm.exists()


def test_the_command_submits_with_overrides_behind_options(fake_slurm, tmp_path, capsys):
    command = [
        "submit",
        "pretrain",
        "simclr",
        "--nodes",
        "2",
        "seed=3",
        "--folder",
        str(tmp_path / "logs"),
        "run_dir=a b",
    ]
    assert main(command) == 0
    assert "job 42" in capsys.readouterr().err and "#SBATCH --nodes=2\n" in fake_slurm.read_text()
    (pickled,) = (tmp_path / "logs").glob("42_submitted.pkl")
    assert submitit.core.utils.DelayedSubmission.load(pickled).function == RecipeJob(
        "simclr", ("seed=3", "run_dir=a b")
    )


def test_the_command_reports_a_job_that_failed(tmp_path, capsys):
    missing = f"data.store={tmp_path / 'nowhere'}"
    command = ["submit", "pretrain", "simclr", missing, "--cluster", "debug", "--folder", str(tmp_path / "logs")]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "nowhere" in err and "ended with exit code 2" in err


def test_a_wrong_site_file_is_the_users_mistake(tmp_path, capsys):
    (tmp_path / "site.yaml").write_text("queue: long\n")
    assert main(["submit", "pretrain", "simclr", "--site", "site.yaml"]) == 2
    assert "key 'queue' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(7, 0, True), (75, 3, True), (75, 20, False), (2, 0, False), (0, 0, False)]
)
def test_the_batch_script_passes_arguments_on_and_requeues(tmp_path, code, restarts, requeued):
    """The script of ``slurm/`` with programs of Slurm that write down what they were given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    bodies = {
        "srun": f'printf "%s\\n" "$@" "$SITE"; exit {code}',
        "scontrol": f'echo "$@" >> {tmp_path}/asked',
        "squeue": "",
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "env.sh").write_text('source "$SLURM_SUBMIT_DIR/slurm/env.sh"\nexport SITE=mine\n')
    environ = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "42",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_CPUS_PER_TASK": "5",
        "NANODIST_ENV": str(tmp_path / "env.sh"),
    }
    command = ["bash", str(ROOT / "slurm" / "pretrain.sbatch"), "simclr", "run_dir=a b", "seed=$(id)"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    given = done.stdout.splitlines()
    assert "--cpus-per-task=5" in given and given[-1] == "mine"
    assert given[-7:-1] == ["nanodist", "pretrain", "simclr", "engine.surplus_ranks=idle", "run_dir=a b", "seed=$(id)"]
    asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
    assert ("requeue 42" in asked) == requeued


def test_the_default_environment_file_works_without_a_user_or_tmpdir():
    command = ["bash", "-euc", 'source "$0"; echo "$TRITON_CACHE_DIR"', str(ROOT / "slurm" / "env.sh")]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("/tmp/") and str(os.getuid()) in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean():
    scripts = sorted(str(path) for path in (ROOT / "slurm").iterdir() if path.suffix in (".sbatch", ".sh"))
    subprocess.run(["shellcheck", "-x", *scripts], check=True, cwd=ROOT)
