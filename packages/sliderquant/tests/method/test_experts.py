"""Compensated rounding of fused experts: against plain loops, and on held-out tokens."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from effml_common.cli import main
from effml_common.report import Row
from sliderquant import load
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.shapes import ShapeError, decoder_shape
from sliderquant.adapters.simulation import fresh_learnables, simulated_logits
from sliderquant.adapters.simulation import simulated_weights as simulate
from sliderquant.cli import COMMANDS
from sliderquant.commands import quantize as quantize_command
from sliderquant.commands._job import Job
from sliderquant.commands._measurements import result_row
from sliderquant.commands.inspect import inspect, make_plan
from sliderquant.config import InspectConfig, SliderConfig
from sliderquant.method import expert_rounding
from sliderquant.method.activations import activation_format, fake_quantize_tokens
from sliderquant.method.calibration import calibrate
from sliderquant.method.decoder import run_blocks
from sliderquant.method.error_compensation import round_layers
from sliderquant.method.expert_rounding import TOKENS_PER_INPUT, expert_passes, rows_of_experts
from sliderquant.method.layout import expert_weights
from sliderquant.method.quantizer import quantize_weight
from sliderquant.method.ridge import factorize

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
DENSE_FIRST = {"mlp_only_layers": [0]}
MIXED = ["--bits-for", "layers.0.*=8", "experts.down_proj=3", "layers.2.*.gate_up_proj=5"]


def settings(**changes) -> SliderConfig:
    return SliderConfig(**{"wbits": 3, "group_size": 8, "nsamples": 4, "seqlen": 64, **changes})


def random_tokens(samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 96, (samples, 64), generator=generator)


def calibrated(model, tokens, config, dtype=torch.float32, **listeners):
    """Returns the decoder and the learnables of a model that was rounded for some tokens."""
    decoder = TransformersDecoder(model)
    learnables = fresh_learnables(decoder, config, dtype)
    calibrate(decoder, tokens, [], learnables, config, **listeners)
    return decoder, learnables


def with_starved_experts(model, starved: int):
    """Lets no token choose the last experts: their rows of the router repel what all tokens share."""
    with torch.no_grad():
        for block in model.model.layers:
            if hasattr(block.mlp, "experts"):
                norm = block.post_attention_layernorm.weight
                model.model.embed_tokens.weight[:, 0] = 4.0
                norm[0] = 2.0
                block.mlp.gate.weight[:, 0] = 0.0
                block.mlp.gate.weight[-starved:, 0] = -30.0
                block.self_attn.o_proj.weight[0] = 0.0
                block.mlp.experts.down_proj[:, 0] = 0.0
    return model


@pytest.mark.parametrize("abits", [16, 8])
@pytest.mark.parametrize(
    ("architecture", "changes"), [("qwen3_moe", {}), ("mixtral", {}), ("qwen3_moe", DENSE_FIRST)]
)
def test_output_error_on_new_tokens_is_well_below_that_of_nearest_rounding(
    architecture, changes, abits, tiny
) -> None:
    config = settings(nsamples=32, abits=abits)
    decoder, learnables = calibrated(tiny(architecture, **changes), random_tokens(32), config)
    nearest = [
        {
            name: quantize_weight(weight, learnables[block].fmt).dequantize()
            for name, weight in decoder.linear_weights(block).items()
        }
        for block in range(decoder.depth)
    ]
    unseen, activations = random_tokens(8, seed=1), activation_format(config)
    wanted = simulated_logits(decoder, None)(unseen)
    errors = [
        (simulated_logits(decoder, weights, activations)(unseen) - wanted).square().mean()
        for weights in (simulate(decoder, learnables), nearest)
    ]
    assert errors[0] < 0.6 * errors[1]

    # The experts alone: their output for the same inputs, in the last block.
    hidden = decoder.block_inputs(unseen)
    run_blocks(decoder, range(decoder.depth - 1), hidden, 8, out=hidden)
    last = decoder.depth - 1
    ours = {name: learnables[last].linear(name).closed_form for name in (GATE_UP, DOWN)}
    experts = [
        {name: weight.dequantize() for name, weight in ours.items()},
        {name: nearest[last][name] for name in ours},
    ]
    whole = decoder.run_block(last, hidden)
    if abits == 16:  # channel scales would have to go with the weights
        ours_error, nearest_error = (
            (decoder.run_block(last, hidden, weights) - whole).square().sum() for weights in experts
        )
        assert ours_error < 0.7 * nearest_error


@pytest.mark.parametrize("abits", [16, 8])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_each_expert_is_rounded_for_its_own_tokens_as_a_loop_over_them_says(
    architecture, abits, tiny, monkeypatch
) -> None:
    """The reference takes its inputs from hooks of the rounded model, expert by expert."""
    monkeypatch.setattr(expert_rounding, "TOKENS_PER_INPUT", 0.5)
    config = settings(abits=abits, channel_scale="off")
    model, tokens = tiny(architecture, num_hidden_layers=1), random_tokens(4)
    decoder, learnables = calibrated(model, tokens, config)
    rounded = {n: learnables[0].linear(n).closed_form for n in learnables[0].names}
    fmt, activations = learnables[0].fmt, activation_format(config)

    # What the experts receive once everything in front of them is rounded.
    weights = decoder.tensors(0) | {
        n: w.dequantize() for n, w in rounded.items() if n not in (GATE_UP, DOWN)
    }
    x, chosen = decoder.expert_inputs(0, decoder.block_inputs(tokens), weights, activations)
    scores = (x @ weights["mlp.gate.weight"].T).topk(2).indices
    assert torch.equal(scores.sort().values, chosen.sort().values)
    if activations is not None:
        x = fake_quantize_tokens(x, activations)

    for expert in range(4):
        mine = x[(chosen == expert).any(dim=1)]
        for name in (GATE_UP, DOWN):
            if name == GATE_UP:
                read = mine / (mine.double().square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
            else:
                gate, up = (mine @ rounded[GATE_UP][expert].dequantize().T).chunk(2, dim=1)
                read = nn.functional.silu(gate) * up
                if activations is not None:
                    read = fake_quantize_tokens(read, activations)
            weight = decoder.tensors(0)[name][expert]
            assert len(read) > weight.shape[1] / 2  # none is filled up
            curvature = factorize(read.double().T @ read.double())
            (wanted,) = round_layers(weight.T, curvature, [len(weight)], fmt)
            result = rounded[name][expert]
            assert (result.codes == wanted.codes).float().mean() > 0.98, (expert, name)
            lacking = [(q.dequantize() - weight).double() for q in (result, wanted)]
            ours, theirs = ((read.double() @ e.T).square().sum().item() for e in lacking)
            assert ours == pytest.approx(theirs, rel=0.02)


def test_moments_of_an_expert_with_few_tokens_are_filled_up_with_the_average_token(tiny) -> None:
    model, tokens = (
        with_starved_experts(tiny("qwen3_moe", num_hidden_layers=1), 1),
        random_tokens(4),
    )
    decoder = TransformersDecoder(model)
    run = expert_rounding.BlockRun(
        hidden=decoder.block_inputs(tokens),
        tensors=decoder.tensors(0),
        output_projection="self_attn.o_proj.weight",
    )
    other = replace(run, hidden=run.hidden.clone())
    experts = expert_rounding.reach_experts_(decoder, 0, (run, other), 2)
    assert experts.counts[3] == 0
    assert experts.tokens == tokens.numel()

    x, chosen = decoder.expert_inputs(0, decoder.block_inputs(tokens), decoder.tensors(0))
    own = {e: (chosen == e).any(dim=1) for e in range(4)}
    assert experts.counts == [int(mine.sum()) for mine in own.values()]
    for name in (GATE_UP, DOWN):
        moments = expert_rounding.collect_expert_moments(experts, name, range(1, 4))
        for expert, moment in zip(range(1, 4), moments, strict=True):
            read = x.double() / (x.double().square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
            if name == DOWN:
                gate, up = (x @ decoder.tensors(0)[GATE_UP][expert].T).chunk(2, dim=1)
                read = (nn.functional.silu(gate) * up).double()
            mine = read[own[expert]]
            missing = max(0, TOKENS_PER_INPUT * read.shape[1] - len(mine)) / len(read)
            wanted = mine.T @ mine + missing * read.T @ read
            assert expert < 3 or missing > 0
            torch.testing.assert_close(moment, wanted, rtol=1e-4, atol=1e-4)


def test_experts_without_tokens_are_named_once_and_rounded_for_all_tokens(tiny) -> None:
    told = []
    model = with_starved_experts(tiny("qwen3_moe"), 2)
    decoder, learnables = calibrated(
        model,
        random_tokens(4),
        settings(),
        on_rare_experts=lambda block, counts, least: told.append((block, counts, least)),
    )
    assert told == [(block, {2: 0, 3: 0}, 32) for block in range(3)]
    for block in range(3):
        for name in (GATE_UP, DOWN):
            result = learnables[block].linear(name).closed_form
            assert result.dequantize().isfinite().all()
            nearest = quantize_weight(decoder.linear_weights(block)[name], learnables[block].fmt)
            assert all((result[e].codes != nearest[e].codes).any() for e in (2, 3))


def test_experts_that_read_nothing_at_all_are_rounded_to_nearest_and_named(tiny) -> None:
    model, told = tiny("qwen3_moe", num_hidden_layers=1), {}
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[1] = 0.0  # its down projection reads zeros
    decoder, learnables = calibrated(
        model, random_tokens(4), settings(), on_rounded=lambda block, found: told.update(found)
    )
    assert told[(f"{DOWN}[1]",)] is None
    down = learnables[0].linear(DOWN).closed_form
    nearest = quantize_weight(decoder.linear_weights(0)[DOWN], learnables[0].fmt)
    assert torch.equal(down[1].codes, nearest[1].codes)
    assert not torch.equal(down[0].codes, nearest[0].codes)


def test_moments_collected_in_several_passes_give_the_same_codes(tiny, monkeypatch) -> None:
    _, whole = calibrated(tiny("qwen3_moe"), random_tokens(4), settings())
    monkeypatch.setattr(expert_rounding, "EXPERT_MOMENT_BYTES", 3 * 8 * 32**2)
    assert expert_passes(4, 32) == [range(3), range(3, 4)]
    _, parts = calibrated(tiny("qwen3_moe"), random_tokens(4), settings())
    for first, second in zip(whole, parts, strict=True):
        for one, other in zip(first.linears, second.linears, strict=True):
            assert torch.equal(one.closed_form.codes, other.closed_form.codes)
            assert torch.equal(one.closed_form.scale, other.closed_form.scale)


def test_rows_of_experts_are_those_of_the_tokens_that_chose_them() -> None:
    chosen = torch.tensor([[0, 2], [2, 4], [4, 0], [2, 0]])
    rows = [part.tolist() for part in rows_of_experts(chosen, 5)]
    assert rows == [[0, 2, 3], [], [0, 1, 3], [], [1, 2]]


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [(DENSE_FIRST, [1, 2]), ({"decoder_sparse_step": 2}, [1])],
)
def test_every_block_of_a_partly_dense_model_is_rounded_and_planned_for(
    changes, sparse, tiny
) -> None:
    told = {}
    decoder, learnables = calibrated(
        tiny("qwen3_moe", **changes), random_tokens(4), settings(), on_rounded=told.__setitem__
    )
    assert [b for b in range(3) if expert_weights(decoder.layout(b))] == sparse
    assert list(told) == [0, 1, 2]
    for block, of_block in enumerate(learnables):
        assert all(linear.is_rounded for linear in of_block.linears)
        nearest = {
            name: quantize_weight(weight, of_block.fmt)
            for name, weight in decoder.linear_weights(block).items()
        }
        assert all(
            (of_block.linear(name).closed_form.codes != weight.codes).any()
            for name, weight in nearest.items()
        )

    # Bits and memory are those of all blocks: 48 columns without groups are not 16.
    shape = decoder_shape(decoder)
    assert [
        set(linears) == set(decoder.layout(b).linears) for b, linears in enumerate(shape.blocks)
    ]
    assert len(shape.kinds()) == 2
    config = settings(group_size=None)
    plan = make_plan(config, shape, shape.layers)
    stored = total = 0
    for block in range(3):
        for weight in decoder.linear_weights(block).values():
            stored += weight.numel() * (3 + 16 / weight.shape[-1])
            total += weight.numel()
    assert plan.bits_per_weight == pytest.approx(stored / total)
    codes = plan.memory_gib["codes of all blocks (with eval text)"]
    assert codes == pytest.approx(3 / 8 * total / 2**30)


def test_each_weight_of_the_experts_has_bits_of_its_own(tiny) -> None:
    config = settings(
        bits_for=("layers.0.*=8", "experts.down_proj=2"), ignore=("layers.1.*.gate_up_proj",)
    )
    told = {}
    decoder, learnables = calibrated(
        tiny("qwen3_moe"), random_tokens(4), config, on_rounded=told.__setitem__
    )
    assert list(told) == [0, 1, 2]
    for block, bits in enumerate([(8, 2), (None, 2), (3, 2)]):
        for name, expected in zip((GATE_UP, DOWN), bits, strict=True):
            result = learnables[block].linear(name).closed_form
            if expected is None:
                assert result is None
                simulated = learnables[block](decoder.tensors(block))[name]
                assert torch.equal(simulated, decoder.tensors(block)[name])
                continue
            assert result.fmt.bits == expected
            assert 2 ** (expected - 1) < len(result.codes.unique()) <= 2**expected

    # More bits are closer to what the weights are.
    errors = [
        (learnables[block].linear(GATE_UP).closed_form.dequantize() - weight).square().mean()
        for block in (0, 2)
        for weight in [decoder.tensors(block)[GATE_UP]]
    ]
    assert errors[0] < 0.01 * errors[1]


@pytest.mark.parametrize(
    "ignore",
    [("experts.*",), ("self_attn.*",), ("gate_up_proj",), ("experts.down_proj",), ("layers.1.*",)],
)
def test_both_models_pass_through_experts_and_layers_that_are_left_out(ignore, tiny) -> None:
    config, tokens, kept = settings(ignore=ignore), random_tokens(4), {}

    def cache(name, hidden):
        kept[name] = hidden.clone()
        return kept[name]

    decoder, learnables = calibrated(tiny("qwen3_moe"), tokens, config, cache=cache)
    weights = simulate(decoder, learnables)
    exact = simulated = decoder.block_inputs(tokens)
    with torch.no_grad():
        for block in range(decoder.depth):
            exact = decoder.run_block(block, exact)
            simulated = decoder.run_block(block, simulated, weights[block])
    assert (simulated - exact).abs().max() > 1e-3
    torch.testing.assert_close(kept["x_fp"], exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept["x_q"], simulated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("qwen3_moe", {}, ["--wbits", 4]),
        ("mixtral", {}, ["--wbits", 4]),
        ("qwen3_moe", DENSE_FIRST, ["--wbits", 3, "--no-sym", "--format", "native"]),
        ("qwen3_moe", {}, ["--wbits", 4, "--abits", 8, "--format", "native"]),
        ("qwen3_moe", {}, [*MIXED, "--ignore", "layers.1.*.gate_up_proj", "--format", "native"]),
        ("qwen3_moe", {}, ["--bits-for", "self_attn.*=8", "layers.0.self_attn.*=3"]),
        ("qwen3_moe", DENSE_FIRST, ["--ignore", "experts.*", "--format", "native"]),
        ("mixtral", {}, ["--ignore", "self_attn.*", "layers.1.*", "--format", "native"]),
    ],
)
def test_the_written_folder_computes_what_was_simulated(
    architecture, changes, words, save, tmp_path, tokens, monkeypatch, capsys
) -> None:
    simulated = []

    def keep_logits(job: Job) -> Row:
        """The model that was calibrated, before the command forgets it."""
        weights = simulate(job.decoder, job.learnables)
        simulated.append(simulated_logits(job.decoder, weights, job.activations)(tokens))
        return result_row(job)

    monkeypatch.setattr(quantize_command, "result_row", keep_logits)
    out, text = tmp_path / "out", tmp_path / "text.txt"
    paths = [save(architecture, **changes), "--calib", text, "--eval-text", text, "--out", out]
    line = ["quantize", *paths, "--group-size", 8, "--nsamples", 8, "--seqlen", 32, *words]
    assert main("sliderquant", "sliderquant", COMMANDS, list(map(str, line))) == 0
    assert "rounded to nearest" not in capsys.readouterr().err

    native = "native" in words
    model = load(out) if native else AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, simulated[0], rtol=1e-5, atol=1e-5)
    report = json.loads((out / "run" / "report.json").read_text())
    full, nearest, ours = (row["metrics"]["perplexity text.txt"] for row in report["rows"])
    assert report["rows"][-1]["name"] == "compensated rounding"
    assert ours != nearest
    assert ours != full


def test_a_group_size_that_only_a_later_block_forbids_is_refused_before_any_work(save) -> None:
    """Block 0 is dense, with 64 inner features; the experts of the others have 16."""
    source = save("qwen3_moe", **DENSE_FIRST, intermediate_size=64)
    assert inspect(InspectConfig(model=str(source), group_size=16)).rounded_blocks == 3
    with pytest.raises(ShapeError, match=r"group_size 32 .* mlp.experts.down_proj \(16 columns\)"):
        inspect(InspectConfig(model=str(source), group_size=32))


def test_compressed_tensors_takes_no_experts_that_are_left_out(save, tmp_path, capsys) -> None:
    source, text, native = save("qwen3_moe"), tmp_path / "text.txt", tmp_path / "native"
    line = ["quantize", source, "--calib", text, "--group-size", 8, "--nsamples", 4, "--seqlen", 32]
    lines = [
        ([*line, "--ignore", "experts.*", "--out", tmp_path / "o"], 2),
        ([*line, "--ignore", "layers.1.*.down_proj", "--out", tmp_path / "o"], 2),
        ([*line, "--ignore", "experts.*", "--format", "native", "--out", native], 0),
        (["export", native, "--out", tmp_path / "o"], 2),
    ]
    for words, code in lines:
        assert main("sliderquant", "sliderquant", COMMANDS, list(map(str, words))) == code
        said = capsys.readouterr().err
        assert ("give experts bits, or use --format native" in said) == (code == 2)
    assert not (tmp_path / "o").exists()
