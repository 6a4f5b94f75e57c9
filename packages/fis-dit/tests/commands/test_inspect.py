"""The inspect command, which reads configs alone."""

import json

import pytest
from fis_dit_pipelines import SIZE, call, wan_transformer


def test_inspect_tells_cost_from_configs_alone(wan_directory, tmp_path, capsys) -> None:
    for file in wan_directory.rglob("*.safetensors"):
        file.unlink()
    words = (str(wan_directory), *SIZE, "--json")
    assert call("inspect", *words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["frames"], told["tokens_per_frame"], told["depth"]) == (6, 1, 4)
    assert told["parameters"] == sum(p.numel() for p in wan_transformer().parameters())
    assert told["anchors"] == [[0, 2, 4, 5], [0, 1, 3, 5]]


def test_inspect_of_the_released_shapes_gives_the_known_speed_up(tmp_path, capsys) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    assert call("inspect", str(file), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] / 1e9 == pytest.approx(14.29, abs=0.01)
    assert (told["frames"], told["tokens_per_frame"]) == (21, 3600)
    assert told["speedup"] == pytest.approx(2.15, abs=0.01)
    assert told["dense_pflop"] == pytest.approx(6.52, abs=0.01)
    assert call("inspect", str(file)) == 0
    assert "2.15x" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["not json", "[]", '{"_class_name": "FluxTransformer2DModel"}', "{}"]
)
def test_a_config_that_is_none_is_one_line(content: str, tmp_path, capsys) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    assert call("inspect", str(file)) == 2
    assert capsys.readouterr().err.startswith("error: ")
