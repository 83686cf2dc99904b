"""The model card of a PairVAE."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanodist.export.card import CITATION, head_of, interval, one_line, parity_table, recipe_block
from nanodist.export.loading import TITLES
from nanodist.export.pair_code import SAXS, SEM, code_of
from nanodist.pairvae.load import Trained

_CARD = """---
license: {license}
tags:
- nanodist
- electron-microscopy
- small-angle-scattering
---

# {name}

{licence}A PairVAE (preset `{preset}`, nanodist {version}): SEM images of what a SAXS pattern says, and the expected
SAXS pattern of an SEM image. It was trained on {items} pairs of the store whose manifest has the hash {store}.

## What is in the graphs, and what is not

Inside: asinh(I / {reference:g}), the mask, encoder, a draw of the latent, decoder, and the way back to intensities.
`noise` is yours: standard normal numbers for a draw, zeros for the mean. With SAXS given, {latent} of them draw the
latent and {own} what a pattern does not know of an image.

Not inside, but in the code below: a detector's frame is shared out over the q grid ({size} x {size} pixels, |q_x| up to
{q_max:g} 1/nm; patterns are {kind}) from the q of its pixels, `q_of` (a detector square to the beam; for a tilted one
take pyFAI's q); masks are yours. A micrograph is brought to {pixel:g} nm a pixel, its contrast is prepared over the
whole micrograph ({contrast}), and it is cut into tiles of {tile} px. The same for programs: `{first}.json` and
`{second}.json`.

"""
_USE = """## Intended use and limits

For films like those that it was trained on, with periods between two pixels and half a tile. An image is one that
*could* belong to the pattern: where a crop lay is not in it, so no pixel can be compared. Exposure is not known from an
image: a pattern is right up to a factor. `nanodist pairvae generate` flags input unlike the training; these graphs do
not.

"""


def card_text(
    trained: Trained,
    name: str,
    card: Mapping[str, Any],
    formats: Sequence[str],
    parity: Mapping[str, Any],
    location: str,
) -> str:
    """The card as Markdown; arguments as :func:`nanodist.export.pairvae.export_pairvae` has them."""
    geometry, model = trained.geometry, trained.model
    here = json.dumps(one_line(location))[1:-1]
    head = _CARD.format(
        **head_of(card, name),
        preset=trained.recipe.model.preset,
        items=len(trained.train),
        store=one_line(trained.store),
        reference=geometry.reference,
        latent=model.latent_dim,
        own=model.image_noise,
        size=geometry.grid.size,
        q_max=geometry.grid.q_max_inv_nm,
        kind=geometry.kind,
        pixel=geometry.pixel_size_nm,
        contrast=trained.recipe.data.contrast,
        tile=geometry.size_px,
        first=SAXS,
        second=SEM,
    )
    code = [
        f"### {title}, {TITLES[kind]}\n\n```python\n{code_of(trained, here, kind, stem)}```\n\n"
        for stem, title in ((SAXS, "From SAXS to SEM"), (SEM, "From SEM to SAXS"))
        for kind in formats
    ]
    return "".join([head, *code, parity_table(parity), _scores(card), _USE, recipe_block(card), CITATION])


def _scores(card: Mapping[str, Any]) -> str:
    rows = [row for row in card.get("scores") or () if row.get("method") == "PairVAE" and row.get("median") is not None]
    if not rows:
        return "## Scores\n\nNot measured: `nanodist pairvae evaluate` does, beside its baselines.\n\n"
    lines = []
    for row in rows:
        cells = (row["direction"], row["score"], row["items"], f"{row['median']:.3g}", interval(row, ".3g"))
        lines.append(f"| {' | '.join(map(one_line, cells))} |\n")
    head = "| direction | score | items | median | 95 % interval |\n|---|---|---|---|---|\n"
    return "## Scores\n\nOn specimens that were not trained on; all are errors.\n\n" + head + "".join(lines) + "\n"
