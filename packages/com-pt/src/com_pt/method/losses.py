"""Feature-space reuse and the contrastive loss of several captions.

Shapes: b images, k captions of each, d embedding channels.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, distributed, nn

from com_pt.method.contrastive import contrastive_loss
from effml_common.errors import ConfigError, InputError


def weight_from_alpha(alpha: float, dim: int) -> float:
    """Return the dimension-free weight 2 alpha / D of the released alpha (1.953 for 500 and 512)."""
    return 2 * alpha / dim


def feature_distance(
    student: Float[Tensor, "... d"], teacher: Float[Tensor, "... d"]
) -> Float[Tensor, ""]:
    """Return 1 - cosine, averaged: half the squared distance of unit vectors.

    It is computed in float32, whatever comes in. The gradient flows to ``student`` only.

    Raises:
        InputError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"features {tuple(student.shape)} and {tuple(teacher.shape)} differ; project the larger "
            "model's to the smaller one's width, and give both the same batch"
        )
    return (1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)).mean()


class InverseFeatureLoss(nn.Module):
    """The distance of the successor's features from the predecessor's over all streams, times lambda.

    With lambda = 2 alpha / D this is the released alpha * MSE of unit vectors, image and text summed.

    Args:
        dims: For each stream the widths (successor, predecessor); a linear map is made where they
            differ.
        weight: lambda, dimensionless.
        reduction: ``sum`` (released code) or ``mean`` (paper) over streams.
        cap: ``off``; ``warn`` lets the trainer warn; ``scale`` multiplies by min(1, task / this).
        projector: Whether such a map may be made.

    Raises:
        ConfigError: If widths differ and ``projector`` is off.

    Example:
        >>> loss = InverseFeatureLoss({"image": (2, 2)}, weight=3.0)
        >>> features = {"image": torch.tensor([[1.0, 0.0]])}
        >>> float(loss(features, {"image": torch.tensor([[0.0, 1.0]])}))
        3.0
    """

    def __init__(
        self,
        dims: Mapping[str, tuple[int, int]],
        weight: float = 1.953,
        reduction: Literal["sum", "mean"] = "sum",
        cap: Literal["off", "warn", "scale"] = "off",
        projector: bool = True,
    ) -> None:
        super().__init__()
        differing = {name: pair for name, pair in dims.items() if pair[0] != pair[1]}
        if differing and not projector:
            raise ConfigError(
                f"feature widths differ: {differing}; set projector: true, or use equal widths"
            )
        self.projectors = nn.ModuleDict(
            {name: nn.Linear(s, t, bias=False) for name, (s, t) in differing.items()}
        )
        self.weight, self.reduction, self.cap = weight, reduction, cap

    def project(self, stream: str, features: Tensor) -> Tensor:
        """Return T(F): the successor's features in the predecessor's width."""
        return self.projectors[stream](features) if stream in self.projectors else features

    def forward(
        self,
        projected: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        task_loss: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss.

        Args:
            projected: The successor's features by stream, in the predecessor's widths.
            teacher: The predecessor's features by stream; they get no gradient.
            task_loss: Needed for ``cap="scale"`` only; it gets no gradient.
        """
        distances = [feature_distance(projected[name], teacher[name]) for name in teacher]
        total = torch.stack(distances).sum() / (len(distances) if self.reduction == "mean" else 1)
        loss = self.weight * total
        if self.cap == "scale" and task_loss is not None:
            # Both of the whole batch, so that any number of processes scales alike.
            task, feature = _mean_over_processes(torch.stack([task_loss.detach(), loss.detach()]))
            loss = loss * (task / feature.clamp(min=1e-12)).clamp(max=1)
        return loss


def multi_caption_clip_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b k d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Tensor | None = None,
    *,
    local_loss: bool = False,
    gather_with_grad: bool = True,
) -> Float[Tensor, ""]:
    """Return the symmetric cross-entropy of each caption set in turn, averaged over the k sets.

    Negatives of the k-th caption are the k-th captions of other images, over all processes. The two
    settings are open_clip's; with ``gather_with_grad`` any number of processes has the gradient of one.

    Args:
        image: Unit vectors.
        text: Unit vectors.
        logit_scale: Already exponentiated.
        logit_bias: Added to every logit.
        local_loss: Each process computes the loss of its own images and texts against those of all, so
            that the work is divided among them; its mean over processes is the loss of all.
        gather_with_grad: Let the gradient flow to the processes that the features came from.

    Raises:
        InputError: If texts and images do not pair up.
    """
    if text.dim() != 3 or text.shape[0] != image.shape[0]:
        raise InputError(
            f"{tuple(text.shape)} texts for {tuple(image.shape)} images; give every image the same "
            "number of captions"
        )

    # Every process sees the features of all, so that negatives come from the whole batch.
    image, text, scale = (_at_least_float32(t) for t in (image, text, logit_scale))
    bias = None if logit_bias is None else logit_bias.to(scale.dtype)
    keep_own = not local_loss
    images = gather_features(image, with_grad=gather_with_grad, keep_own=keep_own)
    texts = gather_features(text, with_grad=gather_with_grad, keep_own=keep_own)

    # One caption set after the other, image to text and text to image.
    losses = []
    for k in range(text.shape[1]):
        if not local_loss:
            losses.append(contrastive_loss(images, texts[:, k], scale, bias))
            continue
        offset = len(image) * _rank()
        pairs = ((image, texts[:, k]), (text[:, k], images))
        sides = [
            contrastive_loss(own, all_, scale, bias, offset=offset, symmetric=False)
            for own, all_ in pairs
        ]
        losses.append((sides[0] + sides[1]) / 2)
    return torch.stack(losses).mean()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def gather_features(features: Tensor, *, with_grad: bool = True, keep_own: bool = True) -> Tensor:
    """Return the features of all processes, in their order.

    Args:
        features: Of this process; as many on every one.
        with_grad: Let the gradient flow to the process that each came from.
        keep_own: Without that, let it flow to those of this process.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return features
    if distributed.get_world_size() == 1:
        return features
    features = features.contiguous()
    if with_grad:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(list(all_gather(features)))
    parts = [torch.empty_like(features) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, features.detach())
    if keep_own:
        parts[_rank()] = features
    return torch.cat(parts)


def _mean_over_processes(values: Tensor) -> Tensor:
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    distributed.all_reduce(values)
    return values / distributed.get_world_size()


def _rank() -> int:
    is_alone = not (distributed.is_available() and distributed.is_initialized())
    return 0 if is_alone else distributed.get_rank()
