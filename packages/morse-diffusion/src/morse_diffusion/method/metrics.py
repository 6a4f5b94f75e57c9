"""How good samples are, and what a speed-up is (section 4 of the Morse paper)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effml_common.errors import ConfigError

QUANTILES = 200  # of each projection that distances are taken between


@dataclass(frozen=True)
class Reference:
    """Real images in the directions in which they vary most.

    Attributes:
        mean: Mean image, float64 [p].
        directions: Principal directions, float64 [p, d].
        features: The images in them, float64 [n, d].

    >>> images = torch.rand((80, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    >>> reference = Reference.of(images, dimensions=2)
    >>> abs(reference.measure(images)["fd"]) < 1e-9
    True
    """

    mean: Tensor
    directions: Tensor
    features: Tensor

    @staticmethod
    def of(images: Tensor, dimensions: int = 20) -> "Reference":
        """Find the principal directions of real images.

        Args:
            images: [n, ...].
            dimensions: Number of directions, capped at the size of an image.

        Raises:
            ConfigError: If there are fewer than two images per dimension: no covariance then.
        """
        flat = images.flatten(1).double()
        dimensions = min(dimensions, flat.shape[1])
        if len(flat) < 2 * dimensions:
            raise ConfigError(
                f"{len(flat)} reference images for {dimensions} dimensions; "
                f"give at least {2 * dimensions}"
            )
        mean = flat.mean(0)
        directions = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:dimensions].T
        return Reference(mean, directions, (flat - mean) @ directions)

    def project(self, images: Tensor) -> Tensor:
        """Return images [n, ...] in these directions, float64 [n, d]."""
        return (images.flatten(1).double() - self.mean) @ self.directions

    def measure(self, images: Tensor) -> dict[str, float]:
        """Return Frechet (``fd``) and sliced Wasserstein distance (``sw``) to the real images."""
        features = self.project(images)
        return {
            "fd": frechet_distance(features, self.features),
            "sw": sliced_wasserstein(features, self.features),
        }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of two feature sets, float64 [n, d]."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), so they are real and not negative.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return float(gap + cov_a.trace() + cov_b.trace() - 2 * cross)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256) -> float:
    """Return the mean distance between quantiles along random directions.

    Args:
        a: Features, float64 [n, d].
        b: Features, float64 [m, d].
        directions: Number of random directions; the same ones at every call.
    """
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn((a.shape[1], directions), generator=generator, dtype=a.dtype)
    axes = axes / axes.norm(dim=0)
    levels = (torch.arange(QUANTILES, dtype=a.dtype) + 0.5) / QUANTILES
    quantiles = [torch.quantile(x @ axes, levels, dim=0) for x in (a, b)]
    return float((quantiles[0] - quantiles[1]).abs().mean())


def speed_up(
    budget: float, metric: float, budgets: Sequence[float], curve: Sequence[float]
) -> float | None:
    """Return how much longer the baseline takes to reach ``metric``, lower being better.

    Args:
        budget: Time spent.
        metric: What it bought.
        budgets: Times of the baseline, ascending.
        curve: Its metrics there; linear in between.

    Returns:
        n / budget with n where the curve first comes down to ``metric``; None where the baseline never
        does, or starts below it, so that no number can be read off.
    """
    points = list(zip(budgets, curve, strict=True))
    if metric > points[0][1]:
        return None
    for (t0, m0), (t1, m1) in itertools.pairwise(points):
        if m1 <= metric <= m0:
            n = t0 if m0 == m1 else t0 + (t1 - t0) * (m0 - metric) / (m0 - m1)
            return n / budget
    return None
