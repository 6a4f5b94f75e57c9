"""mmseg's test loop."""

from pathlib import Path

import torch

from af_dcd.adapters.mmseg.checkpoints import load_weights
from af_dcd.adapters.mmseg.config_builder import (
    name_experiment,
    plain_model,
    replace_sync_bn,
    without_downloads,
)
from af_dcd.adapters.mmseg.config_files import read_config
from af_dcd.adapters.mmseg.runner import build_runner, mmseg_refusal
from af_dcd.adapters.mmseg.shims import quiet
from af_dcd.config import EvalConfig, parse_options
from effml_common.errors import InputError


def run_test_loop(settings: EvalConfig, run_dir: Path, device: torch.device) -> dict[str, float]:
    """Compute the metrics of a config's test evaluator on a device.

    Raises:
        InputError: If config, checkpoint and data do not fit together.
    """
    # The plain student of the config; whatever only training needs is left out.
    changes = parse_options(settings.cfg_options)
    config = read_config(settings.model)
    config.merge_from_dict(changes)
    if config.get("test_dataloader") is None or config.get("test_evaluator") is None:
        raise InputError(f"{settings.model} names no test data; add test_dataloader and evaluator")
    config.model = without_downloads(plain_model(config.model))
    replace_sync_bn(config.model)
    config.work_dir, config.load_from = str(run_dir / "mmengine"), None
    for name in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
        config[name] = None
    name_experiment(config)

    # Its weights, and mmseg's own loop.
    runner = build_runner(config, device)
    load_weights(runner.model, settings.checkpoint)
    try:
        with quiet():
            metrics = runner.test()
    except (FileNotFoundError, AssertionError) as error:
        raise mmseg_refusal(error) from error
    return {name: float(value) for name, value in metrics.items()}
