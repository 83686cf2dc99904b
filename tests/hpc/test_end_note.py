import pytest

from hpc.end_note import REQUEUED, VARIABLE, former_end

HEAD = "restarts=1\nexit={}\nended={}\nreason=None\n"
KILLED = (
    "slurmstepd: error: Step 7.0 exceeded memory limit (900 > 800), being killed\nsrun: error: n1: task 1: Killed\n"
)


@pytest.mark.parametrize(
    ("note", "said"),
    [
        (HEAD.format(137, "no") + KILLED, "killed for memory (slurmstepd: error: Step 7.0 exceeded memory limit"),
        (
            HEAD.format(137, "no") + "srun: error: n1: task 1: Killed\n",
            "a rank was killed by signal 9 (srun: error: n1",
        ),
        (  # srun ended the other rank itself, and gives the highest code
            HEAD.format(143, "no") + "srun: error: n1: task 0: Killed\nsrun: error: n2: task 1: Terminated\n",
            "a rank was killed by signal 9 (srun: error: n1",
        ),
        (  # the others were killed while they wrote their stacks
            HEAD.format(137, "no") + "srun: error: n1: task 0: Exited with exit code 70\n",
            "hung: ended by the watchdog, which wrote all stacks (srun: error: n1: task 0",
        ),
        (HEAD.format(1, "no"), "a rank failed with exit code 1"),
        (HEAD.format(143, "yes"), "ended from outside"),
        ("restarts=1\nexit=broken\nended=no\nreason=\n", "ended without a code"),
    ],
)
def test_a_note_says_how_the_former_start_ended(tmp_path, note, said):
    (tmp_path / "note").write_text(note)
    assert former_end({VARIABLE: str(tmp_path / "note"), "SLURM_RESTART_COUNT": "2"}).startswith(said)


@pytest.mark.parametrize("note", ["", "garbage\0\n" * 3, "restarts=many\nexit=1\n", HEAD.format(1, "no")])
def test_a_node_that_died_leaves_no_note_or_an_older_one(tmp_path, note):
    (tmp_path / "note").write_text(note)
    environ = {VARIABLE: str(tmp_path / "note"), "SLURM_RESTART_COUNT": "3"}
    assert former_end(environ) == REQUEUED
    assert former_end({**environ, VARIABLE: str(tmp_path / "none")}) == REQUEUED


def test_a_first_start_has_no_former_one(tmp_path):
    (tmp_path / "note").write_text(HEAD.format(1, "no"))
    assert former_end({VARIABLE: str(tmp_path / "note")}) is None and former_end({}) is None


def test_a_time_limit_is_told(tmp_path):
    (tmp_path / "note").write_text("restarts=0\nexit=143\nended=yes\nreason=TimeLimit\n")
    said = former_end({VARIABLE: str(tmp_path / "note"), "SLURM_RESTART_COUNT": "1"})
    assert said == "ended at the job's time limit"
