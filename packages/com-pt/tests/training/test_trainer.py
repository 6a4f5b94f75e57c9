"""The trainer's watch over fp16."""

from types import SimpleNamespace

import pytest
from com_pt_tiny import clip, clip_chain, task_of

from com_pt.adapters.accelerator import make_accelerator
from com_pt.training.chain import parse_chain
from com_pt.training.prepare import prepare_stage
from com_pt.training.trainer import StageTrainer
from effml_common.errors import NonFiniteError


def test_fp16_that_skips_three_updates_in_a_row_stops(pictures, tmp_path) -> None:
    """The scaler of a GPU run is played by its one flag, and a good update resets it."""
    chain = parse_chain(clip_chain(pictures, 32))
    task = task_of(pictures)
    accelerator = make_accelerator("fp32")
    trainer = StageTrainer(
        prepare_stage(task, chain, chain.stages[0], clip(32), None, 1, accelerator)
    )
    trainer.accelerator = SimpleNamespace(scaler=object(), optimizer_step_was_skipped=True)
    for step in (1, 2):
        trainer._count_skips(step, tmp_path)
    trainer.accelerator.optimizer_step_was_skipped = False
    trainer._count_skips(3, tmp_path)
    trainer.accelerator.optimizer_step_was_skipped = True
    for step in (4, 5):
        trainer._count_skips(step, tmp_path)
    with pytest.raises(NonFiniteError, match="fp16 skipped 3 updates in a row at step 6"):
        trainer._count_skips(6, tmp_path)
    assert trainer.skipped == 5
