"""``plan``: the order of steps for a budget."""

import json

from morse_commands import run


def test_plan_prints_the_pattern_of_a_budget(tmp_path, capsys) -> None:
    told = json.loads(run(capsys, "plan", "--budget-lsd", 10, "--n", 6, "--json"))
    assert told["pattern"].count("D") == 7
    profile = tmp_path / "profile.json"
    profile.write_text('{"t_dash": 9, "t_dot": 1, "t_sched": 1}')
    told = json.loads(run(capsys, "plan", "--budget-ms", 100, "--profile", profile, "--json"))
    assert told["N"] == 5
    told = json.loads(run(capsys, "plan", "--budget-lsd", 10, "--n", 6, "--early", 2, "--json"))
    # 25 steps, 7 of them Dash: floor(25 (j / 7)^2) = 0, 0, 2, 4, 8, 12, 18.
    assert told["dash_indices"] == [0, 1, 2, 4, 8, 12, 18]
