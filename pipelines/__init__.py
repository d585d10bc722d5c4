"""Image files to batches: sources, packing, manifest, order, reading, decoding, augmenting, streaming."""
