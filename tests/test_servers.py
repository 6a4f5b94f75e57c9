"""Quantized models on real servers; they are built once by scripts/serve_env.py.

Each case is measured anew. In the fresh tree of CI there are no servers, and the committed results are
checked instead.
"""

import json
from pathlib import Path

import pytest
from benchmarks.sliderquant.servers import CASES, RESULTS, Case, measure

COMMITTED = json.loads((Path(__file__).parents[1] / RESULTS).read_text(encoding="utf-8"))
# What vLLM cannot read, as it stands in docs/formats.md of sliderquant.
REFUSED = {name for name, row in COMMITTED.items() if row["server"]["perplexity"] is None}
TOLERANCE = {"llama.cpp": 0.01, "vllm": 0.02}  # of the perplexity; vLLM computes in bfloat16


def check(case: Case, row: dict) -> None:
    """A server loads what it is given and finds the perplexity that this package finds."""
    server = row["server"]
    assert server["loads"]
    assert server["perplexity"] == pytest.approx(row["perplexity"], rel=TOLERANCE[case.server])
    if case.server == "llama.cpp":
        assert server["same_tokens"]


@pytest.mark.serve
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_server_computes_what_this_package_computes(case) -> None:
    if case.name in REFUSED:
        pytest.skip("the server has no kernel for it, see docs/formats.md")
    check(case, measure(case))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_committed_results_hold(case) -> None:
    if case.name not in REFUSED:
        check(case, COMMITTED[case.name])


def test_every_family_and_format_of_the_servers_was_tried() -> None:
    served = [case for case in CASES if case.name in COMMITTED and case.name not in REFUSED]
    assert {(case.server, case.model) for case in served} == {
        (server, model) for server in TOLERANCE for model in ("llama", "qwen3", "gemma")
    }
