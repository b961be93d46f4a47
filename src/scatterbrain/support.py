"""The earlier module of the supports: pickled settings, such as the hyperparameters in a checkpoint, name it."""

from scatterbrain.supports import LSH, Blocks, Empty, Full, Routed, Support, Window

__all__ = ["Support", "Full", "Empty", "Window", "Routed", "LSH", "Blocks"]
