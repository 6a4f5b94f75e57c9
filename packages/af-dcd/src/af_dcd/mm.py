"""Earlier name of ``af_dcd.adapters.mmseg``: configs that import it by ``custom_imports`` still load."""

import sys

from af_dcd.adapters.mmseg import datasets
from af_dcd.adapters.mmseg import optimizer_wrappers as optim
from af_dcd.adapters.mmseg import segmentors as models
from af_dcd.adapters.mmseg import training_loop as loop

# Those of its modules that register something, which a config may name one by one.
sys.modules |= {
    f"{__name__}.datasets": datasets,
    f"{__name__}.loop": loop,
    f"{__name__}.models": models,
    f"{__name__}.optim": optim,
}
