"""What masks show, in nanometres: widths, lengths, domains, percolation.

``skeleton`` and ``tracing`` find wires, ``centre_line`` measures them, ``objects`` shapes, ``domains`` and
``percolation`` the two phases, ``border`` and ``statistics`` what follows for a specimen; ``measure`` puts these
together, ``files``, ``tables``, ``figures`` and ``rois`` read and write.
"""

from nanodist.morphology.measure import Measurement, Options, measure

__all__ = ["Measurement", "Options", "measure"]
