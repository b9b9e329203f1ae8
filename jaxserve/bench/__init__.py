"""Benchmarks: a load on a running server, and the engine alone."""
