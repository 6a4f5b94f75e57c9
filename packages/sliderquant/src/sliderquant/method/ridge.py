"""The ridge regression that lets a layer make up for the errors of the layers before it.

Symbols: W [out, in] is the weight, X [n, in] its inputs in the quantized model, E [n, out] what its
output lacks, H = X^T X + d mean(diag(X^T X)) I with the damping d.

The update B = H^-1 X^T E of W^T is fitted to some of the calibration samples, and the others say how
much of it holds: with few tokens for many inputs, a regression fits their noise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sliderquant.method.parallel import gather_columns, own_columns, sum_over_processes

DAMPING = 0.01  # d, the share of the mean diagonal that is added to X^T X, as in GPTQ
PANEL_COLUMNS = 2048  # columns of an inverse that are solved for at a time


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Curvature:
    """H of one input, factorised once for every weight that reads it.

    Attributes:
        hessian: H, in the type in which weights are rounded.
        order: Columns in the order in which they are rounded: falling diag(H).
        cholesky: Lower Cholesky factor L of H with rows and columns in the reverse of that order,
            float64.
    """

    hessian: Float[Tensor, "in in"]
    order: Int[Tensor, " in"]
    cholesky: Float[Tensor, "in in"]

    def solve(self, right: Float[Tensor, "in out"]) -> Float[Tensor, "in out"]:
        """Return H^-1 times a matrix, float64."""
        reverse = self.order.flip(0)
        result = torch.empty_like(right)
        result[reverse] = torch.cholesky_solve(right[reverse], self.cholesky)
        return result

    def inverse_factor(self) -> Float[Tensor, "in in"]:
        """Return U, upper, with U^T U the inverse of H in the order of rounding, in its type.

        With J the reversal of rows, J H J = L L^T makes U = J L^-1 J.
        """
        size = len(self.order)
        result = torch.zeros_like(self.hessian)
        for begin in range(0, size, PANEL_COLUMNS):
            # Some columns of L^-1, which are zero above the diagonal; all of it would be another H.
            end = min(begin + PANEL_COLUMNS, size)
            unit = self.cholesky.new_zeros(size - begin, end - begin)
            unit.diagonal().fill_(1)
            lower = self.cholesky[begin:, begin:]
            panel = torch.linalg.solve_triangular(lower, unit, upper=False)
            result[: size - begin, size - end : size - begin] = panel.flip(0, 1)
        return result


def factorize(
    second_moment: Float[Tensor, "in in"], dtype: torch.dtype = torch.float32
) -> Curvature:
    """Return H = X^T X + d mean(diag(X^T X)) I with its Cholesky factor, d = ``DAMPING``.

    The damping bounds the update by inputs that are rarely active. An input that is never active gets
    d times the mean of all, so that H can be inverted. Moments that are not finite give NaN.

    Args:
        second_moment: X^T X, float64.
        dtype: Type in which weights are rounded.
    """
    # The most active input is rounded first: its error can be spread over all others.
    diagonal = second_moment.diagonal()
    damping = DAMPING * diagonal.mean()
    order = diagonal.argsort(descending=True)
    reverse = order.flip(0)

    # Not ``cholesky``, which waits for a GPU to tell whether it failed.
    reordered = second_moment[reverse.unsqueeze(1), reverse]
    reordered.diagonal().add_(damping)
    cholesky, _ = torch.linalg.cholesky_ex(reordered)

    hessian = second_moment.to(dtype, copy=True)
    hessian.diagonal().add_(damping)
    return Curvature(hessian=hessian, order=order, cholesky=cholesky)


def ridge_update(
    curvature: Curvature, cross_moment: Float[Tensor, "in out"]
) -> Float[Tensor, "in out"]:
    """Return H^-1 X^T E, the transposed update of the weight, in the type in which it is rounded.

    Several processes share the columns; all of them get the result.

    Args:
        curvature: H.
        cross_moment: X^T E, of all processes.
    """
    outputs = cross_moment.shape[1]
    part = curvature.solve(cross_moment[:, own_columns(outputs)])
    return gather_columns(part.to(curvature.hessian.dtype), outputs)


class HeldOutScore:
    """Finds the share of an update that lowers the error on held-out samples most.

    The squared error of s B there is s^2 |X B|^2 - 2 s <X B, E> and a constant: a parabola in s. The
    sums are taken over batches and processes.

    Args:
        update: B, float32, or what becomes B when it is multiplied with W^T.
        weight: W in the second case; then E is what comes in times W^T.
    """

    def __init__(
        self, update: Float[Tensor, "in k"], weight: Float[Tensor, "out k"] | None = None
    ) -> None:
        self._update = update
        self._gram = None if weight is None else weight.T @ weight
        # <X B, E> and |X B|^2.
        self._sums = update.new_zeros(2, dtype=torch.float64)

    def add(self, x: Float[Tensor, "n in"], lacking: Float[Tensor, "n k"]) -> None:
        """Add the tokens of a batch: X, and E before it is multiplied with W^T."""
        change = x @ self._update
        seen = change if self._gram is None else change @ self._gram
        products = torch.stack([(seen * lacking).sum(), (seen * change).sum()])
        self._sums += products

    def strength(self) -> Float[Tensor, ""]:
        """Return s, within 0 to 1; 0 if the update does the held-out samples no good."""
        benefit, cost = sum_over_processes(self._sums)
        return torch.where(cost > 0, benefit / cost, 0.0).clamp(0, 1)
