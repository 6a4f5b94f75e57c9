"""The ``scalekd`` command."""

from effml_common.cli import Command
from effml_common.cli import main as run_command

COMMANDS = (
    Command(
        "demo",
        "three kinds of small students beside other ways to distil",
        config="scalekd.config:DemoConfig",
        run="scalekd.demo.report:demo",
        examples=("scalekd demo", "scalekd demo --seeds 3 --students cnn vit --out runs/demo"),
    ),
    Command(
        "inspect",
        "shapes, tail, projectors, weights and cost of a pair; no data",
        config="scalekd.config:InspectConfig",
        run="scalekd.commands.inspect:inspect",
        examples=(
            "scalekd inspect --teacher swin_large_patch4_window7_224 --student resnet50",
            "scalekd inspect --published --json",
        ),
    ),
    Command(
        "train",
        "train a student beside a teacher on your own images",
        config="scalekd.config:TrainConfig",
        run="scalekd.commands.train:train",
        examples=(
            "scalekd train --data-dir photos --teacher vit_base_patch14_dinov2.lvd142m "
            "--teacher-checkpoint teacher.safetensors --num-classes 12 --student resnet18 --out run",
            "scalekd train --data-dir imagenet --student resnet50 "
            "--recipe adv-r50 --amp bf16 --channels-last --compile --out run",
        ),
    ),
    Command(
        "eval",
        "accuracy of a trained student",
        config="scalekd.config:EvalConfig",
        run="scalekd.commands.eval:evaluate",
        examples=(
            "scalekd eval run --data-dir photos",
            "scalekd eval run --data-dir photos --no-use-ema --json",
        ),
    ),
    Command(
        "export",
        "write the student alone, as timm loads it",
        config="scalekd.config:ExportConfig",
        run="scalekd.commands.export:export",
        examples=(
            "scalekd export run --out student.safetensors --verify",
            "scalekd export run/run/checkpoints/step-500 --no-use-ema --out student.safetensors",
        ),
    ),
    Command(
        "cache",
        "run the teacher once and keep what training needs of it",
        config="scalekd.config:CacheConfig",
        run="scalekd.commands.cache:cache",
        examples=(
            "scalekd cache --data-dir photos --teacher swin_tiny_patch4_window7_224.ms_in1k "
            "--views 8 --out cached",
            "scalekd cache --dataset hfds/my/photos --teacher vit_small_patch16_224.augreg_in1k "
            "--views 16 --top-k 20 --out cached",
        ),
    ),
)


def main() -> None:
    """Run the command line and exit."""
    raise SystemExit(run_command("scalekd", "scalekd", COMMANDS))


if __name__ == "__main__":  # python -m PACKAGE.cli, as earlier documents had it
    main()
