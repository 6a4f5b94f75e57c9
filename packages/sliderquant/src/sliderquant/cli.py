"""The ``sliderquant`` command."""

from effml_common.cli import Command
from effml_common.cli import main as run_command

COMMANDS = (
    Command(
        "demo",
        "train a small Llama once, quantize it five ways, compare perplexities",
        config="sliderquant.config:DemoConfig",
        run="sliderquant.demo.report:demo",
        examples=(
            "sliderquant demo",
            "sliderquant demo --seeds 3 --bits 2 3 --out runs/demo",
        ),
    ),
    Command(
        "quantize",
        "quantize a local model directory",
        config="sliderquant.config:QuantizeConfig",
        run="sliderquant.commands.quantize:quantize",
        examples=(
            "sliderquant quantize models/llama --calib notes.txt --out models/llama-w4",
            "sliderquant quantize models/llama --wbits 2 --group-size 64 --no-sym "
            "--calib chats.jsonl --eval-text held_out.txt --out models/llama-w2",
            "sliderquant quantize models/llama --calib notes.txt --bits-for 'layers.0.*=8' "
            "--ignore 'layers.31.*' --out models/llama-mixed",
        ),
    ),
    Command(
        "eval",
        "perplexity and lm-eval tasks of a model directory in any format",
        config="sliderquant.config:EvalConfig",
        run="sliderquant.commands.eval:evaluate",
        examples=(
            "sliderquant eval models/llama-w4 --text held_out.txt",
            "sliderquant eval models/llama-w4 --tasks tasks/arc.yaml tasks/mine --batch-size 8",
        ),
    ),
    Command(
        "sensitivity",
        "what rounding each block alone does to the model: table, JSON, plot",
        config="sliderquant.config:SensitivityConfig",
        run="sliderquant.commands.sensitivity:sensitivity",
        examples=(
            "sliderquant sensitivity models/llama --text notes.txt",
            "sliderquant sensitivity models/llama --text notes.txt --wbits 3 --by linear --metric mse",
        ),
    ),
    Command(
        "export",
        "write a quantized model in another format, without loss",
        config="sliderquant.config:ExportConfig",
        run="sliderquant.commands.export:export",
        examples=(
            "sliderquant export models/llama-w4-native --out models/llama-w4",
            "sliderquant export models/llama-w2-native --container-bits 4 --out models/llama-w2-vllm",
        ),
    ),
    Command(
        "bench",
        "tokens per second of a native model, packed and dense, on your device",
        config="sliderquant.config:BenchConfig",
        run="sliderquant.commands.bench:bench",
        examples=(
            "sliderquant bench models/llama-w2-native",
            "sliderquant bench models/llama-w2-native --device cuda --prompt 512 --tokens 64",
        ),
    ),
    Command(
        "inspect",
        "windows, cost and memory plan, without reading a weight",
        config="sliderquant.config:InspectConfig",
        run="sliderquant.commands.inspect:inspect",
        examples=(
            "sliderquant inspect --layers 32 --method slider",
            "sliderquant inspect --model models/llama --wbits 2 --group-size 64",
        ),
    ),
)


def main() -> None:
    """Run the command line and exit."""
    raise SystemExit(run_command("sliderquant", "sliderquant", COMMANDS))


if __name__ == "__main__":  # python -m PACKAGE.cli, as earlier documents had it
    main()
