"""Sweeps over real recipes: identities, what is missing, quoting, tables."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.errors import UserError
from launch import SlurmResources, Sweep, worker
from launch.__main__ import main
from launch.records import Record

pandas = pytest.importorskip("pandas")
pytest.importorskip("submitit")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "_EAGER", ())


def finetunes(store, **parts):
    shared = {"store": store, "encoder": "timm:resnet10t", "train.steps": 2}
    return Sweep("finetune", "general", overrides=shared, name="labels", **parts)


def test_a_job_has_the_fingerprint_of_its_run(store):
    from nanodist.downstream.finetune.data import Labels
    from nanodist.downstream.finetune.recipe import load_recipe
    from nanodist.downstream.finetune.run import identity

    (job,) = finetunes(store, grid={"labels_per_class": [2]}).jobs()
    assert job.arguments[:2] == ["finetune", "general"] and job.point == {"labels_per_class": 2}
    recipe = load_recipe(job.arguments[1], job.arguments[2:])
    assert (recipe.data.labels_per_class, recipe.train.steps) == (2, 2)
    assert job.fingerprint == identity(recipe, Labels(recipe.data))[0]
    assert recipe.run_dir.endswith(f"sweeps/labels/runs/{job.fingerprint}")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seed=3", "data.store=x", "train.steps=7"],
        ["views.preset=tem", "views.zooms=[1.0, 2.0]"],
        ["optimizer={lr: 1}"],
    ],
)
def test_recipes_that_are_read_fast_are_the_same(overrides):
    from nanodist.downstream.finetune.recipe import load_recipe

    sweep = Sweep("finetune", "virus-finetune")
    for _ in range(2):
        assert sweep._reader.read(overrides) == load_recipe("virus-finetune", overrides)
    for wrong in (["data.stor=x"], ["data=3"], ["sed=1"], ["train.steps=no"], ["seed.x=1"]):
        with pytest.raises(UserError) as fast:
            sweep._reader.read([*overrides, *wrong])
        with pytest.raises(UserError) as slow:
            load_recipe("virus-finetune", [*overrides, *wrong])
        assert str(fast.value) == str(slow.value)


def test_a_pretraining_has_the_fingerprint_of_its_run(store):
    from nanodist.pretrain.data import identity
    from nanodist.pretrain.recipe import load_recipe
    from nanodist.shards import Store

    (job,) = Sweep("pretrain", "simclr", grid={"seed": [3]}, overrides=[f"data.store={store}"]).jobs()
    assert job.fingerprint == identity(load_recipe("simclr", job.arguments[2:]), Store.open(store))[0]


def test_mixtures_and_random_weights_of_a_path_have_the_fingerprint_of_their_run(store, tmp_path):
    from nanodist.downstream.finetune.data import Labels
    from nanodist.downstream.finetune.recipe import load_recipe as load_finetune
    from nanodist.downstream.finetune.run import identity as identity_of_finetune
    from nanodist.encoders import EncoderSpec, random_encoder
    from nanodist.export.weights import export_timm
    from nanodist.pretrain.data import identity, tiles_of
    from nanodist.pretrain.recipe import load_recipe

    mixed = [f"data.mix=[[{store}, 1], [{store}, 2]]"]
    (job,) = Sweep("pretrain", "simclr", overrides=mixed).jobs()
    recipe = load_recipe("simclr", job.arguments[2:])
    assert job.fingerprint == identity(recipe, tiles_of(recipe))[0]
    export_timm(random_encoder(EncoderSpec("test_resnet", 32, 0.5, 0.2), 3), tmp_path / "export", {})
    shared = {"store": store, "encoder": tmp_path / "export", "weights": "random", "batch_norm": "batch"}
    jobs = Sweep("finetune", "general", overrides=shared, grid={"seed": [0, 1]}).jobs()
    for job in jobs:
        recipe = load_finetune("general", job.arguments[2:])
        assert job.fingerprint == identity_of_finetune(recipe, Labels(recipe.data))[0]
    assert len({job.fingerprint for job in jobs}) == 2


def test_a_larger_grid_adds_only_what_is_new(store):
    first = finetunes(store, grid={"labels_per_class": [1, 2]})
    for job in first.jobs():
        first.folder.make()
        first.folder.write(job.fingerprint, Record(state="done"))
    grown = finetunes(store, grid={"labels_per_class": [1, 2, 4], "engine.threads": [1]})
    assert [job.point["labels_per_class"] for job in grown.missing()] == [4]
    # A key that decides only how it runs is no other job.
    assert len(finetunes(store, grid={"engine.threads": [1, 2]}).jobs()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"labels_per_clas": [1]}}, r"at labels_per_clas=1: .*'labels_per_clas' does not exist"),
        ({"grid": {"labels_per_class": [1, "many"]}}, "at labels_per_class=many: .*must be a whole number"),
        ({"grid": {"precision": ["fp64"], "normalise": ["all"]}}, "normalise"),
        ({"grid": {"store": ["nowhere"]}}, "at store=nowhere: .*nowhere"),
    ],
)
def test_what_cannot_run_is_told_before_the_queue(store, change, message):
    with pytest.raises(UserError, match=message):
        finetunes(store, **change).jobs()


def test_values_keep_their_type_and_cannot_run_a_command(store, tmp_path):
    odd = ["a b", "it's", '"x"', "$(touch owned)", "`touch owned`; #", "null", "1", "[1, 2]", "a=b", "x: y"]
    sweep = Sweep("pretrain", "simclr", grid={"tracking.name": odd, "seed": [1]}, overrides={"store": store})
    from nanodist.pretrain.recipe import load_recipe

    recipes = [load_recipe("simclr", sweep._job(point, sweep._known()).arguments[2:]) for point in sweep.points]
    assert [recipe.tracking.name for recipe in recipes] == odd
    assert not (tmp_path / "owned").exists()


FILE = """
job: finetune
recipe: mine.yaml
overrides: {{store: {store}, encoder: "timm:resnet10t", train.steps: 2}}
grid: {{labels_per_class: [1, 2, 3], split_seed: [0, 1]}}
where: ["not (labels_per_class == 3 and split_seed == 1)"]
"""


def stand_in(arguments):
    """Runs in place of nanodist: scores for each, but for three labels a class."""
    values = dict(text.split("=", 1) for text in arguments[2:])
    labels = int(values["data.labels_per_class"])
    if labels == 3:
        raise ValueError("the specimen drifted")
    folder = json.loads(values["run_dir"]) if values["run_dir"].startswith('"') else values["run_dir"]
    os.makedirs(folder, exist_ok=True)
    rows = [{"balanced_accuracy": 0.1 * labels, "labels_per_class": labels}]
    with open(f"{folder}/scores.json", "w") as file:
        json.dump({"rows": rows}, file)
    return 0


def test_a_sweep_from_a_file_ends_in_a_table_that_hides_no_failure(store, tmp_path, monkeypatch, capsys):
    from nanodist import cli

    (tmp_path / "labels.yaml").write_text(FILE.format(store=store))
    (tmp_path / "mine.yaml").write_text("symmetries: 4\n")
    assert main(["sweep", "labels.yaml", "--dry-run", "--pack", "2", "--gpus-per-node", "2", "--time-min", "30"]) == 0
    said = capsys.readouterr().out
    assert "5 jobs, of which 5 would run, in 3 allocations" in said and "at most 3.0 by the time limit" in said
    assert said.count("--- example") == 3 and "labels_per_class: 1" in said and not (tmp_path / "sweeps").exists()

    monkeypatch.setattr(cli, "main", stand_in)
    assert main(["sweep", "labels.yaml", "--cluster", "debug"]) == 0
    assert (tmp_path / "sweeps/labels/submitit").stat().st_mode & 0o077 == 0
    capsys.readouterr()
    assert main(["collect", "labels.yaml"]) == 0
    # Jobs in the queue do not follow an edit of the recipe.
    assert {path.read_text() for path in (tmp_path / "sweeps" / "labels").glob("recipe-*.yaml")} == {"symmetries: 4\n"}
    table = pandas.read_parquet("sweeps/labels/sweep.parquet")
    assert len(table) == 5 and sorted(table["state"]) == ["done"] * 4 + ["failed"]
    assert table[table.labels_per_class == 2]["balanced_accuracy"].tolist() == [0.2, 0.2]
    (failed,) = table[table.state == "failed"].to_dict("records")
    assert failed["reason"] == "ValueError: the specimen drifted" and failed["labels_per_class"] == 3
    document = json.loads((tmp_path / "sweeps/labels/sweep.json").read_text())
    assert document["states"] == {"done": 4, "failed": 1} and len(document["rows"]) == 5

    capsys.readouterr()
    assert main(["status", "labels.yaml"]) == 0
    assert "5 jobs, 4 done, 1 failed" in capsys.readouterr().out
    assert main(["sweep", "labels.yaml", "--cluster", "debug"]) == 0
    assert "1 of 5 jobs" in capsys.readouterr().out
    assert main(["retry", "labels.yaml", failed["fingerprint"], "--cluster", "debug"]) == 0
    assert f"1 jobs again: {failed['fingerprint']}" in capsys.readouterr().out
    assert main(["cancel", "abc"]) == 2 and main(["retry", "labels.yaml", "abc"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: finetune", "key 'job' is missing"),
        ("job: finetune\ngird: {}", "key 'gird' does not exist"),
        ("job: dance", "job 'dance' does not exist; allowed: pretrain, finetune, pairvae, probe"),
        ("job: finetune\nname: ../x", "name is '../x'"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, capsys, text, message):
    (tmp_path / "s.yaml").write_text(text)
    assert main(["sweep", "s.yaml", "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_local_allocation_says_why_its_jobs_failed(store):
    """submitit's local executor, for real: the jobs fail at once, since there is no such encoder."""
    shared = {"store": store, "encoder": "timm:no_such_model"}
    sweep = Sweep("finetune", "general", overrides=shared, grid={"split_seed": [0, 1, 2]}, name="local")
    (handle,) = sweep.submit("local", SlurmResources(time_min=5), max_parallel=1, pack=3)
    assert set(handle.result().values()) == {"failed"}
    table = sweep.collect()
    assert list(table["state"]) == ["failed"] * 3 and all("no_such_model" in reason for reason in table["reason"])


