"""Af-DCD inside mmsegmentation; ``custom_imports = dict(imports=["af_dcd.mm"])`` in a config loads it."""

from af_dcd.mm.shims import prepare

prepare()
