"""Benchmarks of com-pt."""
