"""Sparse + low-rank attention: an exact sparse part and a positive low-rank part under one normaliser."""

from scatterbrain import presets, reference
from scatterbrain.analysis import capture, compare, tune
from scatterbrain.functional import attention, cluster, fit_statistics, route
from scatterbrain.integrations.dropout import set_attention_dropout
from scatterbrain.integrations.replace import replace_attention
from scatterbrain.layer_settings import LayerSettings
from scatterbrain.low_rank import (
    Centroid,
    Clusters,
    Favor,
    Features,
    Projections,
    Quadratic,
    RandomFeatures,
    Statistics,
)
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.nn.calibration import calibrate, update_statistics
from scatterbrain.nn.multihead import MultiheadAttention
from scatterbrain.profiling import profile, profile_process
from scatterbrain.supports import LSH, Blocks, Empty, Full, Routed, Window
from scatterbrain.version import __version__

__all__ = [
    "attention",
    "fit_statistics",
    "route",
    "cluster",
    "reference",
    "presets",
    "Full",
    "Empty",
    "Window",
    "Routed",
    "LSH",
    "Blocks",
    "Quadratic",
    "Favor",
    "Features",
    "Centroid",
    "Statistics",
    "Projections",
    "RandomFeatures",
    "Clusters",
    "ScatterbrainAttention",
    "calibrate",
    "update_statistics",
    "MultiheadAttention",
    "replace_attention",
    "set_attention_dropout",
    "profile",
    "capture",
    "compare",
    "tune",
    "LayerSettings",
    "__version__",
]

profile_process()
del profile_process
