"""Benchmarks of sliderquant."""
