import pickle
import sys

import pytest

from hpc.errors import UserError
from launch import SlurmResources
from launch.jobs import RecipeJob

SITE = """
partition: gpu
account: p_nano
gpus_per_node: 4
cpus_per_task: 12
mem_gb: 180
time_min: 90
modules: [cuda/12.8, "python/3.11; touch /tmp/owned"]
setup: ["source ~/venv/bin/activate"]
"""


@pytest.fixture
def site(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(SITE)
    return path


def test_a_site_file_is_read_and_the_command_line_wins(site):
    resources = SlurmResources.from_site(site, nodes=3, gpus_per_node=None)
    assert (resources.partition, resources.gpus_per_node, resources.nodes) == ("gpu", 4, 3)
    assert resources.tasks() == 4  # a task per GPU
    assert SlurmResources.from_site(site, tasks_per_node=2).tasks() == 2
    assert SlurmResources().tasks() == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "partitoin: gpu",
            r"site\.yaml: key 'partitoin' does not exist \(did you mean 'partition'\?\); allowed here: .*qos",
        ),
        ("nodes: many", "key 'nodes' must be a whole number"),
        ("nodes: 0", "key 'nodes' is 0; it must be at least 1"),
        ("modules: cuda", "key 'modules' must be a list"),
        ("- a", "must hold keys and values"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_site_file_is_one_sentence(site, line, message):
    site.write_text(line)
    with pytest.raises(UserError, match=message):
        SlurmResources.from_site(site)


def test_a_missing_site_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml cannot be read: No such file"):
        SlurmResources.from_site(tmp_path / "none.yaml")


def test_parameters_for_slurm_leave_out_what_is_not_set(site):
    parameters = SlurmResources.from_site(site).submitit_parameters()
    assert parameters["slurm_partition"] == "gpu" and parameters["mem_gb"] == 180
    assert parameters["tasks_per_node"] == parameters["gpus_per_node"] == 4
    assert "slurm_qos" not in parameters and "slurm_constraint" not in parameters
    assert "--cpus-per-task=12" in parameters["slurm_srun_args"]
    plain = SlurmResources().submitit_parameters()
    assert "gpus_per_node" not in plain and "mem_gb" not in plain


def test_a_module_name_cannot_run_a_command(site):
    lines = SlurmResources.from_site(site).shell_lines()
    assert lines == [
        "module load cuda/12.8",
        "module load 'python/3.11; touch /tmp/owned'",
        "source ~/venv/bin/activate",
    ]


def test_a_container_starts_python_on_the_cluster_and_nowhere_else():
    words = ("apptainer", "exec", "--nv", "my image.sif; rm x", "python3")
    resources = SlurmResources(container=words)
    assert resources.python("slurm") == "apptainer exec --nv 'my image.sif; rm x' python3"
    assert resources.python("local") == SlurmResources().python("local") and sys.executable in resources.python("local")


def test_a_pretrain_job_is_the_command_line_and_can_be_pickled():
    job = pickle.loads(pickle.dumps(RecipeJob("simclr", ("seed=1", "train.steps=2"))))
    assert job.arguments() == ["pretrain", "simclr", "seed=1", "train.steps=2"]


def test_a_preempted_job_is_queued_again_as_it_is():
    pytest.importorskip("submitit")
    job = RecipeJob("simclr", ("seed=1",))
    assert job.checkpoint().function is job
