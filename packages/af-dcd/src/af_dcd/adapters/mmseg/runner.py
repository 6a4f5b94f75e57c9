"""mmengine's Runner, built and run so that what goes wrong is one line."""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import mmengine.device.utils
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from af_dcd.adapters.mmseg.checkpoints import load_weights
from af_dcd.adapters.mmseg.config_builder import TrainingPlan
from af_dcd.adapters.mmseg.shims import quiet
from af_dcd.adapters.mmseg.training_loop import unwrap_model
from effml_common.errors import ConfigError, InputError, NonFiniteError
from effml_common.parsing import one_line


@dataclass(frozen=True)
class TrainedStudent:
    """What a finished run has found.

    Attributes:
        weights: State dict of the model, averaged if the config averages; the branch is in it.
        metainfo: Classes and palette of the data set.
        metrics: Of the last validation.
        iterations: Finished ones.
        notes: Sentences for the report.
    """

    weights: dict[str, Any]
    metainfo: dict[str, Any]
    metrics: dict[str, float]
    iterations: int
    notes: tuple[str, ...]


def prepare_run(plan: TrainingPlan, out: Path, student_init: str | None) -> Runner:
    """Create the out folder and build everything that the plan names.

    Args:
        plan: What to build.
        out: Folder of the run; it is removed again if it is new and building fails.
        student_init: Weights that the student starts from.

    Raises:
        ConfigError: If the folder cannot be created.
        InputError: If something cannot be built: a module, a file of the data, the weights.
    """
    # mmengine opens its log before it looks at the models.
    is_new = not out.exists()
    try:
        (out / "run").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be made: {error.strerror}; choose another --out"
        ) from error
    try:
        if plan.config.launcher == "pytorch" and plan.device.type != "cuda":
            _join_gloo_group()
        runner = build_runner(plan.config, plan.device)
    except InputError:
        if is_new:
            shutil.rmtree(out, ignore_errors=True)
        raise

    if student_init is not None:
        _start_from(runner, student_init)
    return runner


def _join_gloo_group() -> None:
    """Connect processes on CPUs: mmengine's launcher asks for a GPU, so this comes before it."""
    import torch.distributed as dist

    if "RANK" not in os.environ:
        raise InputError("launcher pytorch without torchrun; start it as torchrun ... or drop it")
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def build_runner(config: Config, device: torch.device) -> Runner:
    """Build a Runner and everything that a config names, on a device.

    Its name must be its own, see ``name_experiment``.

    Raises:
        InputError: If something cannot be built.
    """
    use_device(device)
    try:
        with quiet():
            runner = TerseRunner.from_cfg(config)
    except InputError:
        raise
    except Exception as error:  # registries wrap any error of a constructor
        raise _own_error(error) or mmseg_refusal(error) from error
    _set_console_level(runner.logger, logging.INFO)
    return runner


class TerseRunner(Runner):
    """Lists the machine, the config and the hooks in its log file, not on the console."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build the logger, with its console muted until everything is built."""
        logger = super().build_logger(*args, **kwargs)
        _set_console_level(logger, logging.WARNING)
        return logger


def _set_console_level(logger: MMLogger, level: int) -> None:
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(level)


def use_device(device: torch.device) -> None:
    """Make mmengine compute on a device: its Runner takes the first accelerator that is there.

    mmengine asks ``get_device()`` for the kind ("cuda") wherever it moves a model or opens an autocast
    region, and torch's current device has the index; ``resolve_device`` has set that.

    Raises:
        InputError: If this mmengine decides in another way.
    """
    mmengine.device.utils.DEVICE = device.type
    # A newer mmengine may decide elsewhere: then another device must not be taken without a word.
    if mmengine.device.get_device() != device.type:
        raise InputError(
            f"this mmengine computes on {mmengine.device.get_device()} alone, not on {device}; "
            "leave --device at auto, or use mmengine 0.10"
        )


def _start_from(runner: Runner, path: str) -> None:
    """Load the student's first weights; surplus ones, of another head, are not allowed."""
    model = unwrap_model(runner.model)
    load_weights(model, path)
    # Otherwise Runner.train would initialise the weights anew.
    model._is_init = True
    for module in model.modules():
        if hasattr(module, "_is_init"):
            module._is_init = True


def run_training(runner: Runner, device: torch.device) -> TrainedStudent:
    """Run the loop to its end and collect what it found.

    Raises:
        InputError: If the data cannot be read or a pretrained backbone cannot be fetched.
        NonFiniteError: If a loss or a gradient becomes NaN or infinite.
        Interrupted: If a signal stopped it; everything is saved.
    """
    try:
        with quiet():
            runner.train()
    except (InputError, NonFiniteError):
        raise
    except Exception as error:
        if refusal := _explain_training_error(error):
            raise refusal from error
        raise

    # The hook puts averaged weights in the place of the last ones, where the config averages.
    model = unwrap_model(runner.model)
    content: dict[str, Any] = {"state_dict": dict(model.state_dict())}
    runner.call_hook("before_save_checkpoint", checkpoint=content)
    loop: Any = runner.train_loop
    metainfo = getattr(loop.dataloader.dataset, "metainfo", {})
    notes = _describe_run(model, device)
    return TrainedStudent(content["state_dict"], metainfo, loop.metrics, loop.iter, notes)


def _explain_training_error(error: Exception) -> Exception | None:
    """Find the error of ours, or say what the user can do; None for a fault of the program."""
    if isinstance(error, URLError):
        return InputError(
            f"the pretrained backbone cannot be fetched ({error.reason}); give --student-init FILE, "
            "or --no-pretrained"
        )
    expected = (FileNotFoundError, KeyError, AssertionError, ValueError, RuntimeError, TypeError)
    if not isinstance(error, expected):
        return None
    if own := _own_error(error):
        return own

    # torch's two wordings of batch normalisation over a single value.
    text = str(error)
    if ("size" in text and "1 value per channel" in text) or "more than 1 value" in text:
        return InputError(
            "batch normalisation over a pooled map of one image has nothing to average; "
            "use a batch size of 2 or more (mmseg's image pooling in ASPP and PSP needs it)"
        )
    return mmseg_refusal(error) if isinstance(error, FileNotFoundError | AssertionError) else None


def mmseg_refusal(error: Exception) -> InputError:
    """Say in one line what mmengine says about a config or data set that it cannot build."""
    return InputError(f"mmseg refuses this: {one_line(str(error))[:400]}; see the config")


def _own_error(error: BaseException | None) -> Exception | None:
    """Find an error of ours inside what a registry or a worker wrapped around it."""
    while error is not None:
        if isinstance(error, InputError | NonFiniteError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _describe_run(model: Any, device: torch.device) -> tuple[str, ...]:
    """Describe taps, weights of the terms, teacher and memory, for the report."""
    config = model.distill
    notes = [
        f"student map {model.tapped_shapes['student']}, teacher map {model.tapped_shapes['teacher']}",
        f"weights kd {config.lambda_kd}, fd {config.lambda_fd} ({config.fd_reduction}), "
        f"ctr {config.lambda_ctr}",
        f"teacher sha256 {model.teacher.sha256}",
    ]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        notes.append(f"peak CUDA memory {peak / 2**30:.2f} GiB")
    return tuple(notes)
