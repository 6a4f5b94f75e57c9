"""Blocks of the result are written as they become final, and published once they have been measured."""

import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from effml_common.errors import NonFiniteError
from effml_common.logging import rank
from sliderquant.adapters.model_writer import ModelWriter
from sliderquant.adapters.shards import STAGING
from sliderquant.adapters.streaming import EMBEDDING, HEAD, NORM
from sliderquant.commands._job import Job
from sliderquant.commands._out_folder import IDENTITY


def block_writer(job: Job) -> Callable[[int], None]:
    """Return what to do with each block when it is final: see that it computes, and write it."""
    # One process writes, and what an earlier one published is not written again.
    if rank() > 0:
        return lambda block: None
    for stale in job.out.glob(".*.tmp"):  # a kill in the middle of a small file
        stale.unlink()
    if (job.out / "config.json").exists():  # it was published before the run was stopped
        shutil.rmtree(job.out / STAGING, ignore_errors=True)
        return lambda block: None
    writer, check = _open_writer(job), _OutputCheck(job)

    def write(block: int) -> None:
        rounded = job.config.format != "pre-quant"
        tensors = job.decoder.tensors(block)
        check(block, tensors)
        values = job.learnables[block].to_storage(tensors, rounded)
        writer.write({f"model.layers.{block}.{name}": value for name, value in values.items()})
        if block == job.decoder.depth - 1:
            job.decoder.hold([])
            for name in (EMBEDDING, NORM, HEAD):
                tensor = job.opened.source.outside_tensor(name)
                writer.write({name: tensor.to(job.opened.dtype)})

    return write


def publish(job: Job) -> None:
    """Give the files of a written model their names, unless they have them already."""
    if rank() == 0 and not (job.out / "config.json").exists():
        _open_writer(job).publish()


def _open_writer(job: Job) -> ModelWriter:
    """Open the files of a run, which may have been written in part."""
    return ModelWriter(
        job.out,
        job.opened.directory,
        format=job.config.format,
        dtype=job.opened.dtype,
        config=job.opened.written_config,
        activations=job.activations,
        container_bits=job.config.container_bits,
        identity=(job.out / IDENTITY).read_text(encoding="utf-8"),
    )


class _OutputCheck:
    """Follows one calibration sample through the blocks of the result.

    Args:
        job: What the run works on.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        # Without samples, as with given parameters, any token will do.
        sample = job.samples[:1] if job.samples.numel() else torch.zeros(1, 1, dtype=torch.int64)
        self._hidden = job.decoder.block_inputs(sample)

    @torch.no_grad()
    def __call__(self, block: int, tensors: dict[str, Tensor]) -> None:
        """Run the next block on what the ones before returned.

        Raises:
            NonFiniteError: If what the block returns, or in the end the logits, are not finite.
        """
        job = self._job
        parameters = tensors | job.learnables[block](tensors)
        self._hidden = job.decoder.run_block(block, self._hidden, parameters, job.activations)
        place, outputs = f"block {block}", self._hidden
        if block == job.decoder.depth - 1 and torch.isfinite(outputs).all():
            place, outputs = "the head", job.decoder.logits(self._hidden)
        if not torch.isfinite(outputs).all():
            raise NonFiniteError(
                f"what {place} returns is not finite, so the result is not published; "
                "check the model's weights, and evaluate it as it is"
            )
