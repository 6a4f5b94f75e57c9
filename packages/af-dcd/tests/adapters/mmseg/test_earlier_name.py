"""Configs that name the integration as it was called before, ``af_dcd.mm``."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("mmseg")

from af_dcd.cli import COMMANDS
from effml_common.cli import main

DISTILLING = """
_base_ = [{base!r}]
custom_imports = dict(imports=["af_dcd.mm"], allow_failed_imports=False)
model = dict(
    type="AfDCDEncoderDecoder",
    teacher=dict(config={teacher!r}, checkpoint={weights!r}),
    distill=dict(preset="cityscapes", groups=4, pool=1))
optim_wrapper = dict(type="AfDCDOptimWrapper", branch_clip=dict(max_norm=15))
"""


@pytest.fixture
def earlier_config(pair, tmp_path):
    path = tmp_path / "distilling.py"
    names = {"base": str(pair.student), "teacher": str(pair.teacher), "weights": str(pair.weights)}
    path.write_text(DISTILLING.format(**names))
    return path


@pytest.mark.slow
def test_a_config_that_imports_the_earlier_name_trains(earlier_config, tmp_path) -> None:
    words = ["train", "--student", str(earlier_config), "--iters", "1", "--quiet"]
    assert main("af-dcd", "af-dcd", COMMANDS, [*words, "--out", str(tmp_path / "run")]) == 0
    line = json.loads((tmp_path / "run/run/metrics.jsonl").read_text())
    assert {"loss_kd", "loss_fd", "loss_ctr"} <= set(line)
    assert (tmp_path / "run/student.pth").is_file()


@pytest.mark.slow
def test_the_earlier_modules_register_what_they_did() -> None:
    code = (
        "import af_dcd.mm, af_dcd.mm.datasets, af_dcd.mm.loop, af_dcd.mm.models, af_dcd.mm.optim\n"
        "from mmengine.registry import LOOPS, OPTIM_WRAPPERS\n"
        "from mmseg.registry import DATASETS, MODELS\n"
        "assert MODELS.get('AfDCDEncoderDecoder') is af_dcd.mm.models.AfDCDEncoderDecoder\n"
        "assert MODELS.get('AfDCDCascadeEncoderDecoder')\n"
        "assert LOOPS.get('AfDCDTrainLoop') is af_dcd.mm.loop.AfDCDTrainLoop\n"
        "assert OPTIM_WRAPPERS.get('AfDCDOptimWrapper') is af_dcd.mm.optim.AfDCDOptimWrapper\n"
        "assert OPTIM_WRAPPERS.get('AfDCDAmpOptimWrapper')\n"
        "assert DATASETS.get('CamVidDataset') is af_dcd.mm.datasets.CamVidDataset\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
