import json
import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from hpc.preflight import errors
from hpc.run_dir import MetricsWriter, RunDir
from hpc.topology import Topology
from nanodist.cli import main
from nanodist.pretrain import preflight as checks
from nanodist.pretrain.model import build_model
from nanodist.pretrain.preflight import code_hash, forecast, preflight
from nanodist.pretrain.preflight_needs import disk, memory, model_size
from nanodist.pretrain.recipe import load_recipe
from nanodist.shards import PackOptions, Store, pack

SMALL = ["encoder.trunk_options={channels: [8, 8, 16, 16]}", "views.size_px=32", "projector.widths=[16, 8]"]


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 255, (32, 32), np.uint8)).save(folder / "images" / f"{number}.png")
    return pack([folder / "images"], folder / "store", PackOptions(tile=None))


def recipe(*overrides):
    return load_recipe("demo", [*SMALL, "train.global_batch_size=8", "train.bn_group_size=8", *overrides])


def said(findings, level):
    return [finding.what for finding in findings if finding.level == level]


def test_a_recipe_that_fits_has_no_errors(store, tmp_path):
    seen = forecast(recipe("train.steps=10"), store, 2, tmp_path)
    assert said(seen.findings, "error") == said(seen.findings, "warning") == []
    assert seen.steps_left == 10 and seen.memory is not None
    assert any("24 samples" in what and "3.0 batches of 8" in what for what in said(seen.findings, "ok"))


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        (["train.global_batch_size=32", "train.bn_group_size=32"], 1, "24 samples"),
        ([], 3, "legal numbers of ranks: 1, 2, 4, 8"),
        (["train.micro_batch_size=1"], 2, "micro_batch_size 1"),
        (["data.positives=group"], 1, "one tile only"),
        (["encoder.trunk=resnet81"], 1, "resnet81"),
        (["encoder.trunk=vit_tiny_patch16_224", "encoder.trunk_options={}"], 1, "does not take views.size_px=32"),
    ],
)
def test_what_cannot_run_is_an_error(store, tmp_path, overrides, ranks, words):
    found = errors(forecast(recipe(*overrides), store, ranks, tmp_path).findings)
    assert len(found) == 1 and words in found[0]


