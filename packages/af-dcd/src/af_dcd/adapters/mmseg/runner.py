"""mmengine's Runner, made and run so that what goes wrong is one line."""

import itertools
import logging
import os
from pathlib import Path
from typing import Any
from urllib.error import URLError

import mmengine.device.utils
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from af_dcd.adapters.mmseg.checkpoints import load_weights
from af_dcd.adapters.mmseg.config_builder import one_error_line
from af_dcd.adapters.mmseg.shims import quiet
from af_dcd.adapters.mmseg.training_loop import bare
from effml_common.errors import InputError, NonFiniteError
from effml_common.files import atomic_write
from effml_common.logging import rank

_RUNS = itertools.count()


def check_device(whole: Config, device: torch.device) -> None:
    """See that a device can do what a composed config asks for.

    Raises:
        InputError: If mixed precision or the launcher needs a card.
    """
    if "Amp" in whole.optim_wrapper.type and device.type != "cuda":
        raise InputError(f"amp needs a CUDA device, not {device}; leave --amp at no")
    if whole.launcher not in ("none", "pytorch") and device.type != "cuda":
        raise InputError(
            f"launcher {whole.launcher} needs a CUDA device, not {device}; use --launcher pytorch"
        )


def make_runner(whole: Config, device: torch.device) -> Runner:
    """Build everything that a config names, on a device.

    Raises:
        InputError: If something cannot be built: a module, a file of the data, a pretrained backbone.
    """
    if whole.launcher == "pytorch" and device.type != "cuda":
        _gloo(whole)
    if device.type != "cuda":
        # SyncBatchNorm runs on CUDA alone; one process on a CPU has nothing to synchronise.
        without_sync_bn(whole.model)
    return build(whole, device)


class TerseRunner(Runner):
    """Lists the machine, the config and the hooks in its log file, not on the console."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """The logger, with its console muted until everything is built."""
        logger = super().build_logger(*args, **kwargs)
        _console(logger, logging.WARNING)
        return logger


def _console(logger: MMLogger, level: int) -> None:
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(level)


def use_device(device: torch.device) -> None:
    """Make mmengine compute on a device: its Runner takes the first accelerator that is there.

    mmengine asks ``get_device()`` for the kind ("cuda") wherever it moves a model or opens an autocast
    region, and torch's current device has the index; ``resolve_device`` has set that.
    """
    mmengine.device.utils.DEVICE = device.type
    # A newer mmengine may decide elsewhere: then another device must not be taken without a word.
    if mmengine.device.get_device() != device.type:
        raise InputError(
            f"this mmengine computes on {mmengine.device.get_device()} alone, not on {device}; "
            "leave --device at auto, or use mmengine 0.10"
        )


def build(whole: Config, device: torch.device) -> Runner:
    """A Runner; see ``make_runner``."""
    use_device(device)
    # mmengine names a run by the second and shares loggers and visualizers by that name, so two
    # runs begun within a second in one process would write into the first one's folder.
    whole.setdefault("experiment_name", f"af-dcd-{os.getpid()}-{next(_RUNS)}")
    try:
        with quiet():
            runner = TerseRunner.from_cfg(whole)
    except InputError:
        raise
    except Exception as error:  # registries wrap any error of a constructor
        raise _ours(error) or one_error_line(error) from error
    _console(runner.logger, logging.INFO)
    return runner


def train(runner: Runner) -> None:
    """Run the loop.

    Raises:
        InputError: If the data cannot be read or a pretrained backbone cannot be fetched.
    """
    try:
        with quiet():
            runner.train()
    except (InputError, NonFiniteError):
        raise
    except URLError as error:
        raise InputError(
            f"the pretrained backbone cannot be fetched ({error.reason}); give --student-init FILE, "
            "or --no-pretrained"
        ) from error
    except (
        FileNotFoundError,
        KeyError,
        AssertionError,
        ValueError,
        RuntimeError,
        TypeError,
    ) as error:
        if ours := _ours(error):
            raise ours from error
        text = str(error)
        if ("size" in text and "1 value per channel" in text) or "more than 1 value" in text:
            raise InputError(
                "batch normalisation over a pooled map of one image has nothing to average; "
                "use a batch size of 2 or more (mmseg's image pooling in ASPP and PSP needs it)"
            ) from error
        if isinstance(error, FileNotFoundError | AssertionError):
            raise one_error_line(error) from error
        raise


def _ours(error: BaseException | None) -> Exception | None:
    """An error of ours inside what a registry or a worker wrapped around it."""
    while error is not None:
        if isinstance(error, InputError | NonFiniteError):
            return error
        error = error.__cause__ or error.__context__
    return None


def start_from(runner: Runner, path: str) -> None:
    """Load the student's first weights; surplus ones, of another head, are not allowed."""
    load_weights(bare(runner.model), path)
    # Otherwise Runner.train would initialise the weights anew.
    bare(runner.model)._is_init = True
    for module in bare(runner.model).modules():
        if hasattr(module, "_is_init"):
            module._is_init = True


