"""PairVAE from a recipe to what it generates: both stages, a stop in between, evaluation, and bad input."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import tifffile
from safetensors.numpy import load_file, save

from hpc.checkpoint.files import latest_checkpoint, read_tensors
from hpc.errors import UserError
from hpc.loop import Preempted
from hpc.run_dir import read_metrics
from nanodist.cli import main
from nanodist.pairvae.data import PairData
from nanodist.pairvae.describe import apart, describe_pattern, image_spectrum
from nanodist.pairvae.evaluate import evaluate_pairs, summary, unseen
from nanodist.pairvae.fields import first_images
from nanodist.pairvae.generate import Wanted, generate
from nanodist.pairvae.load import load
from nanodist.pairvae.physics import CropScattering
from nanodist.pairvae.reference import Known, Look, distances, limits_of, read_reference
from nanodist.pairvae.report import Row
from nanodist.pairvae.run import train
from nanodist.pairvae.signature import pattern_signature
from nanodist.scattering.pattern import Pattern, QGrid
from nanodist.scattering.read import read_frame
from nanodist.scattering.write import write_pattern
from tests.nanodist.pairs_in_memory import PairsInMemory, ring
from tests.nanodist.test_pairvae import tiny

SHORT = [
    "solo.epochs=2",
    "pair.epochs=2",
    "solo.global_batch_size=4",
    "pair.global_batch_size=4",
    "draws=2",
    "data.test_share=0.2",
]


@pytest.fixture(scope="module")
def store():
    return PairsInMemory(12, grid_px=32, size_px=96)


class StopsAfter:
    """Asks a run to stop once it was asked often enough."""

    deadline, margin_s = None, 0.0

    def __init__(self, questions):
        self.left = questions

    @property
    def reason(self):
        self.left -= 1
        return "SIGTERM" if self.left < 0 else None


def _weights(run):
    return read_tensors(latest_checkpoint(run / "pair" / "checkpoints") / "model.safetensors")


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairvae") / "run"
    return train(tiny("modern", *SHORT, f"run_dir={folder}", "pair.picture_every_epochs=1"), None, store)


def test_a_run_that_was_stopped_in_either_stage_ends_as_an_undisturbed_one(run, store, tmp_path):
    recipe = tiny("modern", *SHORT, f"run_dir={tmp_path / 'again'}", "pair.picture_every_epochs=1")
    for questions in (1, 2):
        with pytest.raises(Preempted):
            train(recipe, StopsAfter(questions), store)
    train(recipe, None, store)
    want, got = _weights(run), _weights(tmp_path / "again")
    assert want.keys() == got.keys() and all((want[name] == got[name]).all() for name in want)
    lines = [read_metrics(path / "pair" / "metrics.jsonl") for path in (run, tmp_path / "again")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert {"term_physics", "term_sem_saxs", "term_kl_sem"} <= lines[0][0].keys()
    assert list((run / "pair" / "pictures").glob("reconstructions-*.png"))
    before = (run / "pair" / "metrics.jsonl").read_bytes()
    train(tiny("modern", *SHORT, f"run_dir={run}", "pair.picture_every_epochs=1"), None, store)
    assert (run / "pair" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"another run|differ"):
        train(tiny("modern", *SHORT, f"run_dir={run}", "solo.epochs=3"), None, store)


def test_evaluation_is_on_unseen_specimens_alone(run, store, tmp_path):
    text = evaluate_pairs(load(run), load(run, "solo"), store, tmp_path / "out", 2, 0)
    rows = list(csv.DictReader((tmp_path / "out" / "items.csv").open()))
    trained = {store.samples[store.keys.index(key)] for key in load(run).train}
    assert {row["sample"] for row in rows}.isdisjoint(trained)
    methods = {row["method"] for row in rows if row["direction"] == "SAXS to SEM"}
    assert {"PairVAE", "nearest neighbour", "training mean", "random field", "solo VAE (SEM to SEM)"} <= methods
    names = {"saxs-to-sem.png", "sem-to-saxs.png", "iq.png", "latent.png", "scores.json", "scores.csv", "items.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    table = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"]
    assert all(entry["low"] <= entry["median"] <= entry["high"] for entry in table)
    assert "| nearest neighbour |" in text
    with pytest.raises(UserError, match="exists already"):
        evaluate_pairs(load(run), load(run, "solo"), store, tmp_path / "out", 2, 0)
    everything = load(run).__class__(load(run).recipe, load(run).model, store.keys, store.manifest_hash, run)
    with pytest.raises(UserError, match="every pair of the store was trained on"):
        evaluate_pairs(everything, load(run, "solo"), store, tmp_path / "none", 2, 0)


def test_a_test_store_is_the_whole_test(run, store):
    trained = load(run)
    data = PairData(store, trained.recipe.data)
    own, other = unseen(trained, data), unseen(trained, data, PairData(store, trained.recipe.data))
    assert [len(items.known) for items in (own, other)] == [len(trained.train)] * 2
    assert len(own.truths) < len(other.truths) == len(store.keys)


def test_medians_are_of_items_and_intervals_of_specimens():
    rows = [Row("d", "m", f"k{i}", f"s{i // 2}", {"e": float(i)}) for i in range(10)]
    (entry,) = summary(rows)
    assert entry["median"] == 4.5 and entry["low"] < 4.5 < entry["high"] and entry["items"] == 10


def test_generating_writes_pictures_with_units_and_a_table(run, store, tmp_path):
    for i in range(2):
        write_pattern(tmp_path / f"p{i}.tif", store.pattern(i))
        tifffile.imwrite(tmp_path / f"s{i}.tif", store.micrograph(i)[0])
    (tmp_path / "broken.tif").write_bytes(b"II*\0nothing")
    files = [tmp_path / "p0.tif", tmp_path / "p1.tif", tmp_path / "broken.tif"]
    said = generate(run, files, tmp_path / "sem", Wanted("saxs", 3))
    assert said.startswith("2 of 3 files") and "1 could not be read" in said
    rows = list(csv.DictReader((tmp_path / "sem" / "descriptors.csv").open()))
    assert (
        rows[2]["problem"]
        and float(rows[0]["given_period_nm"]) > 0
        and rows[0]["out_of_distribution"] in ("True", "False")
    )
    with tifffile.TiffFile(tmp_path / "sem" / "1-p0-draw-02.tif") as file:
        assert file.pages[0].dtype == np.float32 and file.pages[0].shape == (32, 32)
        numerator, denominator = file.pages[0].tags["XResolution"].value
        assert denominator / numerator * 1e7 == pytest.approx(6.0, rel=1e-4)
    draws = [tifffile.imread(tmp_path / "sem" / f"1-p0-draw-{n:02d}.tif") for n in (1, 2, 3)]
    assert not np.array_equal(draws[0], draws[1])
    assert np.allclose(tifffile.imread(tmp_path / "sem" / "1-p0-spread.tif"), np.std(draws, 0), atol=1e-6)
    generate(run, files[:1], tmp_path / "same", Wanted("saxs", 3))
    assert np.array_equal(tifffile.imread(tmp_path / "same" / "1-p0-draw-01.tif"), draws[0])
    generate(run, [tmp_path / "s0.tif"], tmp_path / "saxs", Wanted("sem", pixel_size_nm=3.0))
    frame = read_frame(tmp_path / "saxs" / "1-s0-saxs.tif")
    assert np.allclose(frame.q()[1], store.grid.q()[1], atol=1e-6) and (frame.intensity > 0).all()
    assert (tmp_path / "saxs" / "1-s0-iq.png").is_file() and (tmp_path / "saxs" / "1-s0-iq.csv").is_file()
    with pytest.raises(UserError, match="states no pixel size"):
        generate(run, [tmp_path / "s0.tif"], tmp_path / "unknown", Wanted("sem"))
    assert not (tmp_path / "unknown").exists()


def test_draws_begin_with_fields_that_scatter_as_the_pattern_does(run, store):
    trained, pattern = load(run), store.pattern(3)
    crops = CropScattering(96, 3.0)
    images = first_images(pattern, crops, trained.levels, [np.random.default_rng(i) for i in range(16)])
    found, truth = describe_pattern(image_spectrum(list(images), 3.0)), store.truth(3)
    assert found.period_nm == pytest.approx(truth["period_nm"], rel=0.05)
    assert apart(found.orientation_deg, truth["orientation_deg"], 180) < 5
    assert np.allclose(np.quantile(images[0], np.linspace(0, 1, len(trained.levels))), trained.levels, atol=0.02)
    assert trained.from_fields and not load(run, "solo").from_fields
    own, prior = trained.sem_of(pattern, 3, 0, "x"), trained.drawing("prior").sem_of(pattern, 3, 0, "x")
    assert np.array_equal(own, trained.sem_of(pattern, 3, 0, "x")) and not np.allclose(own, prior, atol=1e-3)
    assert np.allclose(own[:2], trained.sem_of(pattern, 2, 0, "x"), atol=1e-5)  # a draw knows no other
    # A pattern of nothing but background scatters nowhere: its draws are those of the prior.
    even = dataclasses.replace(pattern, intensity=np.where(pattern.mask, 7, 0).astype(np.float32))
    same = [one.sem_of(even, 2, 0, "x") for one in (trained, trained.drawing("prior"))]
    assert np.array_equal(*same)


def test_what_is_unlike_the_training_part_is_flagged(run, store, tmp_path):
    known, trained = read_reference(run)["saxs"], load(run)
    number = store.keys.index(trained.train[0])
    pattern = store.pattern(number)
    own = known.strangeness(known.look(trained, pattern))
    assert own.keys() == {"peak", "profile", "angular", "latent", "reconstruction"}
    assert max(own[name] for name in own if name != "reconstruction") < 1e-3 and own["reconstruction"] <= 1 / 1.25
    # Two spots more, off the ring: 0.3 % of the pixels, which no mean over all of them sees.
    q_y, q_x = store.grid.q()
    q_star, turn = 2 * np.pi / store.truth(number)["period_nm"], np.deg2rad(store.truth(number)["orientation_deg"] + 90)
    x, y = 1.4 * q_star * np.cos(turn), 1.4 * q_star * np.sin(turn)
    spots = sum(np.hypot(q_x - sign * x, q_y - sign * y) < 1.2 * store.grid.q_step_inv_nm for sign in (1, -1)) > 0
    spotted = np.where(spots & pattern.mask, pattern.intensity.max(), pattern.intensity)
    found = known.strangeness(known.look(trained, dataclasses.replace(pattern, intensity=spotted)))
    assert found["angular"] > 1
    # A reference of before has latents and errors alone, and still says what it knows.
    tensors = {f"{name}.latents": k.rows["latent"] for name, k in read_reference(run).items()}
    tensors |= {f"{name}.errors": np.array([0.5, 1.0]) for name in ("saxs", "sem")}
    (tmp_path / "reference.safetensors").write_bytes(save(tensors))
    before = read_reference(tmp_path)["saxs"]
    assert before.strangeness(before.look(trained, pattern)).keys() == {"latent", "reconstruction"}
    assert before.strangeness(Look({"latent": known.rows["latent"].mean(0) + 100}, 2.5))["latent"] > 1.5
    assert before.strangeness(Look({"latent": known.rows["latent"][0]}, 2.5)) == {"latent": 0, "reconstruction": 2.0}
    whole = load_file(run / "reference.safetensors")
    for damaged in ({"saxs.rows.peak": np.zeros((2, 3))}, {**whole, "sem.rows.grey": np.zeros((2, 5))}):
        (tmp_path / "reference.safetensors").write_bytes(save(damaged))
        with pytest.raises(UserError, match="is damaged; start the training again"):
            read_reference(tmp_path)


def test_limits_hold_for_95_of_100_and_specimens_do_not_know_themselves():
    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal((200, 4)) for name in ("peak", "grey")}
    # Each specimen twice: its other half would be a neighbour at no distance.
    twice = {name: np.repeat(values, 2, 0) for name, values in rows.items()}
    names = [f"film{i // 2}" for i in range(400)]
    limits = limits_of(twice, names)
    assert all(limits[name] == pytest.approx(limits_of(rows, names[::2])[name], rel=0.05) for name in rows)
    new = [{name: rng.standard_normal(4) for name in rows} for _ in range(400)]
    known = Known(rows, {**limits, "reconstruction": 1.0})
    flagged = np.mean([max(known.strangeness(Look(signature, 0.0)).values()) > 1 for signature in new])
    assert 0.02 < flagged < 0.09
    assert set(limits_of(rows, ["film"] * 200).values()) == {np.inf}


def test_a_signature_knows_no_exposure_and_no_direction():
    q_y, q_x = QGrid(96, 0.5).q()
    mask = np.hypot(q_y, q_x) > 0.03
    found = [
        pattern_signature(
            Pattern(
                (scale * ring(q_y, q_x, 33.0, angle, 25.0) + scale * 0.01) * mask, None, mask, QGrid(96, 0.5), "counts"
            )
        )
        for scale, angle in ((1000.0, 20.0), (7.0, 80.0))
    ]
    assert found[0]["peak"][0] == pytest.approx(np.log(2 * np.pi / 33.0), abs=0.02)
    assert np.allclose(found[0]["profile"], found[1]["profile"], atol=0.1, equal_nan=True)
    assert np.allclose(found[0]["angular"], found[1]["angular"], atol=0.25)
    # Two spots at 1.4 q*, of point symmetry: even harmonics of the third ring and its brightest pixels, no odd ones.
    x = 1.4 * 2 * np.pi / 33.0
    spots = sum(np.exp(-((q_x - sign * x) ** 2 + q_y**2) / (2 * 0.008**2)) for sign in (1, -1))
    plane = 1000 * (ring(q_y, q_x, 33.0, 90.0, 25.0) + 0.01 + 0.3 * spots) * mask
    even = 1000 * (ring(q_y, q_x, 33.0, 90.0, 25.0) + 0.01) * mask
    third = [
        pattern_signature(Pattern(p, None, mask, QGrid(96, 0.5), "counts"))["angular"][12:18] for p in (plane, even)
    ]
    more = third[0] - third[1]
    assert more[3] > 1 and more[5] > 0.5 and abs(more[4]) < 0.2
    half = mask & (q_x < 0.1)
    seen = pattern_signature(
        Pattern(1000 * (ring(q_y, q_x, 33.0, 20.0, 25.0) + 0.01) * half, None, half, QGrid(96, 0.5), "counts")
    )
    assert distances(seen["profile"][None], found[0]["profile"][None], 0.2)[0, 0] < 0.5
    assert distances(np.full((1, 24), np.nan), found[0]["profile"][None], 0.2)[0, 0] == np.inf


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "RUN", "x.tif", "--out", "OUT"], "needs --from saxs or --from sem"),
        (["generate", "RUN", "--from", "saxs"], "needs --out FOLDER"),
        (["evaluate", "NOWHERE", "--out", "OUT"], "is not the run directory of nanodist pairvae train"),
        (["train", "modern"], "data.store is not set"),
        (["train", "nothing"], "neither a file nor one of: lu2023, modern"),
    ],
)
def test_bad_commands_end_with_one_sentence(arguments, sentence, run, tmp_path, capsys):
    places = {"RUN": str(run), "OUT": str(tmp_path / "out"), "NOWHERE": str(tmp_path / "nowhere")}
    assert main(["pairvae", *(places.get(word, word) for word in arguments)]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_that_trains_evaluates_once(tmp_path, monkeypatch, capsys):
    asked = []

    def evaluate(run_dir, store, out):
        asked.append(out)
        if len(asked) > 1:
            raise UserError("every pair of the store was trained on")
        out.mkdir()
        return "a table"

    monkeypatch.setattr("nanodist.pairvae.run.train", lambda recipe, preemption: tmp_path)
    monkeypatch.setattr("nanodist.pairvae.evaluate.evaluate", evaluate)
    for changes in ((), (), ("evaluate=false",), ("data.test_share=0",)):
        assert main(["pairvae", "train", "modern", "data.store=S", *changes]) == 0
    assert asked == [tmp_path / "evaluation"] and capsys.readouterr().out.count("a table") == 1
    (tmp_path / "evaluation").rmdir()
    assert main(["pairvae", "train", "modern", "data.store=S"]) == 0
    assert "not evaluated: every pair" in capsys.readouterr().err
