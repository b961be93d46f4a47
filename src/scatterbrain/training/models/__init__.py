"""Models of the training tasks: blocks around any attention module, and what stands before and after them."""
