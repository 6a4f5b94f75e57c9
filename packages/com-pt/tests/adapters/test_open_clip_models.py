"""Settings of open_clip models."""

import pytest
from com_pt_tiny import spec

from com_pt.errors import GrowthError
from com_pt.training.tasks.clip import ClipTask


def test_a_width_that_is_no_multiple_of_its_heads_is_refused() -> None:
    with pytest.raises(GrowthError, match="image width 40 is no multiple of the head width 16"):
        ClipTask({}).build(spec(40, text=32))
