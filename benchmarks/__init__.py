"""Benchmarks: what the loss costs, ours and other people's, measured on the same tensors."""
