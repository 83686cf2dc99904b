"""Scattering patterns: readers of 2D detector images, their geometry, masks, I(q), and the fixed q grid of training."""

from nanodist.scattering.pattern import Kind, Pattern, QGrid, compressed, decompressed

__all__ = ["Kind", "Pattern", "QGrid", "compressed", "decompressed"]
