"""How jobs are submitted."""

from launch.resources import SlurmResources
from launch.sweep import Sweep

__all__ = ["SlurmResources", "Sweep"]
