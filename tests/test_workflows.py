"""What the GitHub workflows may do, and what a release tag must say."""

import re
from pathlib import Path

import pytest
import yaml

from check_tag import package_of
from workspace import ROOT, members

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@each_workflow
def test_actions_are_pinned_by_commit(path: Path) -> None:
    used = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert used
    assert [u for u in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", u[0])] == []
    assert [u for u in used if not re.fullmatch(r" # v[\d.]+", u[1])] == []


@each_workflow
def test_a_job_has_only_the_permissions_it_names(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert job["permissions"] in ({}, {"contents": "read"}, {"id-token": "write"}), name


def test_the_job_that_can_publish_runs_nothing_of_the_tree() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    publishers = [job for job in jobs.values() if "id-token" in job["permissions"]]
    assert len(publishers) == 1
    assert publishers[0]["environment"] == "release"
    steps = publishers[0]["steps"]
    assert not any("checkout" in step.get("uses", "") for step in steps)
    assert [step["run"] for step in steps if "run" in step] == [
        "uv publish --trusted-publishing always dist/*"
    ]


def test_a_tag_names_one_package_at_its_version() -> None:
    for member in members():
        assert package_of(f"{member.name}-v{member.version}") == member.name


@pytest.mark.parametrize(
    "tag", ["v0.1.0", "unknown-v0.1.0", "sliderquant-0.1.0", "sliderquant-v9.9"]
)
def test_a_wrong_tag_is_refused_with_the_way_out(tag: str) -> None:
    with pytest.raises(SystemExit, match=r"error: .*; (use one of|make them agree)"):
        package_of(tag)
