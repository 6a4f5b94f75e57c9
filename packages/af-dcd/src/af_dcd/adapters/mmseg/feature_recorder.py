"""Read a tapped feature map and the class scores of an mmseg model while it runs as usual."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from af_dcd.adapters.mmseg.shims import quiet
from af_dcd.method.taps import Tap, as_map, recording
from effml_common.errors import InputError


@dataclass
class Seen:
    """What one pass left behind."""

    tap: Tap
    features: Any = None
    entering: list[Tensor] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)
    tapped: list[Any] = field(default_factory=list)

    def feature(self) -> Tensor:
        """The tapped map [b, c, h, w].

        Raises:
            InputError: If the tap saw none.
        """
        if self.tap.kind == "feat":
            return as_map(self.features, self.tap, "the list of feature maps")
        seen = self.entering if self.tap.kind == "pre_cls" else self.tapped
        if not seen:
            raise InputError(f"tap {self.tap} saw nothing; tap a module on the way to the scores")
        return as_map(seen[-1], self.tap, "pre_cls" if self.tap.kind == "pre_cls" else "")

    def scores(self) -> Tensor:
        """Class scores before up-sampling."""
        return self.leaving[-1]


def last_head(model: nn.Module) -> Any:
    """The head that makes the scores; the last one of a cascade.

    Raises:
        InputError: If it has no ``cls_seg``, as heads of mask classification.
    """
    head: Any = model.decode_head
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    if not hasattr(head, "cls_seg"):
        raise InputError(
            f"{type(head).__name__} does not classify pixels with cls_seg; "
            "use a per-pixel head (not MaskFormer, Mask2Former or SAN)"
        )
    return head


@contextmanager
def watching(model: Any, tap: Tap) -> Iterator[Seen]:
    """Record inside the block; the model is as before afterwards.

    Methods are wrapped, because ``loss()`` of a head calls its ``forward`` directly, past any hook.
    """
    seen, head = Seen(tap), last_head(model)
    extract, classify = model.extract_feat, head.cls_seg

    def extract_feat(*args: Any, **kwargs: Any) -> Any:
        found = extract(*args, **kwargs)
        seen.features = found if seen.features is None else seen.features
        return found

    def cls_seg(features: Tensor) -> Tensor:
        seen.entering.append(features)
        seen.leaving.append(classify(features))
        return seen.leaving[-1]

    model.extract_feat, head.cls_seg = extract_feat, cls_seg
    try:
        with recording(model, tap) as seen.tapped:
            yield seen
    finally:
        del model.extract_feat, head.cls_seg


def forward(model: Any, images: Tensor) -> Any:
    """Class scores of all heads in turn, as at inference but before up-sampling."""
    features = model.extract_feat(images)
    head = model.decode_head
    if not isinstance(head, nn.ModuleList):
        return head(features)
    output = head[0](features)
    for each in head[1:]:
        output = each(features, output)
    return output


def shapes(model: nn.Module, tap: Tap, size: tuple[int, int]) -> tuple[torch.Size, torch.Size]:
    """Shapes of the tapped map and the scores of two images, without computing anything."""
    ghost = ghost_of(model)
    with torch.no_grad(), quiet(), watching(ghost, tap) as seen:
        forward(ghost, torch.zeros(2, 3, *size, device="meta"))
    return seen.feature().shape, seen.scores().shape


def ghost_of(model: nn.Module) -> Any:
    """A copy in eval mode without numbers, which runs on meta tensors; its teacher stays behind."""
    ghost: Any = copy.deepcopy(model)
    ghost.__dict__.pop("teacher", None)  # shared with the model: it must not lose its weights
    return ghost.to("meta").eval()


def default_tap(model: nn.Module, size: tuple[int, int]) -> str:
    """``feat:-1`` where the last stage keeps stride 8 or less, as in the paper; else ``pre_cls``."""
    shape, _ = shapes(model, Tap("feat", entry="-1"), size)
    return "feat:-1" if shape[2] * 8 >= size[0] and shape[3] * 8 >= size[1] else "pre_cls"
