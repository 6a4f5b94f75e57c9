"""lm-eval tasks from local files, on a model in memory; nothing is fetched."""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effml_common.errors import InputError, NonFiniteError
from effml_common.logging import warn
from effml_common.parsing import one_line
from sliderquant.adapters.files import quiet_transformers
from sliderquant.adapters.reasons import reason_of
from sliderquant.adapters.text import check_tokens

# Builders of the datasets library that read files and come with it.
LOCAL_READERS = ("json", "csv", "parquet", "text", "arrow")


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Results of one task.

    Attributes:
        name: Task name with its version.
        metrics: Value by metric, such as ``acc``.
        stderrs: Standard error over the documents, where the harness gives one.
        samples: Documents.
    """

    name: str
    metrics: Mapping[str, float]
    stderrs: Mapping[str, float]
    samples: int


def read_tasks(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Read task files of lm-eval.

    Args:
        paths: YAML files, or folders with such files; ``data_files`` in them are relative to the file.

    Raises:
        InputError: If a file is no task, names data that are not local, or asks for Python code.
    """
    files: list[Path] = []
    for path in map(Path, map(os.path.expanduser, paths)):
        if not path.exists():
            raise InputError(f"task {path} does not exist; give a YAML file or a folder of them")
        task_files = [path]
        if path.is_dir():
            task_files = sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")])
        if not task_files:
            raise InputError(f"{path} holds no YAML file; give a folder of task files")
        files += task_files

    # Results are named by the task, so a name may appear once.
    tasks = [_read_task(path) for path in files]
    names = [task["task"] for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"task {repeated[0]} is defined twice; rename one")
    return tasks


