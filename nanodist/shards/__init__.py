"""Shards: micrographs packed into a store, and read back in an order that is a function of the seed."""

from nanodist.shards.convert import PackOptions
from nanodist.shards.index import Sample, Samples
from nanodist.shards.loader import Batch, Loader
from nanodist.shards.manifest import Manifest
from nanodist.shards.order import Order
from nanodist.shards.pack import pack
from nanodist.shards.partners import GroupPartners
from nanodist.shards.parts import Part
from nanodist.shards.store import Store
from nanodist.shards.verify import Fault, verify

__all__ = [
    "Batch",
    "Fault",
    "GroupPartners",
    "Loader",
    "Manifest",
    "Order",
    "PackOptions",
    "Part",
    "Sample",
    "Samples",
    "Store",
    "pack",
    "verify",
]
