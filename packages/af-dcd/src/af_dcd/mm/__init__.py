"""Af-DCD inside mmsegmentation: importing it registers models, optimizer wrappers, loop and data set.

A hand-written config loads it with ``custom_imports = dict(imports=["af_dcd.mm"])``. Nothing of the
package imports it before mmseg is needed.
"""

from af_dcd.mm.shims import prepare

prepare()

from af_dcd.mm import datasets, loop, models, optim  # noqa: E402, F401
