"""Tasks that a model is trained on: a file per task."""
