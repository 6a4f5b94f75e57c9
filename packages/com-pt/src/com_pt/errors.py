"""The errors of com-pt; each is one line for the user, and exit code 2 where the input is at fault."""

from effml_common.errors import InputError


class LayoutError(InputError):
    """A parameter whose axes nobody described, or that one of the two models lacks."""


class GrowthError(InputError):
    """Two models that the requested growth cannot connect."""


class ChainOrderError(InputError):
    """A chain whose next member is not larger in every grown axis."""


class NonFiniteWeightsError(InputError, FloatingPointError):
    """NaN or infinity in weights that were given; those met while training are ``NonFiniteError``."""
