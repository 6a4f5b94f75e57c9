"""CamVid, which mmsegmentation 1.2 lacks."""

from pathlib import Path
from typing import Any

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """The 11 classes of CamVid in SegNet's copy of it: images in ``train``, labels in ``trainannot``.

    Labels 0 to 10 are classes, 11 (unlabelled) is ignored. ``ann_file`` may be a list of image and
    label paths, one pair a line, instead of the folders.
    """

    METAINFO = {  # noqa: RUF012 -- mmengine's form
        "classes": (
            "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car",
            "pedestrian", "bicyclist",
        ),
        "palette": [
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222],
            [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
        ],
    }  # fmt: skip

    def __init__(
        self, img_suffix: str = ".png", seg_map_suffix: str = ".png", **kwargs: Any
    ) -> None:
        super().__init__(
            img_suffix=img_suffix,
            seg_map_suffix=seg_map_suffix,
            reduce_zero_label=False,
            **kwargs,
        )

    @classmethod
    def get_label_map(cls, new_classes: Any = None) -> dict[int, int]:
        """Map old labels to new: what a choice of classes asks for, and 11 to what is ignored."""
        return {**(super().get_label_map(new_classes) or {}), 11: 255}

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the pairs of the list file, or of the two folders."""
        # A list of names alone is mmseg's own form.
        if not self.ann_file:
            return super().load_data_list()
        root, list_file = Path(self.data_root or ""), Path(self.ann_file)
        lines = (list_file if list_file.is_file() else root / list_file).read_text().splitlines()
        pairs = [line.split() for line in lines if line.strip()]
        if any(len(pair) != 2 for pair in pairs):
            return super().load_data_list()

        # Two paths a line, in the form that mmseg's transforms expect.
        common = {"label_map": self.label_map, "reduce_zero_label": False}
        return [
            {
                "img_path": str(root / image),
                "seg_map_path": str(root / labels),
                **common,
                "seg_fields": [],
            }
            for image, labels in pairs
        ]
