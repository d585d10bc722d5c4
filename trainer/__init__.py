"""Batches to an encoder: losses over the global batch, the training loop, evaluation and export."""
