"""The pairs that a PairVAE learns from: :class:`nanodist.shards.pair_store.PairStore`."""

from __future__ import annotations

from nanodist.shards.pair_store import PairStore

__all__ = ["PairStore"]
