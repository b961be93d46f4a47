"""What approximation does to a model, and why."""
