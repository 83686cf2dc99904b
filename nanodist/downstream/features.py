"""The labelled samples of a store, and their features by encoders and by hand, kept so that a second probe is free."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from hpc import atomic
from hpc.errors import UserError
from hpc.progress import Progress
from nanodist.downstream import texture
from nanodist.downstream.labels import Targets, encode

if TYPE_CHECKING:
    from nanodist.encoders import Encoder
    from nanodist.shards import Store

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Kind = Literal["pretrained", "random", "texture", "scratch", "finetuned"]
COMPLETE_GROUPS = 20000  # a checkpoint lists up to this many of the micrographs that it was trained on


@dataclass(frozen=True)
class Part:
    """The labelled samples of one store, in the order of their keys."""

    store: Store
    indices: tuple[int, ...]
    keys: tuple[str, ...]

    def images(self) -> Iterator[npt.NDArray[Any]]:
        """The images (H, W), one by one."""
        return (self.store.read(i) for i in self.indices)


@dataclass(frozen=True)
class Dataset:
    """Labelled samples of a store and, after them, of a test store where there is one.

    Attributes:
        fixed_test: numbers of the samples of the test store; ``None`` without one.
        unlabelled: samples left out since they have no label.
    """

    parts: tuple[Part, ...]
    targets: Targets
    keys: tuple[str, ...]
    fixed_test: I64 | None
    unlabelled: int

    @property
    def test_store(self) -> Store:
        """The store that the test samples are from."""
        return self.parts[-1].store

    def micrographs(self, samples: I64) -> list[str]:
        """The micrographs that the samples are of, whatever they are split by."""
        names = [part.store.groups[i] for part in self.parts for i in part.indices]
        return sorted({names[i] for i in samples.tolist()})


@dataclass(frozen=True)
class FeatureSet:
    """Features of all samples of a :class:`Dataset` by one encoder seed.

    Attributes:
        name: encoder; feature sets of one name are seeds of one encoder.
        seed: of the encoder.
        features: (n, d) float32.
        seen: what the encoder was pretrained on, where it says so.
        trunk: key of the random baseline that it is compared with.
    """

    name: str
    kind: Kind
    seed: int
    features: F32
    seen: dict[str, Any] | None = field(default=None)
    trunk: str = ""


def labelled(store: Store, test_store: Store | None = None) -> Dataset:
    """The labelled samples of one or two stores.

    Raises:
        UserError: a store has no labels, the stores share a micrograph, or the test has a class without training label.
    """
    part, labels, groups = _part(store)
    if test_store is None:
        return Dataset((part,), encode(labels, groups), part.keys, None, len(store) - len(labels))
    test, test_labels, test_groups = _part(test_store)
    _check_apart((store, set(labels), set(groups)), (test_store, set(test_labels), set(test_groups)))
    fixed = np.arange(len(labels), len(labels) + len(test_labels))
    targets = encode(labels + test_labels, groups + test_groups)
    left_out = len(store) + len(test_store) - len(targets.y)
    return Dataset((part, test), targets, part.keys + test.keys, fixed, left_out)


def _part(store: Store) -> tuple[Part, list[str], list[str]]:
    labels, groups = store.labels, store.groups
    keys = [sample.key for sample in store.samples]
    order = sorted((i for i in range(len(store)) if labels[i] is not None), key=lambda i: keys[i])
    if not order:
        raise UserError(f"store {store.path} has no labels; pack it with --labels folder or --labels FILE.csv:COLUMN")
    part = Part(store, tuple(order), tuple(keys[i] for i in order))
    return part, [str(labels[i]) for i in order], [groups[i] for i in order]


def _check_apart(training: tuple[Store, set[str], set[str]], test: tuple[Store, set[str], set[str]]) -> None:
    """Refuse two stores (each with its labels and groups) that share a micrograph or differ in their classes."""
    (store, labels, groups), (test_store, test_labels, test_groups) = training, test
    shared = sorted(groups & test_groups)
    if shared:
        raise UserError(
            f"stores {store.path} and {test_store.path} share {len(shared)} micrograph(s), such as '{shared[0]}': "
            "a test on micrographs of the training says nothing; leave them out of one store"
        )
    unknown = sorted(test_labels - labels)
    if unknown:
        raise UserError(f"test store {test_store.path} has class '{unknown[0]}', which store {store.path} lacks")


def encoder_features(dataset: Dataset, encoder: Encoder, cache: Path, batch_size: int = 64) -> F32:
    """Embeddings (n, d) of all samples, from ``cache`` where these weights embedded this store before."""
    return _collect(dataset.parts, _embedding(encoder, batch_size), cache, encoder.weights_hash(), encoder.name)


def _embedding(encoder: Encoder, batch_size: int) -> Callable[[Part], F32]:
    from hpc.devices import inference_device

    def embed(part: Part) -> F32:
        bar = Progress(len(part.indices), f"embedding ({encoder.name})", "images")
        try:
            return encoder.to(inference_device()).embed(part.images(), batch_size, bar.update)
        finally:
            bar.close()

    return embed


def store_features(store: Store, encoder: Encoder, cache: Path) -> tuple[Part, F32]:
    """All samples of a store, labelled or not, and their embeddings (n, d); kept in ``cache`` like the others."""
    keys = [sample.key for sample in store.samples]
    order = sorted(range(len(store)), key=lambda i: keys[i])
    part = Part(store, tuple(order), tuple(keys[i] for i in order))
    return part, _collect((part,), _embedding(encoder, 64), cache, encoder.weights_hash(), encoder.name)


def hand_made_features(dataset: Dataset, cache: Path) -> F32:
    """Texture features (n, d) of all samples, from ``cache`` where this store was seen before."""

    def measure(part: Part) -> F32:
        bar = Progress(len(part.indices), "texture features", "images")
        rows = []
        for image in part.images():
            rows.append(texture.texture_of(image))
            bar.update()
        bar.close()
        return np.stack(rows)

    return _collect(dataset.parts, measure, cache, f"texture{texture.VERSION}", "texture")


def _collect(parts: Sequence[Part], compute: Callable[[Part], F32], cache: Path, identity: str, name: str) -> F32:
    features = np.concatenate([_cached(part, compute, cache, identity) for part in parts])
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        key = [key for part in parts for key in part.keys][bad]
        raise UserError(f"encoder '{name}' gives NaN or infinity for sample {key}: its training diverged")
    return features


def _cached(part: Part, compute: Callable[[Part], F32], cache: Path, identity: str) -> F32:
    """``compute(part)``, kept in an npz file named by the hashes of the store and of what computes."""
    path = cache / f"{part.store.manifest_hash[:16]}-{identity}.npz"
    keys = np.asarray(part.keys, dtype=str)
    found = _read(path, keys)
    if found is None:
        found = np.ascontiguousarray(compute(part), np.float32)
        cache.mkdir(parents=True, exist_ok=True)
        write_npz(path, features=found, keys=keys)
    return found


def _read(path: Path, keys: npt.NDArray[np.str_]) -> F32 | None:
    """Features of exactly these keys; ``None`` for an absent, damaged or other file, which is then written anew."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, known = arrays["features"], arrays["keys"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = features.ndim == 2 and len(features) == len(keys) and np.array_equal(known, keys)
    return features.astype(np.float32) if fits else None


def write_npz(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Write arrays to an npz file as a whole; numbers and unicode text only, so that it is read without pickle."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    atomic.write_bytes(path, buffer.getvalue())


def transductive(source: FeatureSet, test_hash: str, test_groups: Sequence[str]) -> bool | None:
    """Whether pretraining saw the test micrographs (without labels); ``None`` where that is not known.

    The list of micrographs in the checkpoint decides where it is complete. Otherwise pretraining on the same store
    counts as having seen them, and pretraining on another store as unknown.
    """
    if source.kind != "pretrained":
        return False
    seen = source.seen or {}
    groups = seen.get("groups")
    if groups is not None:
        if set(groups) & set(test_groups):
            return True
        if len(groups) < COMPLETE_GROUPS:
            return False
    return True if seen.get("manifest_hash") == test_hash else None
