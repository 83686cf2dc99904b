"""PairVAE from a recipe to what it generates: both stages, a stop in between, evaluation, and bad input."""

import csv
import json

import numpy as np
import pytest
import tifffile

from hpc.checkpoint.files import latest_checkpoint, read_tensors
from hpc.errors import UserError
from hpc.loop import Preempted
from hpc.run_dir import read_metrics
from nanodist.cli import main
from nanodist.pairvae.data import PairData
from nanodist.pairvae.evaluate import evaluate_pairs, summary, unseen
from nanodist.pairvae.generate import Wanted, generate
from nanodist.pairvae.load import load
from nanodist.pairvae.reference import read_reference
from nanodist.pairvae.report import Row
from nanodist.pairvae.run import train
from nanodist.scattering.read import read_frame
from nanodist.scattering.write import write_pattern
from tests.nanodist.pairs_in_memory import PairsInMemory
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


def test_what_is_unlike_the_training_part_is_flagged(run, store):
    known, trained = read_reference(run)("saxs"), load(run)
    number = store.keys.index(trained.train[0])
    own = known.strangeness(trained.latent_of(store.pattern(number), None), float(known.errors.max()))
    assert own[0] < 0.1 and own[1] == pytest.approx(1.0)
    far = known.strangeness(known.latents.mean(0) + 100 * known.latents.std(0), 0.0)
    assert far[0] > 1.5


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
