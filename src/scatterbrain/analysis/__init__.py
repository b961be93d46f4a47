"""What approximation does to a model: captured queries, keys and values, comparisons, and settings layer by layer.

* :func:`scatterbrain.capture`: what the attention layers of a model compute with (``captured.py``).
* :func:`scatterbrain.compare`: entropy, shares of weight, error and time by layer (``comparison.py``).
* What supports and kernels cost in multiply-adds per query (``cost.py``).
"""

from scatterbrain.analysis.captured import LayerCall, calls_of, capture
from scatterbrain.analysis.comparison import Comparison, compare

__all__ = ["Comparison", "LayerCall", "calls_of", "capture", "compare"]
