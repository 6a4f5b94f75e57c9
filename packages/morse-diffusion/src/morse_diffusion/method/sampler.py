"""The sampling rule of Morse (Eq. 3 and 4 of the paper), for any network and any sampler update."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from morse_diffusion.errors import PlanError, StateError
from morse_diffusion.method.schedule import MorsePlan

Dash = Callable[[Tensor, float], Tensor]
Jump = Callable[[Tensor, Tensor, float, float], Tensor]


class Dot(Protocol):
    """What fills in a step: the residual to add to the last Dash estimate ``z_s``."""

    def __call__(
        self, x_s: Tensor, x_i: Tensor, z_s: Tensor, t_s: Any, t_i: Any, cond: Any = None
    ) -> Tensor:
        """Return the residual, of the shape of ``z_s``; ``t_s`` > ``t_i``, numbers or [b] tensors."""
        ...


class ZeroDot:
    """Repeats the last Dash estimate: plain sampling with the Dash steps alone.

    >>> import torch
    >>> x = torch.ones(1, 2)
    >>> ZeroDot()(x, x, x, 900.0, 800.0)
    tensor([[0., 0.]])
    """

    def __call__(
        self, x_s: Tensor, x_i: Tensor, z_s: Tensor, t_s: Any, t_i: Any, cond: Any = None
    ) -> Tensor:
        """Return zeros."""
        return z_s.new_zeros(z_s.shape)


class ExtrapolationDot:
    """A Dot that costs nothing: the line through the last two Dash estimates, in time.

    It keeps those estimates; a ``t_s`` above the last one begins a new trajectory.

    >>> import torch
    >>> dot, x = ExtrapolationDot(), torch.zeros(1)
    >>> dot(x, x, torch.tensor([1.0]), 900.0, 800.0)  # one estimate gives no line yet
    tensor([0.])
    >>> dot(x, x, torch.tensor([3.0]), 700.0, 600.0)  # 1 at 900 and 3 at 700: 4 at 600
    tensor([1.])
    """

    def __init__(self) -> None:
        self._older: tuple[float, Tensor] | None = None
        self._newer: tuple[float, Tensor] | None = None

    def __call__(
        self, x_s: Tensor, x_i: Tensor, z_s: Tensor, t_s: Any, t_i: Any, cond: Any = None
    ) -> Tensor:
        """Return (z_s - z_before) / (t_s - t_before) * (t_i - t_s), or zeros after one Dash step."""
        # Keep the last two estimates of this trajectory.
        then, now = first_number(t_s), first_number(t_i)
        newer = self._newer
        is_elsewhere = newer and (newer[1].shape, newer[1].device) != (z_s.shape, z_s.device)
        if newer is None or is_elsewhere or then > newer[0]:
            self._older, self._newer = None, (then, z_s)
        elif then < newer[0]:
            self._older, self._newer = newer, (then, z_s)

        # The line through them.
        if self._older is None:
            return z_s.new_zeros(z_s.shape)
        before, z_before = self._older
        return (z_s - z_before) * ((now - then) / (then - before))


def first_number(t: Any) -> float:
    """Return a time as a number; of a tensor the first entry, for all samples are at one time."""
    return float(t.flatten()[0]) if hasattr(t, "flatten") else float(t)


class MorseSampler:
    """Runs a plan without any host library.

    Args:
        dash_fn: ``(x, t) -> z``, the expensive estimate.
        dot_fn: See ``Dot``.
        phi: Sampler update ``(x, z, t, t_next) -> x``.

    >>> import torch
    >>> sampler = MorseSampler(lambda x, t: x, ZeroDot(), lambda x, z, t, t_next: x + (t_next - t) * z)
    >>> sampler(torch.tensor([1.0]), [1.0, 0.5, 0.0], MorsePlan.uniform(1, 1))
    tensor([0.])
    """

    def __init__(self, dash_fn: Dash, dot_fn: Dot, phi: Jump) -> None:
        self._dash, self._dot, self._phi = dash_fn, dot_fn, phi

    def __call__(self, x: Tensor, times: Sequence[float], plan: MorsePlan) -> Tensor:
        """Take ``x`` from ``times[0]`` to ``times[-1]``.

        Args:
            x: Start, usually Gaussian noise.
            times: ``plan.n_total + 1`` times, falling.
            plan: Which steps are Dash steps.

        Raises:
            PlanError: If the number of times does not fit the plan.
        """
        # One time more than steps: the end.
        if len(times) != plan.n_total + 1:
            raise PlanError(
                f"{len(times)} times for {plan.n_total} steps; give {plan.n_total + 1}, "
                "the end included"
            )

        # Eq. 4: z is the Dash's own estimate, or its last one plus the Dot's residual.
        dash = set(plan.dash_indices)
        state: tuple[Tensor, Tensor, float] | None = None
        for i, (t, t_next) in enumerate(itertools.pairwise(times)):
            if i in dash:
                z = self._dash(x, t)
                state = (x, z, t)
            elif state is None:
                raise StateError("a Dot step before any Dash step; begin the plan with index 0")
            else:
                x_s, z_s, t_s = state
                z = z_s + self._dot(x_s, x, z_s, t_s, t)
            x = self._phi(x, z, t, t_next)
        return x
