"""mmseg's test loop."""

from pathlib import Path

import torch

from af_dcd.adapters.mmseg.checkpoints import load_weights, read_config
from af_dcd.adapters.mmseg.config_builder import one_error_line
from af_dcd.adapters.mmseg.runner import build, without_sync_bn
from af_dcd.adapters.mmseg.shims import quiet
from af_dcd.adapters.mmseg.teacher import plain, without_downloads
from af_dcd.config import EvalConfig, options
from effml_common.errors import InputError


def test(config: EvalConfig, run_dir: Path, device: torch.device) -> dict[str, float]:
    """Metrics of the config's test evaluator, computed on a device.

    Raises:
        InputError: If config, checkpoint and data do not fit together.
    """
    whole = read_config(config.model)
    whole.merge_from_dict(options(config.cfg_options))
    if whole.get("test_dataloader") is None or whole.get("test_evaluator") is None:
        raise InputError(f"{config.model} names no test data; add test_dataloader and evaluator")
    whole.model = without_downloads(plain(whole.model))
    without_sync_bn(whole.model)
    whole.work_dir, whole.load_from = str(run_dir / "mmengine"), None
    for name in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
        whole[name] = None
    runner = build(whole, device)
    load_weights(runner.model, config.checkpoint)
    try:
        with quiet():
            found = runner.test()
    except (FileNotFoundError, AssertionError) as error:
        raise one_error_line(error) from error
    return {name: float(value) for name, value in found.items()}
