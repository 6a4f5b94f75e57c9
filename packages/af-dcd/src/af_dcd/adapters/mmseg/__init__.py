"""Af-DCD inside mmsegmentation: importing it registers models, optimizer wrappers, loop and data set.

A hand-written config loads it with ``custom_imports = dict(imports=["af_dcd.adapters.mmseg"])``.
Nothing of the package imports it before mmseg is needed.
"""

from af_dcd.adapters.mmseg.shims import prepare

prepare()

from af_dcd.adapters.mmseg import (  # noqa: E402, F401
    datasets,
    optimizer_wrappers,
    segmentors,
    training_loop,
)
