"""The ``af-dcd`` command."""

from effml_common.cli import Command
from effml_common.cli import main as run_command

_R18 = "mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py"
_R101 = "mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py"

COMMANDS = (
    Command(
        "demo",
        "ways to train a small segmenter on drawn scenes, beside Af-DCD",
        config="af_dcd.config:DemoConfig",
        run="af_dcd.demo.report:demo",
        examples=("af-dcd demo", "af-dcd demo --seeds 3 --out runs/demo"),
    ),
    Command(
        "train",
        "distil any mmsegmentation pair",
        config="af_dcd.config:TrainConfig",
        run="af_dcd.commands.train:train",
        examples=(
            f"af-dcd train --student {_R18} --teacher {_R101} --teacher-checkpoint teacher.pth "
            "--iters 40000 --out runs/r18",
            "af-dcd train --student my_student.py --teacher my_teacher.py "
            "--teacher-checkpoint teacher.pth --lambda-ctr 0.01 --method groups=8 pool=2 "
            "--cfg-options train_dataloader.batch_size=4 --resume auto --out runs/mine",
        ),
    ),
    Command(
        "eval",
        "measure a checkpoint on the test data of its config",
        config="af_dcd.config:EvalConfig",
        run="af_dcd.commands.eval:evaluate",
        examples=(
            "af-dcd eval runs/r18/student.py runs/r18/student.pth",
            "af-dcd eval my_student.py student.pth --cfg-options test_dataloader.num_workers=8",
        ),
    ),
    Command(
        "export",
        "the plain student of a run, also of an unfinished one",
        config="af_dcd.config:ExportConfig",
        run="af_dcd.commands.export:export",
        examples=(
            "af-dcd export runs/r18 student.pth",
            "af-dcd export runs/mine weights/mine.pth --json",
        ),
    ),
    Command(
        "inspect",
        "shapes, loss weights, memory and cost of a pair, without data",
        config="af_dcd.config:InspectConfig",
        run="af_dcd.commands.inspect:inspect",
        examples=(
            f"af-dcd inspect --student {_R18} --teacher {_R101}",
            "af-dcd inspect --student af-dcd::camvid/deeplabv3_r18.py "
            "--teacher af-dcd::camvid/deeplabv3_r101.py --json",
        ),
    ),
    Command(
        "bench",
        "time and memory of the contrast and of the rest of the branch",
        config="af_dcd.config:BenchConfig",
        run="af_dcd.commands.bench:bench",
        examples=(
            "af-dcd bench --repeats 3",
            "af-dcd bench --preset voc --height 64 --width 64 --device cuda",
        ),
    ),
)


def main() -> None:
    """Run the command line and exit."""
    raise SystemExit(run_command("af-dcd", "af-dcd", COMMANDS))


if __name__ == "__main__":  # python -m PACKAGE.cli, as earlier documents had it
    main()
