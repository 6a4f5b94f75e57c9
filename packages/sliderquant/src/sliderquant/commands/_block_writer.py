"""Blocks of the result are written as they become final; the last one publishes the model."""

import shutil
from collections.abc import Callable

from effml_common.logging import rank
from sliderquant.adapters.model_writer import ModelWriter
from sliderquant.adapters.shards import STAGING
from sliderquant.adapters.streaming import EMBEDDING, HEAD, NORM
from sliderquant.commands._job import Job


def block_writer(job: Job, fingerprint: str) -> Callable[[int], None]:
    """Return what to do with each block when it is final; the last one publishes the model."""
    # One process writes, and what an earlier one published is not written again.
    config, opened = job.config, job.opened
    if rank() > 0:
        return lambda block: None
    for stale in job.out.glob(".*.tmp"):  # a kill in the middle of a small file
        stale.unlink()
    if (job.out / "config.json").exists():  # it was published before the run was stopped
        shutil.rmtree(job.out / STAGING, ignore_errors=True)
        return lambda block: None

    untied = config.rotate in ("r1", "both")
    writer = ModelWriter(
        job.out,
        config.model,
        format=config.format,
        dtype=opened.dtype,
        config_changes={"tie_word_embeddings": False} if untied else None,
        activations=job.activations,
        container_bits=config.container_bits,
        identity=fingerprint,
    )

    def write(block: int) -> None:
        rounded = config.format != "pre-quant"
        values = job.learnables[block].to_storage(job.decoder.tensors(block), rounded)
        writer.write({f"model.layers.{block}.{name}": value for name, value in values.items()})
        if block == job.decoder.depth - 1:
            job.decoder.hold([])
            for name in (EMBEDDING, NORM, HEAD):
                writer.write({name: opened.source.outside_tensor(name).to(opened.dtype)})
            writer.publish()

    return write
