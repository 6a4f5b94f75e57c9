"""The ``quantize`` command: model directory in, quantized model directory out."""

from collections.abc import Sequence
from pathlib import Path

from effml_common.errors import InputError, memory_advice
from effml_common.files import atomic_write
from effml_common.folders import run_folder
from effml_common.locking import locked_folder
from effml_common.logging import rank, say
from effml_common.report import Report, ReportBuilder, Row, write_report
from sliderquant.adapters.caches import ActivationCache
from sliderquant.adapters.heap import return_large_blocks
from sliderquant.adapters.hub import model_directory, model_name
from sliderquant.adapters.model_folder import open_model
from sliderquant.adapters.processes import process_group, started_processes
from sliderquant.commands._block_writer import publish
from sliderquant.commands._estimates import announce
from sliderquant.commands._job import Job, prepare_job
from sliderquant.commands._measurements import reference_rows, result_row
from sliderquant.commands._model_card import history_section, model_card
from sliderquant.commands._out_folder import (
    CACHE,
    check_resumable,
    claim_folder,
    finished_report,
    run_identity,
)
from sliderquant.commands._resumable import calibrate_saved, write_with_parameters
from sliderquant.config import QuantizeConfig

MEMORY_REMEDY = "lower --batch-size, --nsamples or --seqlen, or add --cache disk"
INTRA_ORDERS = {"network": "as in the released code", "window": "as in the paper's text"}


def quantize(config: QuantizeConfig) -> Report:
    """Quantize a model directory and write one that transformers loads.

    The model is read block by block. Nothing is written before model, data and settings have been
    checked. The run folder is ``<out>/run``; with ``resume="auto"`` an interrupted run in the same
    folder continues and ends with the same bits. Under ``torchrun`` every process computes a part of
    each batch, and the first one writes.

    Returns:
        The report that is also written to ``<out>/run``.

    Raises:
        InputError: If the model, a file, the device or a setting cannot be used.
        CalibrationDivergedError: If a window diverges at three learning rates.
    """
    builder = ReportBuilder("sliderquant", ("transformers", "tokenizers"))
    _check_processes(config)
    out = run_folder(config.out, "quantize")
    with locked_folder(out), memory_advice(MEMORY_REMEDY):
        check_resumable(out, config.resume)
        return _quantize_into(out, config, builder)


def _quantize_into(out: Path, config: QuantizeConfig, builder: ReportBuilder) -> Report:
    """Quantize into a folder that is this run's alone; the report of a finished one is returned."""
    # Windows compute in float32; compensated rounding and rotations need double precision.
    float64 = config.method != "slider" or config.rotate != "none"
    folder = out / "run" / CACHE if config.cache == "disk" else None
    with process_group(config.device, float64=float64) as device, ActivationCache(folder) as cache:
        # Read the model and the text; plan what is to be done.
        opened = open_model(
            model_directory(config.model),
            device=device,
            rotate=config.rotate,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
        )
        job = prepare_job(config, opened, cache, out)
        config = job.config  # a report of sensitivity has become bits of layers
        opened.source.check_finite()

        # The folder belongs to one model, one text and one set of settings.
        claim_folder(out, run_identity(job))
        if (earlier := finished_report(out)) is not None:
            say(f"{out} is finished already and unchanged; measure it with sliderquant eval")
            return earlier
        if job.plan.lean:
            return_large_blocks()
        _announce(job)

        # Calibrate; blocks are written as they become final, and published once they are measured.
        rows = reference_rows(job)
        make_result = calibrate_saved if config.parameters is None else write_with_parameters
        make_result(job)
        rows.append(result_row(job))
        publish(job)

    report = _write_report(job, rows, builder, str(device))
    loader = "sliderquant.load" if config.format == "native" else "from_pretrained of transformers"
    say(f"wrote {out}; load it with {loader}")
    return report


def _write_report(job: Job, rows: Sequence[Row], builder: ReportBuilder, device: str) -> Report:
    """Write the report and the model card; their figures are known once the weights are written."""
    # What was done, in a line each.
    config = job.config
    notes = [f"stored as {config.format}; bits per weight counts the packed size", job.begin_note]
    if config.parameters is not None:
        notes.insert(0, f"nothing was calibrated: parameters of {Path(config.parameters).name}")
    elif config.method == "slider":
        notes.insert(0, f"intra_order={config.intra_order}, {INTRA_ORDERS[config.intra_order]}")
    notes += [job.bits] if job.bits else []

    files = sorted(path.name for path in job.out.iterdir() if path.is_file())
    report = builder.build(rows, device=device, seeds=[config.seed], notes=notes, files=files)
    write_report(report, job.out / "run")
    if rank() == 0:
        original = job.opened.base_type
        part = original and f"Only the language part of the {original} model"
        history = history_section(
            config, report.to_json(), job.begin_note, job.calib_hashes, part, job.bits
        )
        atomic_write(job.out / "README.md", model_card(job.out, model_name(config.model), history))
    return report


def _announce(job: Job) -> None:
    """Say what will be done, on what, and how long it will take."""
    if job.bits:
        say(job.bits)
    if job.config.parameters is None:
        say(job.begin_note)
        announce(job)
    else:
        name = Path(job.config.parameters).name
        say(f"nothing is calibrated: {job.decoder.depth} blocks get the parameters of {name}")


def _check_processes(config: QuantizeConfig) -> None:
    """Refuse processes that would get no sample of a batch, or none at all."""
    count = started_processes()
    if config.nsamples < count:
        raise InputError(
            f"nsamples is {config.nsamples} and there are {count} processes; "
            f"give --nsamples {count} or more"
        )
    if config.method != "compensated" and config.batch_size < count:
        raise InputError(
            f"batch_size is {config.batch_size} and there are {count} processes; "
            f"give --batch-size {count} or more"
        )
