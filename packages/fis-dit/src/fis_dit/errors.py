"""What fis-dit refuses; each error is also the built-in one that callers expect."""

from effml_common.errors import InputError


class UnsupportedModelError(InputError, TypeError):
    """The transformer's class has no adapter."""


class HookStateError(InputError, RuntimeError):
    """Hooks are in an order that would silently break, or a model's layout was not understood."""


class NotSupportedError(InputError, NotImplementedError):
    """A combination that is known and not served yet."""
