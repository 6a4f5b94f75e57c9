"""The examples run as they are written, on tiny models, and come out as they say."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fis_dit_pipelines import make_wan_a14b
from PIL import Image

from fis_dit import FISConfig, apply_fis
from fis_dit.adapters import registry

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {
    "choose_sparse_blocks_of_wan",
    "make_cosmos_sparse",
    "make_wan_video_faster",
    "predict_speedup_of_wan_a14b",
    "set_both_transformers_of_wan_a14b",
}
Run = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.skipif(
    not EXAMPLES.exists(), reason="the examples are not beside these tests"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run an example in an empty folder, on the CPU; its global names come back."""

    def run(name: str, *words: Any) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))

    return run


def test_every_example_is_short_and_tested_here() -> None:
    lines = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(lines) == SCRIPTS
    assert max(lines.values()) <= 60


def test_the_predicted_speed_ups_are_those_of_the_documentation(run, capsys) -> None:
    speedups = run("predict_speedup_of_wan_a14b")["speedups"]
    assert speedups["every 2nd frame"] == pytest.approx(2.15, abs=0.005)
    assert speedups["every 2nd frame, keys of all frames"] < 1.76
    assert capsys.readouterr().out.startswith("14.29 billion parameters")


def test_the_predicted_speed_up_follows_a_config_file(run, wan_directory) -> None:
    config = wan_directory / "transformer" / "config.json"
    speedups = run("predict_speedup_of_wan_a14b", config, 16, 16, 21)["speedups"]
    assert 1 < speedups["every 2nd frame"] < speedups["every 3rd frame"] < 2


def test_the_faster_video_is_near_the_dense_one_which_is_restored(
    run, wan_directory, tmp_path
) -> None:
    names = run("make_wan_video_faster", wan_directory, 16, 16, 21)
    assert 10 < names["psnr"] < 100
    assert names["summary"]["anchors"] == [[0, 2, 4, 5], [0, 1, 3, 5]]
    for name in ("dense", "fis"):
        with Image.open(tmp_path / f"{name}.gif") as clip:
            assert clip.size == (16, 16)

    # No hook is left: the same noise gives the dense clip again.
    noise = torch.Generator().manual_seed(0)
    call = {**names["call"], "num_inference_steps": 4, "output_type": "pil"}
    again = np.stack(names["pipe"](**call, generator=noise).frames[0])
    assert (again == names["clips"]["dense"]).all()
    assert (again != names["clips"]["fis"]).any()


def test_the_chosen_blocks_reach_the_target_and_are_saved(run, wan_directory, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    names = run("choose_sparse_blocks_of_wan", wan_directory, "prompts.txt", 1.05, 16, 16, 21)
    assert names["cost"].speedup >= 1.05
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["model_class"] == "WanTransformer3DModel"
    assert (plan["layers"], plan["frames"]) == (4, 6)
    assert sorted([*plan["blocks"], *names["dense_blocks"]]) == [0, 1, 2, 3]


def test_each_transformer_of_a14b_runs_with_its_own_setting(run, tmp_path) -> None:
    make_wan_a14b().save_pretrained(tmp_path / "a14b")
    summary = run("set_both_transformers_of_wan_a14b", "a14b", 16, 16, 21)["summary"]
    assert summary["transformer"]["stride"] == 3
    assert summary["transformer"]["anchors"][0] == [0, 3, 5]
    assert summary["transformer_2"]["anchors"][0] == [0, 2, 4, 5]
    assert sum(item["forwards"] for item in summary.values()) == 4
    with Image.open(tmp_path / "fis.gif") as clip:
        assert clip.size == (16, 16)


def test_cosmos_computes_anchors_and_interpolates_the_other_frames(
    run, tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("torchvision")  # resizes the padding mask of Cosmos
    from diffusers import CosmosTransformer3DModel

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": 8}
    sizes |= {"num_attention_heads": 2, "attention_head_dim": 12, "adaln_lora_dim": 4}
    model = CosmosTransformer3DModel(**sizes, max_size=(8, 8, 8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # positions and gates start at zero
    model.save_pretrained(tmp_path / "cosmos")

    names = run("make_cosmos_sparse", "cosmos", 5, 4, 4)
    assert names["summary"]["sparse_blocks"] == [1]
    assert names["summary"]["anchors"] == [[0, 2, 4]]
    assert 0 < names["distance"] < 1
    assert capsys.readouterr().out.startswith("1 sparse blocks, 5 frames")

    # The sparse block by hand: 4 tokens a frame, anchors 0, 2 and 4 alone, the change of the other two
    # frames is the mean of that of their neighbours.
    transformer, (block, seen) = (
        names["transformer"],
        (names["transformer"].transformer_blocks[1], []),
    )
    watch = block.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    arguments = (names["latent"], names["timestep"], names["text"])
    with torch.no_grad(), apply_fis(transformer, FISConfig(stride=2)):
        transformer(*arguments, **names["extra"])
    watch.remove()
    (hidden, text, embedded, temb, rotary, position, *rest), output = seen[0]

    def keep(value: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([value.narrow(dim, 4 * frame, 4) for frame in (0, 2, 4)], dim)

    with torch.no_grad():
        rows = tuple(keep(table, 0) for table in rotary)
        computed = block(keep(hidden, 1), text, embedded, temb, rows, keep(position, 1), *rest)
    change = (computed - keep(hidden, 1)).unflatten(1, (3, 4))
    expected = hidden.unflatten(1, (5, 4)).clone()
    expected[:, [0, 2, 4]] += change
    expected[:, [1, 3]] += (change[:, :2] + change[:, 1:]) / 2
    torch.testing.assert_close(output, expected.flatten(1, 2))
