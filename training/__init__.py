"""Training of SAIL-Embedding models; imported as `modeling_sail.training`."""