def _read_task(path: Path) -> dict[str, Any]:
    import yaml

    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise InputError(
            f"{path} asks for more than plain values ({error.problem}); tasks that run Python code "
            "are not supported"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a value that looks like a date may raise anything, too
        raise InputError(f"{path} cannot be read ({reason_of(error)}); restore it") from None

    # A task in one file, whose data are local files.
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise InputError(f"{path} is no lm-eval task, it has no 'task: NAME'; see its task guide")
    if "include" in task:
        raise InputError(f"{path} includes another file; write the task in one file")
    reader = task.get("dataset_path")
    if reader not in LOCAL_READERS:
        raise InputError(
            f"{path}: dataset_path {reader!r} is not read from local files; "
            f"use one of {', '.join(LOCAL_READERS)} with dataset_kwargs: data_files"
        )
    return task | {"dataset_kwargs": _local_data(path, task.get("dataset_kwargs"))}


def _local_data(path: Path, kwargs: Any) -> dict[str, Any]:
    """Resolve data files relative to the task file, and see that they are there."""
    if not isinstance(kwargs, dict) or not kwargs.get("data_files"):
        raise InputError(f"{path} names no data; add dataset_kwargs: data_files: {{test: FILE}}")

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolve(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [resolve(entry) for entry in value]
        file = path.parent / str(value)
        if not file.is_file():
            raise InputError(
                f"{path}: data file {value} does not exist; it is looked for beside it"
            )
        return str(file.resolve())

    return {**kwargs, "data_files": resolve(kwargs["data_files"])}


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 1,
    max_length: int | None = None,
    limit: int | None = None,
) -> list[TaskScores]:
    """Run lm-eval on a model in memory.

    Args:
        model: On its device, in eval mode.
        tokenizer: Its tokenizer.
        tasks: From ``read_tasks``.
        batch_size: Requests per forward pass.
        max_length: Longest sequence in tokens; default the model's limit.
        limit: Documents per task; default all.

    Raises:
        InputError: If lm-eval is not installed, or a task does not fit its data or the tokenizer.
    """
    # lm-eval puts a token in front of every text.
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has neither a bos nor an eos token; lm-eval needs one")

    with _contained() as errors, quiet_transformers(), tempfile.TemporaryDirectory() as cache:
        # Contexts and texts are encoded as the tokenizer does it by itself, with BOS where it puts
        # one: add_bos_token stays unset.
        host = _host_class()(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
        )

        # Each task alone, so that a failure has a name.
        # The datasets library writes what it reads into a cache, which is thrown away here.
        return [
            _run_task(
                host,
                {**t, "dataset_kwargs": {**t["dataset_kwargs"], "cache_dir": cache}},
                limit,
                errors,
            )
            for t in tasks
        ]


def _host_class() -> Any:
    """Return lm-eval's adapter of transformers' models, which counts BOS once in rolling tasks."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise InputError("tasks need lm-eval; pip install 'sliderquant[eval]'") from None
    base: Any = HFLM  # whose decorators hide the parameters

    class Host(base):
        """Checks the tokens that the model gets, and notes its errors, which no task causes."""

        model_error: BaseException | None = None
        rolling = False

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            # The harness puts the prefix in front of a rolling text, also where it has one already.
            tokens = super().tok_encode(string, *args, **kwargs)
            return tokens[1:] if self.rolling and tokens[:1] == [self.prefix_token_id] else tokens

        def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> list[float]:
            self.rolling = True
            try:
                return super().loglikelihood_rolling(*args, **kwargs)
            finally:
                self.rolling = False

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            for _, context, continuation in requests:
                check_tokens([*context, *continuation], self.model)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            check_tokens([int(context.max())], self.model)
            with self.noting_errors():
                return super()._model_generate(context, *args, **kwargs)

        def _model_call(self, *args: Any, **kwargs: Any) -> Tensor:
            with self.noting_errors():
                return super()._model_call(*args, **kwargs)

        @contextmanager
        def noting_errors(self) -> Iterator[None]:
            try:
                yield
            except Exception as error:
                self.model_error = error
                raise

    return Host


def _run_task(
    host: Any, task: Mapping[str, Any], limit: int | None, errors: list[str]
) -> TaskScores:
    """Run one task; ``errors`` are those that the harness logs meanwhile.

    Raises:
        InputError: If it does not fit its data, in whatever way.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    try:
        evaluate: Any = simple_evaluate
        results = evaluate(
            model=host,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=200,
            log_samples=False,
        )
        assert results is not None  # only other ranks get None
        while errors:
            warn(f"task {task['task']}: {errors.pop(0)}")
        return _scores(task["task"], results)
    except (InputError, NonFiniteError, MemoryError):
        raise
    except Exception as error:  # templates, loaders and metrics raise errors of many libraries
        if error is host.model_error:
            raise
        reason = ": ".join([*errors, reason_of(error)])
        raise InputError(
            f"lm-eval cannot run the task {task['task']} ({reason}); mend its file or its data"
        ) from error


def _scores(name: str, results: Mapping[str, Any]) -> TaskScores:
    # Keys are "metric,filter" and "metric_stderr,filter".
    values = {
        key.partition(",")[0]: value
        for key, value in results["results"][name].items()
        if "," in key and isinstance(value, int | float)
    }
    return TaskScores(
        name=f"{name} v{results['versions'].get(name, '?')}",
        metrics={key: value for key, value in values.items() if not key.endswith("_stderr")},
        stderrs={
            key.removesuffix("_stderr"): value
            for key, value in values.items()
            if key.endswith("_stderr")
        },
        samples=results["n-samples"][name]["effective"],
    )


class _Collector(logging.Handler):
    """Keeps the messages that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.messages.append(one_line(record.getMessage()))


@contextmanager
def _contained() -> Iterator[list[str]]:
    """Make the hub's client refuse every request, and the harness quiet and in one process.

    Yields:
        The errors that the harness logs, one after the other, instead of printing them.
    """
    from huggingface_hub import constants

    # What is changed for the duration.
    logger = logging.getLogger("lm_eval")
    offline, level = constants.HF_HUB_OFFLINE, logger.level
    processes = os.environ.get("DISABLE_MULTIPROC")
    constants.HF_HUB_OFFLINE = True
    logger.setLevel(logging.ERROR)
    collector = _Collector()
    logger.addHandler(collector)
    os.environ["DISABLE_MULTIPROC"] = "1"  # else its standard errors start a process per core
    try:
        yield collector.messages
    finally:
        constants.HF_HUB_OFFLINE = offline
        logger.setLevel(level)
        logger.removeHandler(collector)
        if processes is None:
            del os.environ["DISABLE_MULTIPROC"]
