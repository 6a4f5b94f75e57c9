"""Plans: the published costs, and chains that cannot be trained."""

import pytest
from com_pt_tiny import clip_chain, llama_settings

from com_pt.errors import ChainOrderError
from com_pt.training.chain import load_chain, parse_chain
from com_pt.training.plan import plan_chain
from com_pt.training.run import run_chain
from com_pt.training.tasks.clip import ClipTask
from effml_common.errors import InputError


def test_a_chain_that_does_not_ascend_is_refused(pictures, tmp_path) -> None:
    with pytest.raises(ChainOrderError, match=r"W32 has .* fewer than W64 with"):
        run_chain(parse_chain(clip_chain(pictures, 64, 32)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_data_is_an_error_and_never_a_synthetic_set(tmp_path) -> None:
    with pytest.raises(InputError, match="no train data are given; name a CSV, TSV or tar"):
        len(ClipTask({}))
    document = {"task": "classify", "stages": [{"name": "A", "model": "vit_tiny_patch16_224"}]}
    with pytest.raises(InputError, match="no train data are given; name a CSV"):
        run_chain(parse_chain(document), tmp_path / "out")
    pytest.importorskip("transformers")
    document = {"task": "causal-lm", "stages": [{"name": "A", "model": llama_settings()}]}
    with pytest.raises(InputError, match="no train data are given; name text files"):
        run_chain(parse_chain(document), tmp_path / "out2")


def test_the_plan_of_four_members_is_5_70_times_cheaper_and_27_5_percent_of_the_largest() -> None:
    plan = plan_chain(load_chain("cc3m-vit-tsbl"))
    assert f"{plan.ratio:.2f}x, {100 * plan.share_of_largest:.1f} %" == "5.70x, 27.5 %"
    assert [stage.forward for stage in plan.stages] == [
        pytest.approx(gmac * 1e9, rel=1e-3) for gmac in (6.60, 16.43, 38.42, 108.10)
    ]


def test_training_is_three_forward_passes_and_one_of_the_predecessor() -> None:
    stages = plan_chain(load_chain("cc3m-vit-tsbl")).stages
    assert stages[0].per_sample == 3 * stages[0].forward
    assert stages[2].per_sample == 3 * stages[2].forward + stages[1].forward
