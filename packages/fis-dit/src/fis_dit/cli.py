"""The ``fis-dit`` command."""

from effml_common.cli import Command
from effml_common.cli import main as run_command

COMMANDS = (
    Command(
        "demo",
        "distilled four-step models: dense, FIS and other accelerations, with clips and a plot",
        config="fis_dit.config:DemoConfig",
        run="fis_dit.demo.report:demo",
        examples=("fis-dit demo", "fis-dit demo --data digits --seeds 3 --out runs/demo"),
    ),
    Command(
        "inspect",
        "anchors, FLOPs, speed-up and memory, from a model's config alone",
        config="fis_dit.config:InspectConfig",
        run="fis_dit.commands.inspect:inspect",
        examples=(
            "fis-dit inspect models/Wan2.2-T2V-A14B --height 720 --width 1280 --num-frames 81",
            "fis-dit inspect models/hy15/transformer/config.json --stride 3 --json",
        ),
    ),
    Command(
        "plan",
        "calibrate which blocks to leave dense for a target speed-up",
        config="fis_dit.config:PlanConfig",
        run="fis_dit.commands.plan:write_plan",
        examples=(
            "fis-dit plan models/wan --prompts prompts.txt --target-speedup 2.2 --device cuda",
            "fis-dit plan models/wan --prompts prompts.txt --method endpoint --out plan.json",
        ),
    ),
    Command(
        "generate",
        "make a clip with a local diffusers pipeline, and compare it with the dense one",
        config="fis_dit.config:GenerateConfig",
        run="fis_dit.commands.generate:generate",
        examples=(
            "fis-dit generate models/wan --prompt 'a fox in snow' --plan plan.json --device cuda",
            "fis-dit generate models/wan --preset quality --compare-dense --format mp4",
        ),
    ),
    Command(
        "bench",
        "time dense against sparse forwards of a random-weight transformer",
        config="fis_dit.config:BenchConfig",
        run="fis_dit.commands.bench:bench",
        examples=(
            "fis-dit bench --arch tiny",
            "fis-dit bench --arch wan-a14b --device cuda --settings block-n2 attn-n3 --json",
        ),
    ),
)


def main() -> None:
    """Run the command line and exit."""
    raise SystemExit(run_command("fis-dit", "fis-dit", COMMANDS))


if __name__ == "__main__":  # python -m PACKAGE.cli, as earlier documents had it
    main()
