"""Drawn scenes, two small segmenters, and ways to train the smaller one, compared."""
