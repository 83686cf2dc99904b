"""The kinds of jobs that a sweep is made of: what their recipe is, what identifies them, and what they leave behind."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from hpc import config
from hpc.config import option, parse_yaml
from hpc.errors import UserError
from launch.records import Job

Row = dict[str, Any]
FEATURES = "features"


class Inputs:
    """Stores, and hashes of stores and of encoders' weights, each taken once."""

    def __init__(self) -> None:
        self._data: dict[str, Any] = {}
        self._beginnings: dict[tuple[Any, ...], str] = {}

    def data(self, recipe: Any) -> Any:
        """The store or mixture of a pretraining.

        Raises:
            UserError: there is none.
        """
        from nanodist.pretrain.data import tiles_of

        key = json.dumps([config.to_dict(recipe.data), recipe.run_dir], sort_keys=True)
        if key not in self._data:
            self._data[key] = tiles_of(recipe)
        return self._data[key]

    def beginning(self, recipe: Any) -> str:
        """Hash of the weights that a fine-tuning begins with.

        Raises:
            UserError: they cannot be had.
        """
        start = recipe.encoder
        if start.weights == "given" and start.source and not start.source.startswith("timm:"):
            found: str = self.weights(start.source)
            return found
        from nanodist.downstream.finetune.model import start_encoder

        # Random weights follow from the seed, given ones do not.
        key = (start.source, start.weights, recipe.seed if start.weights == "random" else None)
        if key not in self._beginnings:
            self._beginnings[key] = start_encoder(recipe).weights_hash()
        return self._beginnings[key]

    @functools.cache  # noqa: B019  # lives as long as the process
    def store(self, path: str) -> str:
        """Hash of the manifest of a store.

        Raises:
            UserError: there is none.
        """
        from nanodist.shards import Store

        return Store.open(path).manifest_hash

    @functools.cache  # noqa: B019
    def pairs(self, path: str) -> Any:
        """A store of pairs.

        Raises:
            UserError: there is none.
        """
        from nanodist.pairvae.run import open_store

        return open_store(path)

    @functools.cache  # noqa: B019
    def weights(self, source: str) -> str:
        """Hash of the weights of a run or an export folder.

        Raises:
            UserError: it is neither.
        """
        from nanodist.weights import hash_of_export

        found = hash_of_export(source)
        if found is not None:
            return found
        from nanodist.encoders import load_encoder

        return load_encoder(source).weights_hash()


@dataclass(frozen=True)
class ProbeRecipe:
    """``nanodist probe`` as a recipe; its keys are the options of the command."""

    encoder: str = option("", "Run directory or export folder.")
    store: str = option("", "Store with labels.", how=True)
    test_store: str = option("", "Store that is the whole test set; empty: a share of store.", how=True)
    labels_per_class: str = option("1,2,4,8,16,32,80", "Numbers of labels a class.")
    protocol: Literal["sound", "lu2022"] = option("sound", "lu2022: as published, with its flaws.")
    flaws: str = option("", "Which of choice-on-test,split-by-image to have, or none; empty: those of the protocol.")
    seeds: int | None = option(None, "Label draws at each budget; null: 5, or 1 of lu2022.", low=1)
    split: Literal["share", "leave-one-group-out"] = option("share", "What is held out.")
    splits: int | None = option(None, "Splits by micrograph; null: 3, or 20 of lu2022.", low=1)
    test_share: float | None = option(
        None, "Share of each class's micrographs in the test; null: 0.3, or 0.2 of lu2022.", low=0.01, high=0.99
    )
    short_classes: Literal["blank", "cap"] = option("blank", "What a class with fewer labels than a budget does.")
    baselines: str = option("none", "Which of random,texture to measure beside it.")
    rounds: int | None = option(None, "Validation rounds that choose settings; null: 3.", low=1)
    seed: int = option(0, "Seed of splits, label draws and resamples.", low=0)

    def check(self) -> None:
        """Raise ``ValueError`` where there is nothing to probe."""
        if not self.encoder or not self.store:
            raise ValueError("a probe needs encoder and store")
        if self.flaws:
            from nanodist.downstream.lu2022 import parse_flaws

            try:
                parse_flaws(self.flaws, self.protocol)
            except UserError as error:
                raise ValueError(str(error)) from None


@dataclass(frozen=True)
class Place:
    """Where a job belongs: the name and folder of its sweep, its run directory, and the run that it follows."""

    sweep: str
    folder: Path
    run_dir: Path
    parent: str = ""


