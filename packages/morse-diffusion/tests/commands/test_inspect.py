"""``inspect``: what a Dot is made of."""

import json

from morse_commands import run


def test_inspect_describes_a_dot(trained, capsys) -> None:
    told = json.loads(run(capsys, "inspect", "--dot", trained, "--json"))
    assert (told["m"], told["channels"], told["lora_rank"]) == (1, [8], 2)
