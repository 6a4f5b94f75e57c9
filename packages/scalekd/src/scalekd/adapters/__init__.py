"""Glue to timm: teachers, students, the training task, data."""
