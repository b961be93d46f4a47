"""What approximation does to a model: captured queries, keys and values, comparisons, and settings layer by layer.

* :func:`scatterbrain.capture`: what the attention layers of a model compute with (``captured.py``,
  ``captured_file.py``).
* :func:`scatterbrain.compare`: entropy, shares of weight, error and time by layer (``comparison.py``).
* :func:`scatterbrain.tune`: the cheapest settings layer by layer that keep a bound (``tuning.py``).
* What supports and kernels cost in multiply-adds per query (``cost.py``).
* Where sparse, low-rank and both together are near to exact attention (``regimes/``).
"""

from scatterbrain.analysis.captured import calls_of
from scatterbrain.analysis.captured_file import capture
from scatterbrain.analysis.comparison import Comparison, compare
from scatterbrain.analysis.layer_call import LayerCall
from scatterbrain.analysis.tuning import Tuning, tune

__all__ = ["Comparison", "LayerCall", "Tuning", "calls_of", "capture", "compare", "tune"]
