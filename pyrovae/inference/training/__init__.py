"""Training: steps, batches, checkpoints, and the loop around them."""
