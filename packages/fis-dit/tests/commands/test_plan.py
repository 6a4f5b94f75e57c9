"""The plan command on a tiny pipeline."""

import json

from fis_dit_pipelines import SIZE, call

from fis_dit.config import FISConfig


def test_a_plan_of_the_command_line_is_one_that_generate_takes(
    wan_directory, tmp_path, capsys
) -> None:
    prompts, plan = tmp_path / "prompts.txt", tmp_path / "plan.json"
    prompts.write_text("a cat\n\na dog\n")
    words = (str(wan_directory), "--prompts", str(prompts), *SIZE, "--out", str(plan))
    for method in ("local", "endpoint"):
        capsys.readouterr()
        extra = ("--target-speedup", "1.01", "--method", method, "--json")
        assert call("plan", *words, *extra) == 0
        told = json.loads(capsys.readouterr().out)
        chosen = FISConfig.from_json(plan.read_text())
        assert told["sparse_blocks"] == list(chosen.blocks)
        assert told["speedup"] >= 1.01
        # The blocks of lowest score are the sparse ones.
        ranked = sorted(range(4), key=lambda block: told["scores"][block])
        assert sorted(ranked[: len(chosen.blocks)]) == list(chosen.blocks)
    assert (chosen.layers, chosen.frames) == (4, 6)
    again = (str(wan_directory), *SIZE, "--plan", str(plan), "--dtype", "float32")
    assert call("generate", *again, "--out", str(tmp_path / "o")) == 0
