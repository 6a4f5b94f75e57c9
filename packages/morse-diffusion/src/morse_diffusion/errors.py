"""What this package refuses, by kind. All are ``InputError``: one line, exit code 2."""

from effml_common.errors import InputError


class PlanError(InputError):
    """A plan that cannot be sampled, or a budget that no plan meets."""


class DotMismatchError(InputError):
    """A Dot that was trained for another Dash, noise schedule or prediction."""


class UnsupportedSchedulerError(InputError):
    """A scheduler that does not call the denoiser exactly once per distinct time."""


class UnsupportedDenoiserError(InputError):
    """A denoiser, or a way to call it, that a Dot cannot be wrapped around."""


class GuidanceError(InputError):
    """Classifier-free guidance is on and its scale is unknown."""


class ShapeError(InputError):
    """A sample size that cannot be halved as often as the Dot needs."""


class NumericsError(InputError):
    """A Dash estimate or a Dot residual that is NaN or infinite."""


class StateError(InputError):
    """Morse called out of order: before a Dash step, twice installed, in the middle of a run."""
