"""Benchmarks of fis-dit."""
