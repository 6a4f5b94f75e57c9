"""Glue to transformers: model directories, decoder blocks, calibration text."""
