"""Glue to open_clip, timm and transformers; the libraries are imported inside functions."""
