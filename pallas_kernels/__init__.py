"""Pallas kernels and their XLA references: a leaf that imports jax only."""