def test_a_machine_runs_a_bounded_number_of_allocations(store, monkeypatch):
    from launch import queue

    started = []

    class Handle:
        def __init__(self):
            self.job_id, self.looks = len(started), 0

        def done(self):
            """After it was looked at a few times."""
            self.looks += 1
            return self.looks > 3

    class Executor:
        def batch(self):
            return contextlib.nullcontext()

        def submit(self, allocation):
            assert sum(handle.looks <= 3 for handle in started) < 2
            started.append(Handle())
            return started[-1]

    monkeypatch.setattr(queue, "make_executor", lambda *arguments: Executor())
    finetunes(store, grid={"split_seed": range(5)}).submit("local", max_parallel=2)
    assert len(started) == 5


def test_features_of_an_encoder_are_computed_once_for_all_its_probes(store, tmp_path, monkeypatch):
    from nanodist.encoders import Encoder, EncoderSpec, random_encoder
    from nanodist.export.weights import export_timm

    for seed in (0, 1):
        encoder = random_encoder(EncoderSpec("test_resnet", 32, 0.5, 0.2), seed)
        encoder.name = f"export-{seed}"
        export_timm(encoder, tmp_path / encoder.name, {})
    embedded = []
    embed = Encoder.embed
    monkeypatch.setattr(
        Encoder, "embed", lambda self, *rest: embedded.append(self.weights_hash()) or embed(self, *rest)
    )
    shared = {"store": store, "labels_per_class": "1", "splits": 1, "seeds": 1}
    encoders = [tmp_path / "export-0", tmp_path / "export-1"]
    sweep = Sweep("probe", overrides=shared, grid={"encoder": encoders, "seed": [0, 1]}, name="probes")
    sweep.submit("debug")
    assert len(embedded) == len(set(embedded)) == 2
    assert list(sweep.collect()["state"].unique()) == ["done"] and len(sweep.helpers()) == 2
    # A helper that came to nothing is the reason of those that needed it.
    helper = sweep.jobs()[0].needs[0]
    sweep.folder.write(helper, Record(state="failed", failures=["exit code 1: no room"]))
    for job in sweep.jobs():
        sweep.folder.write(job.fingerprint, Record())
    reasons = [(row["state"], row["reason"]) for row in sweep.collect().to_dict("records")]
    assert reasons == [("missing", f"needs {helper}: exit code 1: no room")] * 2 + [("missing", "")] * 2


