"""Glue to diffusers: schedulers, denoisers, the hook on a live pipeline, files."""
