"""Labelled images."""

import pytest

from effml_common.errors import InputError


def test_labels_that_are_no_classes_are_refused(pictures) -> None:
    from com_pt.training.tasks.classify import ClassifyTask

    (pictures / "labels.csv").write_text("path,label\n0.png,0\n1.png,7\n")
    with pytest.raises(InputError, match="line 3: the label '7' is no number below 3"):
        len(ClassifyTask({"train": str(pictures / "labels.csv"), "classes": 3}))
