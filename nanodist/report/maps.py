"""Maps of embeddings on a plane, by class and with small pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nanodist.report.figures import MARKERS, Array, colour, new_figure, png, settings

MAX_MAP_POINTS = 1500
_WIDE, _HIGH, _MARGIN, _FRAME = 1280, 800, 40, 4


def lay_out(features: npt.NDArray[np.float32], quick: bool = False) -> tuple[npt.NDArray[np.int64], Array, str]:
    """Rows of ``features`` (n, d) that a map shows, their places (m, 2), and the method's name.

    At most :data:`MAX_MAP_POINTS` evenly spaced rows; ``quick`` ones are laid out by PCA alone.
    """
    chosen = np.arange(len(features))
    if len(features) > MAX_MAP_POINTS:
        chosen = np.linspace(0, len(features) - 1, MAX_MAP_POINTS).astype(np.int64)
    points, method = project(features[chosen], quick)
    return chosen, points, method


def embedding_map(points: Array, labels: Sequence[str]) -> bytes:
    """Points (n, 2) coloured and marked by class, as PNG."""
    classes = sorted(set(labels))
    member = np.asarray(labels)
    with settings():
        figure = new_figure(8.0, 5.4, face="white", layout="constrained")
        ax = figure.add_subplot()
        for index, name in enumerate(classes):
            x, y = points[member == name].T
            mark = MARKERS[index % len(MARKERS)]
            ax.scatter(x, y, s=24, c=colour(index), marker=mark, linewidths=0.3, edgecolors="white", label=_short(name))
        ax.set(xticks=[], yticks=[], aspect="equal")
        ax.set_adjustable("datalim")
        ax.spines[:].set_visible(True)
        ax.spines[:].set_color("#cccccc")
        if len(classes) <= 40:
            figure.legend(loc="outside right upper", frameon=False, labelcolor="#222222", ncols=-(-len(classes) // 22))
        return png(figure)


def quick_map(features: npt.NDArray[np.float32], labels: Sequence[str]) -> bytes:
    """A map by PCA alone, as PNG, for pictures while training."""
    chosen, points, _ = lay_out(features, quick=True)
    return embedding_map(points, [labels[i] for i in chosen])


def thumbnail_map(points: Array, labels: Sequence[str], thumbnails: npt.NDArray[np.uint8]) -> tuple[bytes, int]:
    """Small pictures (n, S, S) at their points (n, 2), framed in the colour of their class, as PNG; how many fit.

    They are placed in their order, but for those that would lie over one that is there.
    """
    from PIL import Image

    classes = {name: index for index, name in enumerate(sorted(set(labels)))}
    side = thumbnails.shape[1]
    low, high = points.min(0), points.max(0)
    room = np.array([_WIDE, _HIGH]) - 2 * _MARGIN - side
    scale = float(min(room / np.maximum(high - low, 1e-9)))
    middle = (np.array([_WIDE, _HIGH]) - side) / 2
    corners = middle + (points - (low + high) / 2) * scale * np.array([1, -1])
    sheet = Image.new("RGB", (_WIDE, _HIGH), "white")
    placed = np.zeros((0, 2))
    for corner, name, picture in zip(corners, labels, thumbnails, strict=True):
        if len(placed) and (np.abs(placed - corner).max(1) < side + 2 * _FRAME + 1).any():
            continue
        x, y = (round(float(v)) for v in corner)
        sheet.paste(colour(classes[name]), (x - _FRAME, y - _FRAME, x + side + _FRAME, y + side + _FRAME))
        sheet.paste(Image.fromarray(picture).convert("RGB"), (x, y))
        placed = np.concatenate([placed, corner[None]])
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), len(placed)


def project(features: npt.NDArray[np.float32], quick: bool = False) -> tuple[Array, str]:
    """``features`` (n, d) on a plane (n, 2), and the method's name; the same for the same input."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count, width = features.shape
    if count < 3 or width < 2 or not np.ptp(features, axis=0).any():
        flat = np.zeros((count, 2))
        flat[:, : min(width, 2)] = features[:, :2]
        return flat, "raw axes"
    if count < 50 or quick:
        return PCA(2, svd_solver="full").fit_transform(features.astype(np.float64)), "PCA"
    reduced = PCA(min(50, width, count - 1), svd_solver="full").fit_transform(features.astype(np.float64))
    perplexity = min(30.0, (count - 1) / 3)
    plane = TSNE(2, perplexity=perplexity, init="pca", random_state=0, n_jobs=1).fit_transform(reduced)
    return plane.astype(np.float64), "PCA, then t-SNE"


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
