"""The bench command and its random models."""

import json
from typing import Any

import torch
from fis_dit_pipelines import call

from fis_dit.adapters import random_models


def test_bench_builds_its_model_in_the_final_type() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = dict.fromkeys((torch.float32, torch.bfloat16), 0)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype in largest:
                largest[out.dtype] = max(largest[out.dtype], out.numel())
            return out

    with Watch():
        model, _ = random_models.build_random_model(
            random_models.ARCHITECTURES["tiny"], torch.device("cpu"), dtype=torch.bfloat16
        )
    # The largest weights never existed in float32; what diffusers keeps in float32 does.
    weight = model.blocks[0].ffn.net[2].weight
    assert weight.dtype == torch.bfloat16
    assert largest[torch.float32] < weight.numel() <= largest[torch.bfloat16]
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    assert model.rope.freqs_cos.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_bench_times_a_small_model(tmp_path, monkeypatch, capsys) -> None:
    import dataclasses

    tiny = random_models.ARCHITECTURES["tiny"]
    small = dataclasses.replace(tiny, latent=(16, 5, 8, 8), geometry=(5, 16))
    monkeypatch.setitem(random_models.ARCHITECTURES, "tiny", small)
    words = ("--repeats", "2", "--warmup", "0", "--settings", "block-n2", "attn-n2-full", "--json")
    assert call("bench", *words, "--out", str(tmp_path)) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["dense", "block-n2", "attn-n2-full"]
    assert all(row["metrics"]["seconds"]["n"] == 2 for row in rows)
