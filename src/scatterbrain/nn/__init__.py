"""Modules that own what attention needs between calls."""

from scatterbrain.nn.attention import ScatterbrainAttention, calibrate, update_statistics

__all__ = ["ScatterbrainAttention", "calibrate", "update_statistics"]
