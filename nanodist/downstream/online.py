"""How good the encoder is while it trains: k nearest neighbours and a linear probe on a labelled store.

The curves say when a pretraining stops paying. They are not the final score: the held-out micrographs here are drawn
from the given store, so keep a test store of its own for :mod:`nanodist.downstream.probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from hpc import atomic
from hpc.errors import UserError
from hpc.topology import Topology
from nanodist.downstream.labels import Targets, draw_order, encode, first, hold_out, without
from nanodist.downstream.linear import SoftmaxRegression
from nanodist.downstream.metrics import balanced_accuracy, confusion_matrix
from nanodist.downstream.neighbours import knn_predict, unit_rows
from nanodist.encoders import Encoder, create_trunk
from nanodist.pretrain.recipe import EvaluationConfig
from nanodist.pretrain.task import PretrainTask
from nanodist.shards import Store

I64 = npt.NDArray[np.int64]
Draw = Callable[[npt.NDArray[np.float32], Sequence[str]], bytes]
DRAWS, TEST_SHARE, LINEAR_C = 5, 0.5, 1.0


class OnlineEvaluation:
    """Measures a task's trunk, through a copy of it: nothing in the training can change.

    Half of the micrographs of each class are the test; labels come from the others, drawn five times by a fixed seed,
    the same at every call and for every run on the store. Ranks share the embedding.

    Args:
        config: the recipe's section.
        store: with labels.
        topology: which rank this is.
        draw: gives a PNG of features (n, d) and their classes, for the task's ``pictures``; ``None``: nothing is drawn.
    """

    def __init__(self, config: EvaluationConfig, store: Store, topology: Topology, draw: Draw | None = None) -> None:
        self._config, self._store, self._topology, self._draw = config, store, topology, draw
        labelled = np.asarray([i for i, label in enumerate(store.labels) if label is not None], np.int64)
        if not len(labelled):
            raise UserError(f"evaluation.store {config.store} has no labels; pack it with --labels")
        self._targets: Targets = encode([str(store.labels[i]) for i in labelled], [store.groups[i] for i in labelled])
        everyone: I64 = np.arange(len(labelled), dtype=np.int64)
        test = hold_out(self._targets, everyone, TEST_SHARE, 0, "online-test")
        if not len(test):
            raise UserError(
                f"evaluation.store {config.store}: no class has two micrographs, one of which could be held out"
            )
        pool = without(everyone, test)
        self._draws = [first(draw_order(self._targets, pool, draw), config.labels_per_class) for draw in range(DRAWS)]
        self._used = np.unique(np.concatenate([test, *self._draws]))
        self._samples = labelled[self._used]
        self._test = np.searchsorted(self._used, test)
        self._encoder: Encoder | None = None

    def __call__(self, task: PretrainTask) -> dict[str, float]:
        """Balanced accuracies ``eval_knn`` and ``eval_linear``, and the ``score`` for checkpoints; on rank 0 only."""
        features = self._features(task)
        if not self._topology.is_main:
            return {}
        y, classes = self._targets.y[self._used], len(self._targets.classes)
        rows, truth = unit_rows(features), y[self._test]
        knn, linear = [], []
        for draw in self._draws:
            chosen = np.searchsorted(self._used, draw)
            nearest = min(self._config.neighbours, len(chosen))
            voted = knn_predict(rows[self._test] @ rows[chosen].T, y[chosen], classes, [nearest])[0]
            knn.append(balanced_accuracy(confusion_matrix(truth, voted, classes)))
            probe = SoftmaxRegression(rows[chosen] * len(rows[0]) ** 0.5, y[chosen], classes)
            said = probe.predict(rows[self._test] * len(rows[0]) ** 0.5, [LINEAR_C])[0]
            linear.append(balanced_accuracy(confusion_matrix(truth, said, classes)))
        if self._draw is not None and task.pictures is not None:
            names = [self._targets.classes[c] for c in truth.tolist()]
            png = self._draw(features[self._test], names)
            atomic.write_bytes(task.pictures / f"embeddings-{task.step:08d}.png", png)
        figures = {"eval_knn": float(np.mean(knn)), "eval_linear": float(np.mean(linear))}
        return {**figures, "score": -figures["eval_linear"]}

    def try_one(self, task: PretrainTask) -> None:
        """Embed a sample before anything is trained, rather than fail epochs later.

        Raises:
            UserError: the trunk does not take the store's tiles.
        """
        tile = self._store.read(int(self._samples[0]))
        try:
            self._copy(task).embed([tile])
        except (AssertionError, RuntimeError) as error:
            shape, reason = " x ".join(map(str, tile.shape)), " ".join(str(error).split())[:200]
            raise UserError(
                f"evaluation.store: trunk '{task.spec.trunk}' does not take tiles of {shape} px ({reason}); give "
                "encoder.trunk_options={dynamic_img_size: true} where its size is fixed, or encoder.looks that suit it"
            ) from None

    def _features(self, task: PretrainTask) -> npt.NDArray[np.float32]:
        """Embeddings of all samples that are used; each rank makes every world_size-th."""
        encoder = self._copy(task)
        mine = np.arange(self._topology.rank, len(self._samples), self._topology.world_size)
        own = encoder.embed(self._store.read(int(self._samples[i])) for i in mine) if len(mine) else None
        if task.group is None:
            assert own is not None
            return own
        width = torch.zeros(1, dtype=torch.int64, device=task.device)
        width += 0 if own is None else own.shape[1]
        dist.all_reduce(width, dist.ReduceOp.MAX, group=task.group)
        every = torch.zeros(len(self._samples), int(width), device=task.device)
        if own is not None:
            every[torch.from_numpy(mine).to(task.device)] = torch.from_numpy(own).to(task.device)
        # Every row has one rank that gives it, so the sum is exact.
        dist.all_reduce(every, group=task.group)
        return every.cpu().numpy()

    def _copy(self, task: PretrainTask) -> Encoder:
        if self._encoder is None:
            trunk = create_trunk(task.spec.trunk, 0, **task.spec.trunk_options).to(task.device)
            self._encoder = Encoder(task.spec, trunk, "online")
        trained = task.module.trunk.state_dict()  # type: ignore[union-attr]
        self._encoder.trunk.load_state_dict({name: value.float() for name, value in trained.items()})
        return self._encoder


def online_evaluation(task: PretrainTask, draw: Draw | None = None) -> OnlineEvaluation | None:
    """The evaluation that the recipe of ``task`` asks for, or ``None``; ``draw`` as :class:`OnlineEvaluation` takes it.

    Raises:
        UserError: its store is missing, has no labels that could be told apart, or tiles that the trunk does not take.
    """
    recipe = task.recipe
    if not recipe.evaluation.store or not recipe.evaluation.every_epochs:
        return None
    if recipe.engine.zero_stage == 3:
        raise UserError("online evaluation needs whole weights on each rank: set engine.zero_stage below 3")
    found = OnlineEvaluation(recipe.evaluation, Store.open(recipe.evaluation.store), task.topology, draw)
    found.try_one(task)
    return found
