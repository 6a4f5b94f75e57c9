"""The result of a run: the plain student's weights, as mmsegmentation loads them."""

import io
from pathlib import Path
from typing import Any

import torch

from effml_common.files import atomic_write
from effml_common.logging import rank


def write_student(weights: dict[str, Any], metainfo: dict[str, Any], path: Path) -> None:
    """Write the weights that are the student's own, without the branch, atomically, on rank 0.

    Args:
        weights: State dict of a distilling segmenter.
        metainfo: Of the data set; classes and palette are kept.
        path: A .pth file that mmseg reads, ``{"state_dict", "meta"}``.
    """
    if rank() > 0:
        return
    student = {k: v.detach().cpu() for k, v in weights.items() if not k.startswith("afdcd.")}
    meta = {k: metainfo[k] for k in ("classes", "palette") if k in metainfo}
    buffer = io.BytesIO()
    torch.save({"state_dict": student, "meta": {"dataset_meta": meta} if meta else {}}, buffer)
    atomic_write(path, buffer.getvalue())