def test_what_is_found_before_the_first_step_leaves_no_run_directory_behind(store, tmp_path, capsys):
    """Its advice changes what the directory is known by, so that the mended recipe would be another run's."""
    wrong = ["encoder.trunk=vit_tiny_patch16_224", "encoder.trunk_options={}", "train.steps=1"]
    wrong += ["train.global_batch_size=8", "train.bn_group_size=8", "engine.device=cpu"]
    assert main(["pretrain", "demo", *SMALL, *wrong, f"data.store={store.path}", f"run_dir={tmp_path / 'a'}"]) == 2
    assert "does not take views.size_px=32" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert main(["plan", "demo", *SMALL, *wrong, "--gpu-memory", "80"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "does not take views.size_px=32" in told


def test_surplus_ranks_that_may_idle_are_a_warning(store, tmp_path):
    seen = forecast(recipe("engine.surplus_ranks=idle"), store, 3, tmp_path)
    assert errors(seen.findings) == []
    assert any("2 train and 1 are idle" in what for what in said(seen.findings, "warning"))
    assert seen.memory == forecast(recipe(), store, 2, tmp_path).memory


def test_a_trunk_that_the_meta_device_cannot_run_is_no_error(store, tmp_path, monkeypatch):
    def fail(model, side):
        raise NotImplementedError("aten::odd on meta")

    monkeypatch.setattr("nanodist.pretrain.preflight_needs._kept_bytes", fail)
    seen = forecast(recipe(), store, 1, tmp_path)
    assert errors(seen.findings) == [] and "aten::odd" in said(seen.findings, "warning")[0]
    assert seen.memory is not None and seen.memory.states > 0


def test_tiles_of_several_sizes_are_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    for side in (32, 48):
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 255, (side, side), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{side}-{number}.png")
    mixed = pack([tmp_path / "images"], tmp_path / "store", PackOptions(tile=None))
    assert "2 sizes (32 x 32, 48 x 48)" in errors(forecast(recipe(), mixed, 1, tmp_path).findings)[0]


@pytest.mark.parametrize("fast", ["AMX", ""])
def test_bf16_without_instructions_is_a_warning_and_stays_bf16(monkeypatch, fast):
    monkeypatch.setattr(checks, "bf16_instructions", lambda: fast)
    for precision in ("bf16", "fp32"):
        recipe = load_recipe("simclr", [f"train.precision={precision}"])
        said = checks.slow_precision(recipe, torch.device("cpu"))
        assert [f.level for f in said] == (["warning"] if precision == "bf16" and not fast else [])


def test_the_time_limit_counts_what_is_done_and_what_was_logged(store, tmp_path):
    wanted = recipe("train.steps=100", "guard.margin_s=100", f"run_dir={tmp_path / 'run'}")
    run = RunDir.prepare(tmp_path / "run", "", "f")
    run.begin_start({"world_size": 2}, 1)
    writer = MetricsWriter(run.metrics_path)
    for step in range(1, 41):
        writer.write({"step": step, "images_per_s": 4.0})
    writer.close()
    (run.checkpoints / "step-00000040").mkdir()
    # 60 steps of 8 at 4 images/s are 120 s
    assert any("120 s" in what or "2 min" in what for what in said(_forecast(wanted, store, run, 1000.0), "ok"))
    assert any("about 2 starts" in what for what in said(_forecast(wanted, store, run, 200.0), "warning"))
    assert "would save and stop at once" in errors(_forecast(wanted, store, run, 99.0))[0]
    other_ranks = forecast(wanted, store, 1, run.path, 200.0).findings
    assert any("which is not known" in what for what in said(other_ranks, "ok"))


def _forecast(wanted, store, run, seconds):
    return forecast(wanted, store, 2, run.path, seconds).findings


def test_the_checkpoint_is_as_large_as_predicted(store, tmp_path):
    """Against files that a real save of the model and AdamW's state leaves."""
    from hpc.batch_norm import Layout
    from hpc.checkpoint.layout import write_tensors

    wanted = recipe("train.steps=10", "checkpoint.every_steps=2")
    model = build_model(wanted, wanted.encoder_spec(0.5, 0.2), Layout(8, 8))
    size = model_size(wanted)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    weights = dict(model.named_parameters())
    slots = {f"{slot}/{name}": p for slot in ("exp_avg", "exp_avg_sq") for name, p in weights.items()}
    files = [write_tensors(tmp_path / "a", model.state_dict()), write_tensors(tmp_path / "b", slots)]
    predicted = disk(wanted, size, 10)
    headers = 60_000
    assert abs(sum(facts.size for facts in files) - predicted.checkpoint) < headers
    # 5 are made; the last two stay, and the third is deleted once the newest is there
    assert predicted.most == 3 * predicted.checkpoint
    forever = disk(recipe("checkpoint.keep_every_steps=4", "checkpoint.every_steps=1"), size, 10)
    assert forever.most == 5 * forever.checkpoint
    assert disk(recipe(), size, 1).most == predicted.checkpoint


def test_the_predicted_activations_are_those_that_backward_keeps(store):
    """Counted on the real model, where BatchNorm is another one and views are two."""
    from hpc.batch_norm import Layout

    wanted = recipe("train.precision=fp32")
    model = build_model(wanted, wanted.encoder_spec(0.5, 0.2), Layout(8, 8))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}
    held = []

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.rand(2, 8, 1, 32, 32))
    predicted = memory(wanted, model_size(wanted), 1, 1)
    assert predicted.activations == pytest.approx(sum(kept.values()), rel=0.25)


def test_states_shrink_with_the_zero_stage_and_micro_batches_with_their_number(store):
    size = model_size(recipe())
    stages = [memory(recipe(f"engine.zero_stage={stage}"), size, 4, 1).states for stage in (0, 1, 2)]
    assert stages[0] > stages[1] > stages[2]
    whole, half = (memory(recipe(), size, 1, parts).activations for parts in (1, 2))
    assert 0.45 < half / whole < 0.75


