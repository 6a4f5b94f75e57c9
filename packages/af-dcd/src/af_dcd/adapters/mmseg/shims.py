"""What mmsegmentation 1.2 needs today: a stand-in for mmcv's compiled operators where there are none.

mmseg imports ``mmcv.ops`` at its start, which imports the compiled module ``mmcv._ext``; the pure-Python
``mmcv-lite`` has none. With a compiled mmcv nothing here changes anything.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from effml_common.errors import InputError

OPERATORS_MODULE = "mmcv._ext"
DISTRIBUTIONS = {"mmcv": "mmcv-lite", "mmengine": "mmengine", "mmseg": "mmsegmentation"}
_UNSAFE_LOADING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class MissingOperators(ModuleType):
    """Module whose every function says that it needs the compiled mmcv."""

    def __init__(self) -> None:
        super().__init__(OPERATORS_MODULE)
        # A spec without a loader: mmengine's question whether operators are there is answered no.
        self.__spec__ = ModuleSpec(OPERATORS_MODULE, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: Any, **_kwargs: Any) -> Any:
            raise InputError(
                f"{name} needs the compiled operators, which mmcv-lite lacks; "
                "replace mmcv-lite by mmcv 2.1, or use a model without it"
            )

        return missing


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out the announcements of mmseg's constructors and of what it imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prepare() -> None:
    """Make mmseg importable and register its models, data sets and transforms.

    Raises:
        InputError: If mmseg is not installed, or the environment turns safe loading off.
    """
    # What must be installed, and what must not be switched on.
    for module, distribution in DISTRIBUTIONS.items():
        if importlib.util.find_spec(module) is None:
            raise InputError(f'{distribution} is not installed; pip install "af-dcd[mmseg]"')
    if os.environ.get(_UNSAFE_LOADING, "").lower() in ("1", "y", "yes", "true"):
        raise InputError(f"{_UNSAFE_LOADING} lets checkpoints run code; unset it")

    # The stand-in comes before mmseg, which imports the operators.
    install_stub()
    with quiet():  # pkg_resources announces its end whenever mmengine imports it
        import mmengine.config
        import mmseg.utils
        import pkg_resources  # noqa: F401

        assert mmengine.config is not None
        mmseg.utils.register_all_modules()


def install_stub() -> bool:
    """Put the stand-in in place if there are no compiled operators.

    Returns:
        Whether it is in place, now or from an earlier call.
    """
    if isinstance(sys.modules.get(OPERATORS_MODULE), MissingOperators):
        return True
    if importlib.util.find_spec(OPERATORS_MODULE) is not None:
        return False
    import mmcv

    stub = MissingOperators()
    sys.modules[OPERATORS_MODULE] = stub
    mmcv._ext = stub  # type: ignore[attr-defined]
    return True


def build_model(config: dict[str, Any]) -> Any:
    """Build an mmseg model from its config, with the announcements of its constructors left out."""
    prepare()
    from mmseg.registry import MODELS

    with quiet():
        return MODELS.build(config)
