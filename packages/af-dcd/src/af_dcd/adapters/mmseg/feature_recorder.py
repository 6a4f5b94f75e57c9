"""Read a tapped feature map and the class scores of an mmseg model while it runs as usual."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from af_dcd.adapters.mmseg.shims import quiet
from af_dcd.method.taps import Tap, feature_map, record_outputs
from effml_common.errors import InputError

LARGEST_STRIDE_OF_PAPER = 8  # of the last stage, where the paper reads features


@dataclass
class FeatureRecord:
    """What one pass left behind.

    Attributes:
        tap: Which feature map is wanted.
        stages: The list of feature maps of the first ``extract_feat``.
        head_inputs: What entered the classifier, call by call.
        head_scores: What left it.
        module_outputs: What the tapped module returned, call by call.
    """

    tap: Tap
    stages: Any = None
    head_inputs: list[Tensor] = field(default_factory=list)
    head_scores: list[Tensor] = field(default_factory=list)
    module_outputs: list[Any] = field(default_factory=list)

    def feature(self) -> Tensor:
        """Give the tapped map [b, c, h, w].

        Raises:
            InputError: If the tap saw none.
        """
        if self.tap.kind == "feat":
            return feature_map(self.stages, self.tap, "the list of feature maps")
        recorded = self.head_inputs if self.tap.kind == "pre_cls" else self.module_outputs
        if not recorded:
            raise InputError(f"tap {self.tap} saw nothing; tap a module on the way to the scores")
        return feature_map(recorded[-1], self.tap, "pre_cls" if self.tap.kind == "pre_cls" else "")

    def scores(self) -> Tensor:
        """Give the class scores [b, k, h, w] before up-sampling."""
        return self.head_scores[-1]


@contextmanager
def record_features(model: Any, tap: Tap) -> Iterator[FeatureRecord]:
    """Record inside the block; the model is as before afterwards.

    Methods are wrapped, because ``loss()`` of a head calls its ``forward`` directly, past any hook.
    """
    record, head = FeatureRecord(tap), last_head(model)
    original_extract_feat, original_cls_seg = model.extract_feat, head.cls_seg

    def extract_feat(*args: Any, **kwargs: Any) -> Any:
        stages = original_extract_feat(*args, **kwargs)
        record.stages = stages if record.stages is None else record.stages
        return stages

    def cls_seg(features: Tensor) -> Tensor:
        record.head_inputs.append(features)
        record.head_scores.append(original_cls_seg(features))
        return record.head_scores[-1]

    # Attributes of the instance hide the class's methods until they are deleted.
    model.extract_feat, head.cls_seg = extract_feat, cls_seg
    try:
        with record_outputs(model, tap) as record.module_outputs:
            yield record
    finally:
        del model.extract_feat, head.cls_seg


def last_head(model: nn.Module) -> Any:
    """Find the head that makes the scores; the last one of a cascade.

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


def run_heads(model: Any, images: Tensor) -> Any:
    """Compute the class scores through all heads in turn, as at inference but before up-sampling."""
    features = model.extract_feat(images)
    head = model.decode_head
    if not isinstance(head, nn.ModuleList):
        return head(features)
    output = head[0](features)
    for refining_head in head[1:]:
        output = refining_head(features, output)
    return output


def tapped_shapes(
    model: nn.Module, tap: Tap, size: tuple[int, int]
) -> tuple[torch.Size, torch.Size]:
    """Find the shapes of the tapped map and the scores of two images, without computing anything."""
    meta_model = meta_copy(model)
    with torch.no_grad(), quiet(), record_features(meta_model, tap) as record:
        run_heads(meta_model, torch.zeros(2, 3, *size, device="meta"))
    return record.feature().shape, record.scores().shape


def meta_copy(model: nn.Module) -> Any:
    """Copy a model without its numbers, for meta tensors, in eval mode; its teacher stays behind."""
    duplicate: Any = copy.deepcopy(model)
    duplicate.__dict__.pop("teacher", None)  # shared with the model: it must not lose its weights
    return duplicate.to("meta").eval()


def default_tap(model: nn.Module, size: tuple[int, int]) -> str:
    """Choose ``feat:-1`` where the last stage keeps the paper's stride of 8, else ``pre_cls``."""
    shape, _ = tapped_shapes(model, Tap("feat", entry="-1"), size)
    stride = LARGEST_STRIDE_OF_PAPER
    return "feat:-1" if shape[2] * stride >= size[0] and shape[3] * stride >= size[1] else "pre_cls"
