"""Physics-based stand-ins for micrographs, with exact ground truth: every image is a function of (seed, class, index).

``wires`` lays wires out, ``geometry`` projects them, ``specimen`` makes the exit wave, ``optics`` the microscope,
``detector`` the camera, ``micrograph`` puts these together, ``write`` makes a data set of them. ``particles`` and
``viruses`` do the same for metal particles and for viruses in negative stain, ``outlines`` has their exact sizes.
"""

from __future__ import annotations

from nanodist.synth.micrograph import Micrograph, Settings, make
from nanodist.synth.particles import SHAPES, make_particles
from nanodist.synth.viruses import VIRUSES, make_viruses
from nanodist.synth.wires import MORPHOLOGIES
from nanodist.synth.write import KINDS, read_instances, write_dataset

__all__ = [
    "KINDS",
    "MORPHOLOGIES",
    "SHAPES",
    "VIRUSES",
    "Micrograph",
    "Settings",
    "make",
    "make_particles",
    "make_viruses",
    "read_instances",
    "write_dataset",
]
