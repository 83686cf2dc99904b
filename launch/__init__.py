"""How jobs are submitted."""

from launch.resources import SlurmResources

__all__ = ["SlurmResources"]