def save_student(runner: Runner, path: Path) -> None:
    """Write ``{"state_dict", "meta"}`` as mmseg reads it, without the branch; EMA's weights if any."""
    content: dict[str, Any] = {"state_dict": dict(bare(runner.model).state_dict())}
    runner.call_hook("before_save_checkpoint", checkpoint=content)
    dataset: Any = runner.train_loop.dataloader.dataset  # type: ignore[union-attr]
    write_student(content["state_dict"], getattr(dataset, "metainfo", {}), path)


def write_student(weights: dict[str, Any], metainfo: dict[str, Any], path: Path) -> None:
    """Write the weights that are the student's own, atomically, on rank 0."""
    if rank() > 0:
        return
    import io

    own = {k: v.detach().cpu() for k, v in weights.items() if not k.startswith("afdcd.")}
    meta = {k: metainfo[k] for k in ("classes", "palette") if k in metainfo}
    buffer = io.BytesIO()
    torch.save({"state_dict": own, "meta": {"dataset_meta": meta} if meta else {}}, buffer)
    atomic_write(path, buffer.getvalue())


def facts(runner: Runner, device: torch.device) -> tuple[str, ...]:
    """Lines for the report: taps, weights of the terms, teacher, memory."""
    model = bare(runner.model)
    config = model.distill
    lines = [
        f"student map {model.tapped_shapes['student']}, teacher map {model.tapped_shapes['teacher']}",
        f"weights kd {config.lambda_kd}, fd {config.lambda_fd} ({config.fd_reduction}), "
        f"ctr {config.lambda_ctr}",
        f"teacher sha256 {model.teacher.sha256}",
    ]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        lines.append(f"peak CUDA memory {peak / 2**30:.2f} GiB")
    return tuple(lines)


def _gloo(whole: Config) -> None:
    """Processes on CPUs: mmengine's launcher asks for a GPU, so the group is made before it."""
    import torch.distributed as dist

    if "RANK" not in os.environ:
        raise InputError("launcher pytorch without torchrun; start it as torchrun ... or drop it")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    whole.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}


def without_sync_bn(node: Any) -> None:
    """Turn SyncBN into BN in a config, in place."""
    if isinstance(node, dict):
        if node.get("type") == "SyncBN":
            node["type"] = "BN"
        for value in node.values():
            without_sync_bn(value)
    elif isinstance(node, list | tuple):
        for value in node:
            without_sync_bn(value)


def metainfo_of(path: Path) -> dict[str, Any]:
    """Classes and palette of the data set that a config trains on, without reading its files."""
    from mmseg.registry import DATASETS

    config = Config.fromfile(path)
    dataset = config.train_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    kind: Any = DATASETS.get(str(dataset.type))
    own = dict(getattr(kind, "METAINFO", {}) or {})
    return {**own, **dict(dataset.get("metainfo") or {})}