def test_a_sweep_probes_by_the_published_protocol_and_its_flaws(store, tmp_path, capsys):
    from nanodist.encoders import EncoderSpec, random_encoder
    from nanodist.export.weights import export_timm

    export_timm(random_encoder(EncoderSpec("test_resnet", 32, 0.5, 0.2), 0), tmp_path / "e", {})
    shared = f"overrides: {{encoder: {tmp_path / 'e'}, store: {store}, labels_per_class: '1,80', short_classes: cap}}"
    (tmp_path / "flaws.yaml").write_text(
        f"job: probe\n{shared}\ngrid: {{protocol: [sound, lu2022], flaws: [none, split-by-image]}}\n"
    )
    assert main(["sweep", str(tmp_path / "flaws.yaml"), "--dry-run", "--cluster", "local"]) == 0
    assert "4 jobs, of which 4 would run" in capsys.readouterr().out
    base = {"encoder": tmp_path / "e", "store": store, "labels_per_class": "1,80"}
    points = [{"protocol": "lu2022"}, {"protocol": "lu2022", "flaws": "none"}, {}]
    published, honest, sound = (Sweep("probe", overrides=base | point, name="f").jobs()[0] for point in points)
    assert "--protocol=lu2022" in published.arguments and "--flaws=none" in honest.arguments
    # What the protocol says by itself is left to it, and is the same job where it is written out.
    assert not any(text.startswith(("--splits", "--seeds", "--test-share", "--flaws")) for text in published.arguments)
    for job, point in (
        (published, {"protocol": "lu2022", "splits": 20, "test_share": 0.2, "seeds": 1}),
        (sound, {"protocol": "sound", "splits": 3, "seeds": 5, "rounds": 3}),
    ):
        assert Sweep("probe", overrides=base | point, name="f").jobs()[0].fingerprint == job.fingerprint
    surer = Sweep("probe", overrides=base | {"rounds": 12}, name="f").jobs()[0]
    assert "--rounds=12" in surer.arguments
    assert len({job.fingerprint for job in (published, honest, sound, surer)}) == 4
    with pytest.raises(UserError, match="'copies' does not exist; allowed: choice-on-test, split-by-image or none"):
        Sweep("probe", overrides=base | {"flaws": "copies"}, name="f").jobs()


