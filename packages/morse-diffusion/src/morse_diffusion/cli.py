"""The ``morse-diffusion`` command."""

from effml_common.cli import Command
from effml_common.cli import main as run_command

COMMANDS = (
    Command(
        "demo",
        "samplers at equal measured time on a small trained denoiser",
        config="morse_diffusion.config:DemoConfig",
        run="morse_diffusion.demo.report:demo",
        examples=(
            "morse-diffusion demo",
            "morse-diffusion demo --seeds 3 --budgets 5 10 --out runs/demo",
        ),
    ),
    Command(
        "train-dot",
        "train a Dot for your own pipeline on a folder of images",
        config="morse_diffusion.config:TrainDotConfig",
        run="morse_diffusion.commands.train_dot:train_dot",
        examples=(
            "morse-diffusion train-dot models/sd15 photos --m 2 --rank 64 --guidance 2 10 "
            "--steps 100000 --precision bf16 --out dot",
            "morse-diffusion train-dot models/ddpm digits --channels 8 16 --rank 16 --lr 2e-3 "
            "--batch 32 --steps 600 --out dot",
        ),
    ),
    Command(
        "sample",
        "sample images within a time budget",
        config="morse_diffusion.config:SampleConfig",
        run="morse_diffusion.commands.sample:sample",
        examples=(
            "morse-diffusion sample models/ddpm dot --budget-lsd 10 --n 16 --seed 0",
            'morse-diffusion sample models/sd15 dot --budget-lsd 10 --prompt "a red bicycle" '
            "--guidance-scale 7.5 --device cuda",
        ),
    ),
    Command(
        "bench",
        "quality and measured time beside other samplers, on your own pipeline",
        config="morse_diffusion.config:BenchConfig",
        run="morse_diffusion.commands.bench:bench",
        examples=(
            "morse-diffusion bench models/ddpm dot digits --budgets 5 10 20 --samples 256",
            "morse-diffusion bench models/ddpm dot digits --baselines ddim dpmpp unipc extrapolate "
            "--seeds 3 --json",
        ),
    ),
    Command(
        "plan",
        "the order of Dash and Dot steps for a budget",
        config="morse_diffusion.config:PlanConfig",
        run="morse_diffusion.commands.plan:plan",
        examples=(
            "morse-diffusion plan --budget-lsd 10 --n 6",
            "morse-diffusion plan --budget-ms 400 --profile profile.json --json",
        ),
    ),
    Command(
        "inspect",
        "what a Dot is made of, and its size beside the paper's",
        config="morse_diffusion.config:InspectConfig",
        run="morse_diffusion.commands.inspect:inspect",
        examples=(
            "morse-diffusion inspect --dot dot",
            "morse-diffusion inspect --published --json",
        ),
    ),
)


def main() -> None:
    """Run the command line and exit."""
    raise SystemExit(run_command("morse-diffusion", "morse-diffusion", COMMANDS))


if __name__ == "__main__":  # python -m PACKAGE.cli, as earlier documents had it
    main()