Arguments = Callable[[Any, str, Sequence[str], Place], list[str]]


def _no_helpers(recipe: Any, folder: Path, inputs: Inputs) -> list[Job]:
    return []


def _nothing(run_dir: Path) -> list[str]:
    return []


def _no_stores(recipe: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Kind:
    """A command of ``nanodist`` as a job.

    Attributes:
        name: of the command.
        parts: the class of the recipe, and the values of a source (a file or a packaged name).
        keys: short names of keys, beside the last parts of dotted keys that only one key has.
        identity: twelve hex digits of a recipe, as the run itself has them.
        arguments: the command line of a recipe (and the source and overrides that it is from) in its place.
        rows: what a finished run directory measured, a row or several.
        helpers: what a recipe needs to be done before, in the folder of a sweep.
        embedded: the stores that there is a helper for.
        then: the command line that follows the first one, of a run directory.
    """

    name: str
    parts: Callable[[str], tuple[type, Mapping[str, Any]]]
    identity: Callable[[Any, Inputs], str]
    arguments: Arguments
    rows: Callable[[Path], list[Row]]
    keys: Mapping[str, str] = field(default_factory=dict)
    helpers: Callable[[Any, Path, Inputs], list[Job]] = _no_helpers
    embedded: Callable[[Any], list[str]] = _no_stores
    then: Callable[[Path], list[str]] = _nothing

    def key(self, name: str, known: Mapping[str, Any]) -> str:
        """The dotted key that ``name`` stands for, among the flat keys of a recipe.

        Raises:
            UserError: none, or several.
        """
        if name in self.keys:
            return self.keys[name]
        if name in known or name.rpartition(".")[0] in known:
            return name
        fitting = [key for key in known if key.rpartition(".")[2] == name]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise UserError(f"sweep: '{name}' may be {' or '.join(fitting)}; write the whole key")
        # A free mapping inside, or a mistake, which the recipe itself then answers best.
        return name


def _by_recipe(*name: str) -> Arguments:
    def line(recipe: Any, source: str, overrides: Sequence[str], place: Place) -> list[str]:
        # The right side of an override is YAML, as JSON is.
        own = {"run_dir": str(place.run_dir), **_tracking(recipe, place)}
        return [*name, source, *overrides, *(f"{key}={json.dumps(value)}" for key, value in own.items())]

    return line


def _tracking(recipe: Any, place: Place) -> dict[str, str]:
    """One group in W&B for a sweep, and a link from its runs to the pretraining; what the recipe says itself stays."""
    if recipe.tracking.mode == "disabled":
        return {}
    group = {} if recipe.tracking.group else {"tracking.group": place.sweep}
    source = getattr(getattr(recipe, "encoder", None), "source", "")
    parent = place.parent or (source if source and (Path(source) / "run.json").is_file() else "")
    return {**group, **({"tracking.parent": str(parent)} if parent and not recipe.tracking.parent else {})}


def _pretrain_parts(source: str) -> tuple[type, Mapping[str, Any]]:
    from nanodist import recipes
    from nanodist.pretrain.recipe import PretrainRecipe

    return PretrainRecipe, parse_yaml(recipes.text("pretrain", source), f"recipe {source}")


def _finetune_parts(source: str) -> tuple[type, Mapping[str, Any]]:
    from nanodist import recipes
    from nanodist.downstream.finetune.recipe import FinetuneRecipe

    return FinetuneRecipe, parse_yaml(recipes.text("finetune", source), f"recipe {source}")


def _probe_parts(source: str) -> tuple[type, Mapping[str, Any]]:
    if not source:
        return ProbeRecipe, {}
    try:
        return ProbeRecipe, parse_yaml(Path(source).read_text(), f"recipe {source}")
    except OSError as error:
        raise UserError(f"recipe {source} cannot be read: {error.strerror or error}") from None


def _pairvae_parts(source: str) -> tuple[type, Mapping[str, Any]]:
    from nanodist import recipes
    from nanodist.pairvae.recipe import PairVAERecipe

    return PairVAERecipe, parse_yaml(recipes.text("pairvae", source), f"recipe {source}")


def _pairvae_identity(recipe: Any, inputs: Inputs) -> str:
    from nanodist.pairvae.run import identity

    return identity(recipe, inputs.pairs(recipe.data.store))[0]


def _pairvae_rows(run_dir: Path) -> list[Row]:
    return _scores(run_dir / "evaluation")


def _pairvae_evaluation(run_dir: Path) -> list[str]:
    return ["pairvae", "evaluate", str(run_dir), f"--out={run_dir / 'evaluation'}"]


def _pretrain_identity(recipe: Any, inputs: Inputs) -> str:
    from nanodist.pretrain.data import identity

    if (recipe.init_from or "").startswith("deepspeed:"):
        raise UserError("sweep: init_from=deepspeed:... is for single runs; export it and give the folder")
    return identity(recipe, inputs.data(recipe), inputs.weights)[0]


def _finetune_identity(recipe: Any, inputs: Inputs) -> str:
    from nanodist.downstream.finetune.recipe import identify

    stores = [inputs.store(path) for path in (recipe.data.store, recipe.data.test_store) if path]
    return identify(recipe, stores, lambda: inputs.beginning(recipe))[0]


def _probe_identity(recipe: ProbeRecipe, inputs: Inputs) -> str:
    from nanodist.cli.probe import USUAL

    what = {**config.to_dict(recipe, what_only=True), "encoder": ""}
    usual = dict(zip(("splits", "test_share", "seeds", "rounds"), USUAL[recipe.protocol], strict=True))
    what |= {name: value for name, value in usual.items() if what[name] is None}
    # Keys that came later count where they say something, so that probes from before are still known as done.
    later = {"protocol": "sound", "flaws": "", "short_classes": "blank", "rounds": usual["rounds"]}
    what = {name: value for name, value in what.items() if name not in later or value != later[name]}
    hashes = {"encoder": inputs.weights(recipe.encoder), "store": inputs.store(recipe.store)}
    if recipe.test_store:
        hashes["test_store"] = inputs.store(recipe.test_store)
    return config.identity_hash({"probe": what}, hashes)


def _probe_arguments(recipe: ProbeRecipe, source: str, overrides: Sequence[str], place: Place) -> list[str]:
    options = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "encoder"}
    line = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value not in ("", None)]
    return ["probe", recipe.encoder, *line, f"--features={place.folder / FEATURES}", f"--out={place.run_dir}"]


