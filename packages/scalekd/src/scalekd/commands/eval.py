"""The ``eval`` command: accuracy of a trained student."""

from effml_common.report import Report, ReportBuilder, Row
from scalekd.config import EvalConfig
from scalekd.training.evaluation import measure_accuracy
from scalekd.training.processes import this_process
from scalekd.training.students import load_student


def evaluate(config: EvalConfig) -> Report:
    """Measure a trained student.

    Raises:
        InputError: If the device is not there, or the run or the images cannot be read.
    """
    report = ReportBuilder("scalekd", libraries=("timm",))
    device = this_process(config.device).device
    student = load_student(config.checkpoint, config.use_ema)
    scores = measure_accuracy(
        student.model,
        config,
        size=student.settings.img_size,
        device=device,
        batch_size=config.batch_size,
    )

    metrics = {name: [value] for name, value in scores.items()}
    row = Row(student.settings.student, student.weights, metrics)
    return report.build([row], seeds=[student.settings.seed], device=device)
