"""Physics-based stand-ins for micrographs, with exact ground truth: every image is a function of (seed, class, index).

``wires`` lays wires out, ``geometry`` projects them, ``specimen`` makes the exit wave, ``optics`` the microscope,
``detector`` the camera, ``micrograph`` puts these together, ``write`` makes a data set of them.
"""

from __future__ import annotations

from nanodist.synth.micrograph import Micrograph, Settings, make
from nanodist.synth.wires import MORPHOLOGIES
from nanodist.synth.write import read_instances, write_dataset

__all__ = ["MORPHOLOGIES", "Micrograph", "Settings", "make", "read_instances", "write_dataset"]
