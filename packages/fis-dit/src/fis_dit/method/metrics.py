"""How far a clip is from the dense model's, and a set of clips from the data."""

import torch
from jaxtyping import Float
from torch import Tensor


def psnr(clip: Float[Tensor, "b c f h w"], dense: Float[Tensor, "b c f h w"], peak: float) -> float:
    """Compute the peak signal-to-noise ratio in dB over all clips; higher is nearer.

    Args:
        clip: Clips to judge.
        dense: The dense model's clips of the same noise.
        peak: Largest difference between two values.

    >>> dense = torch.zeros(1, 1, 3, 2, 2)
    >>> round(psnr(dense + 0.1, dense, peak=1.0), 3)
    20.0
    """
    error = (clip.double() - dense.double()).square().mean()
    return float(10 * torch.log10(peak**2 / error)) if error > 0 else float("inf")


def relative_l2(value: Tensor, reference: Tensor) -> float:
    """Compute ||value - reference|| / ||reference||."""
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


def motion_error(clip: Float[Tensor, "b c f h w"], dense: Float[Tensor, "b c f h w"]) -> float:
    """Compute the relative L2 error of differences between frames: flicker and lost motion."""
    return relative_l2(clip.diff(dim=2), dense.diff(dim=2))


def coverage(clip: Float[Tensor, "b c f h w"], dense: Float[Tensor, "b c f h w"]) -> float:
    """Divide the largest mean squared error of a frame position by the smallest; 1 is even."""
    errors = (clip.double() - dense.double()).square().mean((0, 1, 3, 4))
    return float(errors.max() / errors.min().clamp_min(1e-20))


def flicker(clip: Float[Tensor, "b c f h w"], real: Float[Tensor, "n c f h w"]) -> float:
    """Divide the energy of second differences over time by that of real clips; 1 is as smooth."""
    energy, real_energy = (x.double().diff(n=2, dim=2).square().mean() for x in (clip, real))
    return float(energy / real_energy)


def slowest_quarter(dense: Float[Tensor, "b c f h w"]) -> Tensor:
    """Return the indices of the quarter of clips that move least, at least one."""
    motion = dense.diff(dim=2).square().mean((1, 2, 3, 4))
    return motion.argsort()[: max(1, len(dense) // 4)]


def frechet_distance(features: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]) -> float:
    """Compute the squared Frechet distance between Gaussians fitted to two sets of features."""
    (mean, cov), (ref_mean, ref_cov) = _fit_gaussian(features), _fit_gaussian(reference)
    # The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    root = _square_root(cov)
    cross = torch.linalg.eigvalsh(root @ ref_cov @ root).clamp_min(0).sqrt().sum()
    distance = (mean - ref_mean).square().sum() + cov.trace() + ref_cov.trace() - 2 * cross
    return float(distance.clamp_min(0))


def _fit_gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    values = features.double()
    return values.mean(0), torch.cov(values.T)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
