"""Training of small language models: data, model, trainer. Needs ``pip install 'scatterbrain[train]'``."""