def _embedded(recipe: ProbeRecipe) -> list[str]:
    return [path for path in (recipe.store, recipe.test_store) if path]


def _features(recipe: ProbeRecipe, folder: Path, inputs: Inputs) -> list[Job]:
    """The features of the frozen encoder for each store, which all its probes read."""
    made = []
    for store in _embedded(recipe):
        hashes = {"encoder": inputs.weights(recipe.encoder), "store": inputs.store(store)}
        fingerprint = config.identity_hash({"features": {}}, hashes)
        line = ["probe", recipe.encoder, f"--store={store}", "--embed-only", f"--features={folder / FEATURES}"]
        line += ["--baselines=none", f"--out={folder / FEATURES}"]
        made.append(Job(fingerprint, {"features_of": recipe.encoder, "store": store}, line))
    return made


def _scores(run_dir: Path) -> list[Row]:
    """The tidy rows of ``scores.json``."""
    document = json.loads((run_dir / "scores.json").read_text())
    return [dict(row) for row in document["rows"]]


def _last_metrics(run_dir: Path) -> list[Row]:
    from hpc.run_dir import read_metrics

    found: Row = {}
    for line in read_metrics(run_dir / "metrics.jsonl"):
        found |= line
    return [found]


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "pretrain",
            _pretrain_parts,
            _pretrain_identity,
            _by_recipe("pretrain"),
            _last_metrics,
            {"store": "data.store"},
        ),
        Kind(
            "finetune",
            _finetune_parts,
            _finetune_identity,
            _by_recipe("finetune"),
            _scores,
            {"store": "data.store", "encoder": "encoder.source"},
        ),
        Kind(
            "pairvae",
            _pairvae_parts,
            _pairvae_identity,
            _by_recipe("pairvae", "train"),
            _pairvae_rows,
            {"store": "data.store", "encoder": "model.encoder"},
            then=_pairvae_evaluation,
        ),
        Kind("probe", _probe_parts, _probe_identity, _probe_arguments, _scores, {}, _features, _embedded),
    )
}


def kind_of(name: str) -> Kind:
    """A kind of job by its name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in KINDS:
        raise UserError(f"sweep: job '{name}' does not exist; allowed: {', '.join(KINDS)}")
    return KINDS[name]
