"""What a stage needs before it can be trained."""

import pytest
from com_pt_tiny import clip_chain

from com_pt.training.chain import parse_chain
from com_pt.training.run import run_chain
from effml_common.errors import ConfigError


def test_a_batch_that_does_not_split_into_micro_batches_is_refused(pictures, tmp_path) -> None:
    with pytest.raises(ConfigError, match="a batch of 8 does not split into 1 processes times 3"):
        run_chain(parse_chain(clip_chain(pictures, 32, accum_freq=3)), tmp_path / "out")
