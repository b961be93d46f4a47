"""Speed, error and memory of attention methods over sequence lengths, measured side by side."""
