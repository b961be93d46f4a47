"""Modules that own what attention needs between calls."""

from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.nn.calibration import calibrate, update_statistics

__all__ = ["ScatterbrainAttention", "calibrate", "update_statistics"]
