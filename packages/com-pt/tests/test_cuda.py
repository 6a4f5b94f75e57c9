"""On a card: training, evaluation and growth give what they give on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from com_pt_tiny import WORDS, clip, clip_chain, spec, task_of
from safetensors.torch import load_file

from com_pt.adapters.grow import grow, state_of
from com_pt.adapters.open_clip_models import save_clip
from com_pt.cli import COMMANDS
from com_pt.training.chain import parse_chain
from com_pt.training.run import run_chain
from effml_common.cli import main

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda:0")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_a_chain_trains_on_a_card_to_what_it_trains_to_on_the_cpu(
    pictures, tmp_path, accum_freq
) -> None:
    # A key bias has no gradient but rounding noise, which a small eps would make an update of.
    document = clip_chain(pictures, 32, 64, epochs=0.5, eps=1e-3, accum_freq=accum_freq)
    document["data"]["val"] = str(pictures / "captions.tsv")
    runs = {}
    for device in (torch.device("cpu"), CUDA):
        out = tmp_path / device.type
        runs[device.type] = run_chain(parse_chain(document), out, device=device)
    for member in ("W32", "W64"):
        expected = weights(tmp_path / "cpu" / member)
        for name, value in weights(tmp_path / "cuda" / member).items():
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0)
    assert [m.steps for m in runs["cuda"]] == [m.steps for m in runs["cpu"]]


def test_a_chain_trains_in_bfloat16_on_a_card_and_resumes(pictures, tmp_path) -> None:
    chain = parse_chain(clip_chain(pictures, 32, 64, precision="bf16", epochs=4, lr=3e-3))
    members = run_chain(chain, tmp_path / "out", device=CUDA)
    assert run_chain(chain, tmp_path / "out", resume=True, device=CUDA) == members
    lines = (tmp_path / "out/run/stage-2-W64/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]


def test_the_command_line_trains_on_the_card_by_itself(pictures, tmp_path, capsys) -> None:
    import yaml

    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(clip_chain(pictures, 32)))
    words = ["train", str(tmp_path / "chain.yaml"), "--out", str(tmp_path / "out")]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert main("com-pt", "com-pt", COMMANDS, words) == 0
    assert "device: cuda:0 (" in capsys.readouterr().err
    assert torch.cuda.max_memory_allocated() > before


@pytest.mark.parametrize("suite", ["zero-shot", "retrieval", "probe"])
def test_a_model_is_judged_on_a_card_as_on_the_cpu(suite, pictures, tmp_path, capsys) -> None:
    pytest.importorskip("transformers")
    folder, tokenizer = tmp_path / "model", tmp_path / "words"
    save_clip(trained(pictures, tmp_path), spec(32), folder)
    hf_tokenizer(tokenizer)
    rows = "\n".join(f"{i}.png,{['red', 'green', 'blue'][i % 3]}" for i in range(48))
    (pictures / "classes.csv").write_text(f"path,class\n{rows}\n")
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "templates.txt").write_text("a {} square\na picture of a {} square\n")
    files = {
        "zero-shot": ["classes.csv", "--classes", f"{tmp_path}/classes.txt",
                      "--templates", f"{tmp_path}/templates.txt"],
        "retrieval": ["captions.tsv"],
        "probe": ["classes.csv", "--train", str(pictures / "classes.csv")],
    }[suite]  # fmt: skip
    words = ["eval", str(folder), "--suite", suite, "--data", str(pictures / files[0]), *files[1:]]
    told = {}
    for device in ("cpu", "cuda"):
        call = [*words, "--tokenizer", str(tokenizer), "--device", device, "--json"]
        assert main("com-pt", "com-pt", COMMANDS, call) == 0
        told[device] = json.loads(capsys.readouterr().out)
    # bfloat16 forward passes may exchange neighbours among almost equal pictures.
    for name, value in told["cpu"].items():
        if "rank" not in name:
            assert told["cuda"][name] == pytest.approx(value, abs=0.1), name


def trained(pictures: Path, tmp_path: Path) -> torch.nn.Module:
    chain = parse_chain(clip_chain(pictures, 32, epochs=10, lr=3e-3))
    run_chain(chain, tmp_path / "chain", device=CUDA)
    return task_of(pictures).load(tmp_path / "chain" / "W32", None)


def hf_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"pad": 0, **{word: i for i, word in enumerate(WORDS, 1)}, "end": 8}
    made = Tokenizer(models.WordLevel(ids, unk_token="end"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="pad", eos_token="end")
    fast.save_pretrained(folder)


@pytest.mark.parametrize("mode", ["embed", "official", "lossless"])
def test_growth_on_a_card_is_growth_on_the_cpu(mode) -> None:
    grown = []
    for device in (torch.device("cpu"), CUDA):
        torch.manual_seed(0)
        small, large = clip(32).to(device), clip(64, 4, text_layers=4).to(device)
        report = grow(small, large, mode)
        assert report.inherited > 0
        grown.append(state_of(large))
    for name, value in grown[0].items():
        assert grown[1][name].device == CUDA
        torch.testing.assert_close(grown[1][name].cpu(), value, atol=0, rtol=0)
