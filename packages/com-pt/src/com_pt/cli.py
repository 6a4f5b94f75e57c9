"""The ``com-pt`` command."""

from effml_common.cli import Command
from effml_common.cli import main as run_command

COMMANDS = (
    Command(
        "demo",
        "a chain of three small CLIP models against training alone",
        config="com_pt.config:DemoConfig",
        run="com_pt.demo.report:demo",
        examples=("com-pt demo", "com-pt demo --seeds 3 --out runs/demo"),
    ),
    Command(
        "grow",
        "make a larger model that starts from a finished smaller one",
        config="com_pt.config:GrowConfig",
        run="com_pt.commands.grow:grow_model",
        examples=(
            "com-pt grow logs/epoch_32.pt compt-ViT-B-16 --small-model compt-ViT-S-16 --out grown",
            "com-pt grow models/vit-small vit_base_patch16_224 --mode lossless --out grown",
        ),
    ),
    Command(
        "plan",
        "what a chain would cost beside training every member alone",
        config="com_pt.config:PlanConfig",
        run="com_pt.commands.plan:plan",
        examples=("com-pt plan cc3m-vit-tsbl", "com-pt plan chain.yaml --json"),
    ),
    Command(
        "train",
        "train a chain from one YAML file",
        config="com_pt.config:TrainConfig",
        run="com_pt.commands.train:train",
        examples=(
            "com-pt train chain.yaml --out runs/chain --resume auto",
            "com-pt train cc3m-vit-tsbl --train-data captions.tsv --precision bf16 --accum-freq 4",
        ),
    ),
    Command(
        "individual",
        "train one member alone, by the same code",
        config="com_pt.config:IndividualConfig",
        run="com_pt.commands.individual:individual",
        examples=(
            "com-pt individual chain.yaml --member L --out runs/l-alone",
            "com-pt individual cc3m-vit-tsbl --member S --train-data captions.tsv --resume auto",
        ),
    ),
    Command(
        "cost",
        "MACs and seconds that a run has spent, beside its plan",
        config="com_pt.config:CostConfig",
        run="com_pt.commands.cost:cost",
        examples=("com-pt cost runs/chain", "com-pt cost runs/chain --json"),
    ),
    Command(
        "eval",
        "zero-shot, retrieval, linear probe, top-1 or perplexity of a member",
        config="com_pt.config:EvalConfig",
        run="com_pt.commands.eval:evaluate",
        examples=(
            "com-pt eval runs/chain/B --suite zero-shot --data val.csv --classes classes.txt "
            "--templates templates.txt",
            "com-pt eval runs/chain/B --suite zero-shot --data imagenet/val --classes imagenet "
            "--templates imagenet",
            "com-pt eval runs/chain/B --suite retrieval --data captions.tsv --json",
        ),
    ),
    Command(
        "finetune",
        "train a finished image model on labelled images of another task",
        config="com_pt.config:FinetuneConfig",
        run="com_pt.commands.finetune:finetune",
        examples=(
            "com-pt finetune runs/chain/B --train flowers/train --data flowers/val --out runs/flowers",
            "com-pt finetune runs/chain/B --train train.csv --data val.csv --freeze --lr 1e-2",
        ),
    ),
    Command(
        "inspect",
        "a model's axes, sizes and cost, without weights",
        config="com_pt.config:InspectConfig",
        run="com_pt.commands.inspect:inspect",
        examples=(
            "com-pt inspect compt-ViT-S-16 --captions 7",
            "com-pt inspect swin_tiny_patch4_window7_224 --family timm --json",
        ),
    ),
)


def main() -> None:
    """Run the command line and exit."""
    raise SystemExit(run_command("com-pt", "com-pt", COMMANDS))


if __name__ == "__main__":  # python -m PACKAGE.cli, as earlier documents had it
    main()
