"""Sensitivity against models that were changed by hand."""

import copy
import json
import math

import pytest
import torch

from effml_common.errors import ConfigError, NonFiniteError
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.commands.sensitivity import Damage, advice, measure, sensitivity
from sliderquant.config import SensitivityConfig
from sliderquant.method.quantizer import WeightFormat, fake_quantize

FMT = WeightFormat(bits=2, group_size=8, sym=True, dtype=torch.float32)


def by_hand(model, tokens, changes) -> tuple[float, float]:
    """Change a copy of the model, run both, and compare perplexity and KL from the definitions."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for block, name in changes:
            weight = changed.model.layers[block].get_parameter(name)
            weight.copy_(fake_quantize(weight.flatten(0, -2), FMT).view(weight.shape))
        one, two = model(tokens, use_cache=False), changed(tokens, use_cache=False)

    def perplexity(logits):
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten(), reduction="none"
        )
        return math.exp(losses.view(len(tokens), -1).mean(1).mean().item())

    p, q = (torch.distributions.Categorical(logits=x.logits.double()) for x in (one, two))
    kl = torch.distributions.kl_divergence(p, q).mean().item()
    return perplexity(two.logits) - perplexity(one.logits), kl


@pytest.mark.parametrize("family_name", ["llama", "mixtral"])
def test_each_block_alone_is_what_a_model_changed_by_hand_shows(tiny, tokens, family_name) -> None:
    model = tiny(family_name)
    decoder = TransformersDecoder(model)
    variants = [(f"block {b}", b, decoder.layout(b).linears) for b in range(3)]
    for (name, block, names), damage in zip(
        variants, measure(decoder, tokens, FMT, variants), strict=True
    ):
        ppl, kl = by_hand(model, tokens, [(block, n) for n in names])
        assert damage.name == name
        assert damage.kl == pytest.approx(kl, rel=1e-3)
        assert damage.ppl == pytest.approx(ppl, rel=1e-3, abs=1e-3)
        assert damage.mse > 0


def test_a_prefix_rounds_all_blocks_up_to_its_own(tiny, tokens) -> None:
    model = tiny("llama")
    decoder = TransformersDecoder(model)
    variants = [(f"blocks 0-{b}", b, decoder.layout(b).linears) for b in range(3)]
    damages = measure(decoder, tokens, FMT, variants, prefix=True)
    for block, damage in enumerate(damages):
        changes = [(b, n) for b in range(block + 1) for n in decoder.layout(b).linears]
        assert damage.kl == pytest.approx(by_hand(model, tokens, changes)[1], rel=1e-3)


def test_one_layer_at_a_time_rounds_that_layer_only(tiny, tokens) -> None:
    model = tiny("llama")
    decoder = TransformersDecoder(model)
    name = "mlp.down_proj.weight"
    (damage,) = measure(decoder, tokens, FMT, [("block 1 mlp.down_proj", 1, (name,))])
    assert damage.kl == pytest.approx(by_hand(model, tokens, [(1, name)])[1], rel=1e-3)


def test_rounding_nothing_damages_nothing(tiny, tokens) -> None:
    (damage,) = measure(TransformersDecoder(tiny("llama")), tokens, FMT, [("block 1", 1, ())])
    assert (damage.ppl, damage.kl, damage.mse) == (0, 0, 0)


def test_a_broken_model_has_no_sensitivity(tiny, tokens) -> None:
    model = tiny("llama")
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(NonFiniteError):
        measure(TransformersDecoder(model), tokens, FMT, [("block 1", 1, ())])


def test_advice_names_what_stands_out_and_the_share_of_the_ends() -> None:
    kls = [6.0, 1.0, 1.0, 1.0, 3.0]
    damages = [Damage(name=f"block {b}", ppl=0.0, kl=kl, mse=0.0) for b, kl in enumerate(kls)]
    ranking, more, ends, flag = advice(damages, "kl")
    assert "block 0, block 4" in ranking
    assert more.endswith("keep at more bits: block 0, block 4")
    assert "75 %" in ends
    assert flag == "for quantize: --bits-for 'layers.0.*=8' 'layers.4.*=8'"


def test_advice_gives_no_flag_where_nothing_stands_out() -> None:
    damages = [Damage(name=f"block {b}", ppl=0.0, kl=1.0, mse=0.0) for b in range(4)]
    notes = advice(damages, "kl")
    assert "first and last block" in notes[-1]
    assert notes[1] == "nothing suffers more than 2 times the median: keep all bits equal"


def test_the_command_writes_report_and_plot(model_directory, held_out_file, tmp_path) -> None:
    config = SensitivityConfig(
        model=str(model_directory), text=(str(held_out_file),), group_size=32, out=str(tmp_path),
        nsamples=3,
    )  # fmt: skip
    report = sensitivity(config)
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["name"] for row in written["rows"]] == [f"block {b}" for b in range(5)]
    assert all(row.metrics["kl"][0] > 0 for row in report.rows)
    assert (tmp_path / "run" / "sensitivity.png").stat().st_size > 1000
    assert any("first and last block" in note for note in written["notes"])


def test_prefixes_of_single_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="block by block"):
        SensitivityConfig(model="m", text=("t",), by="linear", mode="prefix")