def test_a_dry_run_does_without_torch(store, tmp_path):
    (tmp_path / "large.yaml").write_text(
        f"{{job: finetune, recipe: general, overrides: {{store: {store}, encoder: 'timm:x'}}}}"
    )
    lines = (
        "import sys; from launch.__main__ import main; main(['sweep', 'large.yaml', '--dry-run', '--cluster', 'local'])"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", f"{lines}; assert 'torch' not in sys.modules"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "1 jobs, of which 1 would run" in done.stdout, done.stderr


def test_an_export_is_known_by_its_files_as_by_its_encoder(tmp_path):
    from nanodist.encoders import EncoderSpec, load_encoder, random_encoder
    from nanodist.export.weights import export_timm
    from nanodist.weights import hash_of_export

    spec = EncoderSpec("test_resnet", 32, 1, 0.2, looks=[(0.5, 16, 2), (1, 0, 1)])
    export_timm(random_encoder(spec, 3), tmp_path / "e", {})
    assert hash_of_export(tmp_path / "e") == load_encoder(tmp_path / "e").weights_hash()
    assert hash_of_export(tmp_path) is None
    (tmp_path / "e" / "model.safetensors").write_bytes(b"cut short")
    assert hash_of_export(tmp_path / "e") is None


def test_a_sweep_is_one_group_in_wandb_and_names_its_pretraining(store, tmp_path):
    from hpc.tracking import parent_run
    from nanodist.downstream.finetune.recipe import load_recipe

    sweep = finetunes(store, grid={"labels_per_class": [1]})
    sweep.parent = str(tmp_path / "a 'run'")
    (tmp_path / "a 'run'" / "wandb").mkdir(parents=True)
    (tmp_path / "a 'run'" / "wandb" / "run_id").write_text("4f\n")
    tracking = load_recipe("general", sweep.jobs()[0].arguments[2:]).tracking
    assert tracking.group == "labels"
    assert parent_run(tracking) == {"parent.run_dir": sweep.parent, "parent.run_id": "4f"}
    sweep = finetunes(store, list=[{"tracking.group": "mine"}])
    assert load_recipe("general", sweep.jobs()[0].arguments[2:]).tracking.group == "mine"
