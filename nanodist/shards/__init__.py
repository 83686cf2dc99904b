"""Shards: micrographs packed into a store, and read back in an order that is a function of the seed."""

from nanodist.shards.convert import PackOptions
from nanodist.shards.foreign import index_shards
from nanodist.shards.index import Sample, Samples
from nanodist.shards.loader import Batch, Loader
from nanodist.shards.manifest import Manifest
from nanodist.shards.mix import Mixture, make_order
from nanodist.shards.order import MixedOrder, Order
from nanodist.shards.pack import pack
from nanodist.shards.partners import GroupPartners
from nanodist.shards.parts import Part
from nanodist.shards.store import SampleError, Store
from nanodist.shards.verify import Fault, verify

__all__ = [
    "Batch",
    "Fault",
    "GroupPartners",
    "Loader",
    "Manifest",
    "MixedOrder",
    "Mixture",
    "Order",
    "PackOptions",
    "Part",
    "Sample",
    "SampleError",
    "Samples",
    "Store",
    "index_shards",
    "make_order",
    "pack",
    "verify",
]
