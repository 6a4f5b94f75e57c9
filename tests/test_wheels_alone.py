"""Each package works from its wheel and effml-common's, with no sibling and no source tree."""

import subprocess
import sys

import pytest

from workspace import ROOT, Member, members


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
def test_the_wheel_alone_installs_answers_and_passes_its_tests(member: Member) -> None:
    command = [sys.executable, "scripts/check_wheels.py", "--only", member.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