def small(rank, world_size):
    return Topology(rank, world_size, rank, world_size, 0, 1, "here", "torchrun", "127.0.0.1", 12345)


def checked(rank, world_size, store_path, path, overrides):
    wanted = recipe(*overrides)
    code_hash.cache_clear()
    world = dist.group.WORLD
    began = time.monotonic()
    found = preflight(wanted, Store.open(store_path), small(rank, world_size), path, world, torch.device("cpu"))
    return found, time.monotonic() - began


def test_all_ranks_are_told_the_same(ranks, store, tmp_path):
    (tmp_path / "run").mkdir()
    results = ranks.run(2, checked, store.path, tmp_path / "run", ["train.steps=10"])
    findings = results[0][0]
    assert results[1][0] == findings and errors(findings) == []
    text = "\n".join(finding.what for finding in findings)
    for word in ("samples", "left in", "10 steps", "a rank", "agree on", "all-reduce", "gradients"):
        assert word in text
    assert list((tmp_path / "run").iterdir()) == []


def test_an_error_of_rank_0_reaches_all_ranks(ranks, store, tmp_path):
    results = ranks.run(3, checked, store.path, tmp_path, [])
    assert results[0][0] == results[1][0] == results[2][0]
    assert "legal numbers of ranks" in errors(results[2][0])[0]


def test_one_process_is_checked_in_less_than_a_second(store, tmp_path):
    wanted = recipe("train.steps=10")
    preflight(wanted, store, small(0, 1), tmp_path, None, torch.device("cpu"))
    began = time.process_time()
    found = preflight(wanted, store, small(0, 1), tmp_path, None, torch.device("cpu"))
    assert time.process_time() - began < 1.0
    assert errors(found) == []


def test_another_checkout_has_another_hash(tmp_path, monkeypatch):
    class Package:
        __path__ = (str(tmp_path),)

    monkeypatch.setattr(checks, "nanodist", Package)
    hashes = []
    for text in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "module.py").write_text(text)
        code_hash.cache_clear()
        hashes.append(code_hash())
    code_hash.cache_clear()
    assert hashes[0] == hashes[2] != hashes[1]


def doctor(capsys, *arguments):
    code = main(["doctor", *arguments])
    return code, capsys.readouterr().out


@pytest.fixture
def quick_machine(monkeypatch):
    """The machine's own findings are tested elsewhere."""
    monkeypatch.setattr("nanodist.cli.doctor.examine", lambda folder: [])
    monkeypatch.setattr("nanodist.cli.doctor.table", lambda findings: "")


def test_the_doctor_checks_a_recipe_in_front_of_the_queue(quick_machine, store, tmp_path, capsys):
    job = ["--recipe", "demo", *SMALL, f"data.store={store.path}", "train.global_batch_size=8", "train.bn_group_size=8"]
    good = [*job, "--dir", str(tmp_path), "--nodes", "2", "--gpus-per-node", "4", "--time-min", "60"]
    code, out = doctor(capsys, *good, "--memory-gb", "80")
    assert code == 0 and out.rstrip().endswith("The recipe can run.") and "8 ranks: 1 samples each" in out
    assert "of its GPU" in out
    code, out = doctor(capsys, *job, "--dir", str(tmp_path), "--nodes", "3")
    assert code == 1 and "The recipe cannot run: 3 ranks" in out
    code, out = doctor(capsys, *good, "--memory-gb", "0.0001", "--json")
    answer = json.loads(out)
    assert code == 1 and not answer["can_pretrain"]
    assert [f["level"] for f in answer["recipe"]].count("error") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_says_what_is_wrong_with_the_recipe_itself(quick_machine, tmp_path, capsys):
    assert main(["doctor", "--recipe", "demo", "train.stepz=3"]) == 2
    assert main(["doctor", "train.steps=3"]) == 2
    assert "--recipe names none" in capsys.readouterr().err
    code, out = doctor(capsys, "--recipe", "demo", f"data.store={tmp_path / 'nowhere'}", "--dir", str(tmp_path))
    assert code == 1 and "nowhere" in out
    code, out = doctor(capsys, "--recipe", "demo", "--dir", str(tmp_path))
    assert code == 0 and "data.store is not set" in out
