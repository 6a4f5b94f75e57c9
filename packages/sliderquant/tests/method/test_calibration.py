"""The calibration loop against independent forward passes of the host model."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from sliderquant.adapters.caches import ActivationCache
from sliderquant.adapters.decoder import TransformersDecoder
from sliderquant.adapters.simulation import (
    fresh_learnables,
    merge_,
    model_logits,
    simulated_logits,
    simulated_weights,
    weight_format,
)
from sliderquant.adapters.text import calibration_samples, chunks, encode
from sliderquant.config import SliderConfig
from sliderquant.method import window_passes, window_training
from sliderquant.method.activations import activation_format
from sliderquant.method.calibration import calibrate
from sliderquant.method.decoder import run_blocks
from sliderquant.method.learnables import BlockLearnables
from sliderquant.method.metrics import perplexity
from sliderquant.method.round_to_nearest import rtn_weights
from sliderquant.method.sampling import batches
from sliderquant.method.window_training import CalibrationDivergedError
from sliderquant.method.windows import make_windows


def settings(**changes) -> SliderConfig:
    base = {
        "wbits": 2,
        "group_size": 32,
        "sym": False,
        "epochs": 4,
        "batch_size": 4,
        "method": "slider",
    }
    base |= {"nsamples": 8, "seqlen": 64}
    return SliderConfig(**{**base, "lr_lora": 3e-3, "lr_lwc": 3e-2, **changes})


@pytest.fixture
def samples(loaded, corpus):
    stream = encode(corpus.train[:10], loaded.tokenizer)
    return calibration_samples(stream, 8, 64, 0)


def calibrated(decoder, samples, config, **hooks):
    learnables = fresh_learnables(decoder, config, torch.float32)
    windows = [] if config.method == "compensated" else make_windows(decoder.depth, config)
    calibrate(decoder, samples, windows, learnables, config, **hooks)
    return learnables


def test_replaying_the_blocks_gives_the_models_own_logits(decoder, loaded, samples) -> None:
    expected = model_logits(loaded.model)(samples)
    hidden = run_blocks(decoder, range(decoder.depth), decoder.block_inputs(samples), 3)
    torch.testing.assert_close(decoder.logits(hidden), expected, rtol=0, atol=1e-5)


def test_low_rank_correction_is_added_before_rounding(decoder) -> None:
    weights = decoder.linear_weights(0)
    config = settings()
    fmt = weight_format(config, torch.float32)
    made = BlockLearnables(weights, fmt, 4, torch.Generator().manual_seed(0))
    name, linear = made.names[2], made.linears[2]
    with torch.no_grad():
        linear.lora_b.normal_()
        linear.upper.fill_(50)
        linear.lower.fill_(50)
    corrected = weights[name].double() + linear.lora_b.double() @ linear.lora_a.double() / 4
    torch.testing.assert_close(linear.add_correction(weights[name]).double(), corrected)
    # With the clipping fully open, quantizing W~ by round-to-nearest must give the same weight.
    from sliderquant.method.quantizer import fake_quantize

    expected = fake_quantize(linear.add_correction(weights[name]), fmt)
    torch.testing.assert_close(made(weights)[name], expected)


def test_fresh_learnables_are_round_to_nearest_with_open_clipping(decoder) -> None:
    learnables = fresh_learnables(decoder, settings(), torch.float32)
    for linear in learnables[0].linears:
        assert torch.equal(linear.lora_b, torch.zeros_like(linear.lora_b))
        assert linear.upper.sigmoid().unique().item() == pytest.approx(1 / (1 + math.exp(-4)))
        bound = 1 / math.sqrt(linear.lora_a.shape[1])
        assert linear.lora_a.abs().max() <= bound
        assert linear.lora_a.abs().max() > 0.8 * bound


def test_calibration_beats_rounding_on_held_out_text(decoder, loaded, samples, corpus) -> None:
    config = settings()
    learned = simulated_weights(decoder, calibrated(decoder, samples, config))
    fmt = weight_format(config, torch.float32)
    rounded = [rtn_weights(decoder, block, fmt) for block in range(decoder.depth)]
    batches = list(chunks(encode([corpus.code[:20_000]], loaded.tokenizer), 64, 32))
    nll = {
        name: math.log(perplexity(simulated_logits(decoder, weights), batches))
        for name, weights in (("full", None), ("rtn", rounded), ("learned", learned))
    }
    assert nll["rtn"] - nll["learned"] > 0.2 * (nll["rtn"] - nll["full"])


def test_loss_falls_in_every_window(decoder, samples) -> None:
    results = []
    calibrated(decoder, samples, settings(gamma=1.0, epochs=6), on_window=results.append)
    assert [r.window for r in results] == [[0], [0, 1], [0, 1, 2], [2, 3], [3, 4], [4]]
    assert all(r.last_loss < r.first_loss for r in results)


def test_inputs_and_targets_are_the_relays(decoder, samples, monkeypatch) -> None:
    """x_q carries the error of the earlier blocks, x_fp none; the target is F(x_fp)."""
    seen = []

    def record(decoder, window, learnables, inputs, targets, **rest):
        with torch.no_grad():
            for block in window:
                for linear in learnables[block].linears:
                    linear.lora_b.normal_(generator=torch.Generator().manual_seed(block), std=0.01)
        seen.append((list(window), rest["ratio"], inputs.clone(), targets.clone()))
        return 1.0, 0.0, 0

    monkeypatch.setattr(window_passes, "train_window_guarded", record)
    config = settings(schedule="0-1,1-2,2-4", gamma=0.5)
    learnables = calibrated(decoder, samples, config)
    assert [(w, r) for w, r, _, _ in seen] == [
        (window, ratio) for ratio in (0.5, 1.0) for window in ([0, 1], [1, 2], [2, 3, 4])
    ]
    full = [decoder.block_inputs(samples)]
    for block in range(decoder.depth):
        full.append(run_blocks(decoder, [block], full[-1], 4))
    for window, ratio, inputs, targets in seen:
        assert torch.equal(targets, full[window[-1] + 1])
        simulated = full[0]
        for block in range(window[0]):
            weights = learnables[block](decoder.linear_weights(block), ratio)
            simulated = run_blocks(decoder, [block], simulated, 4, learnables, ratio)
            assert not torch.equal(
                weights[learnables[block].names[0]],
                decoder.linear_weights(block)[learnables[block].names[0]],
            )
        assert torch.equal(inputs, simulated)


def test_stages_cover_half_then_all_columns(decoder, samples) -> None:
    results = []
    calibrated(decoder, samples, settings(epochs=2), on_window=results.append)
    windows = make_windows(decoder.depth, settings())
    assert [r.ratio for r in results] == [0.5] * len(windows) + [1.0] * len(windows)
    assert [r.step for r in results] == list(range(1, 2 * len(windows) + 1))


def test_learning_rate_falls_linearly_to_zero(decoder, samples, monkeypatch) -> None:
    rates = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            assert all(group["weight_decay"] == 0 for group in self.param_groups)
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    calibrated(decoder, samples, settings(schedule="0-4", gamma=1.0, epochs=4))
    assert len(rates) == 8  # 4 epochs of 2 batches
    for step, groups in enumerate(rates):
        assert groups[0::2] == pytest.approx([3e-3 * (1 - step / 8)] * decoder.depth)
        assert groups[1::2] == pytest.approx([3e-2 * (1 - step / 8)] * decoder.depth)


def trained_by_slider(made):
    """Everything but the factors on scales that rounding in closed form has chosen."""
    return [p for name, p in made.named_parameters() if not name.endswith("log_rescale")]


def test_only_the_windows_blocks_change(decoder, samples) -> None:
    learnables = fresh_learnables(decoder, settings(), torch.float32)
    before = [[p.clone() for p in trained_by_slider(made)] for made in learnables]
    hidden = decoder.block_inputs(samples)
    targets = run_blocks(decoder, [1, 2], hidden, 4)
    window_training.train_window(
        decoder, [1, 2], learnables, hidden, targets, ratio=1.0, config=settings(), seed=(0,),
        on_update=lambda loss: None,
    )  # fmt: skip
    for block, (made, old) in enumerate(zip(learnables, before, strict=True)):
        pairs = zip(trained_by_slider(made), old, strict=True)
        changed = [not torch.equal(new, earlier) for new, earlier in pairs]
        assert all(changed) if block in (1, 2) else not any(changed)


def test_merged_model_equals_the_simulated_one(decoder, loaded, samples) -> None:
    weights = simulated_weights(decoder, calibrated(decoder, samples, settings(epochs=2)))
    expected = simulated_logits(decoder, weights)(samples)
    merge_(decoder, weights)
    torch.testing.assert_close(model_logits(loaded.model)(samples), expected, rtol=0, atol=1e-5)


def test_calibration_leaves_the_model_untouched(decoder, loaded, samples, model_directory) -> None:
    calibrated(decoder, samples, settings(epochs=2))
    fresh = AutoModelForCausalLM.from_pretrained(model_directory).state_dict()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, fresh[name])
    assert not any(block._forward_pre_hooks for block in decoder.blocks)


@pytest.mark.slow
def test_continuing_after_any_window_gives_the_same_bits(decoder, samples) -> None:
    config = settings(epochs=2)
    windows = make_windows(decoder.depth, config)
    states = {0: [made.state_dict() for made in fresh_learnables(decoder, config, torch.float32)]}
    learnables = fresh_learnables(decoder, config, torch.float32)

    def keep(result) -> None:
        states[result.step] = [
            {name: value.clone() for name, value in made.state_dict().items()}
            for made in learnables
        ]

    calibrate(decoder, samples, windows, learnables, config, on_window=keep)
    final = [made.state_dict() for made in learnables]
    for done in (1, 4, len(windows), len(windows) + 3, 2 * len(windows)):
        resumed = fresh_learnables(decoder, config, torch.float32)
        for made, state in zip(resumed, states[done], strict=True):
            made.load_state_dict(state)
        calibrate(decoder, samples, windows, resumed, config, done=done)
        for made, state in zip(resumed, final, strict=True):
            assert all(torch.equal(made.state_dict()[name], state[name]) for name in state)


def test_different_seeds_differ_and_the_same_seed_does_not(decoder, samples) -> None:
    states = []
    for seed in (0, 0, 1):
        made = calibrated(decoder, samples, settings(epochs=2, schedule="0-4", seed=seed))
        states.append(made[0].linears[0].lora_a)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_diverging_window_is_retried_slower_then_named(decoder, samples, monkeypatch) -> None:
    tried = []

    def explode(decoder, window, learnables, inputs, targets, *, rate, **rest):
        tried.append(rate)
        with torch.no_grad():
            learnables[window[0]].linears[0].lora_b.fill_(math.nan)
        raise CalibrationDivergedError("loss nan")

    monkeypatch.setattr(window_training, "train_window", explode)
    learnables = fresh_learnables(decoder, settings(), torch.float32)
    windows = [[0, 1], [2, 3, 4]]
    with pytest.raises(CalibrationDivergedError, match=r"blocks 0-1 diverged at ratio 0\.5"):
        calibrate(decoder, samples, windows, learnables, settings())
    assert tried == [1.0, 0.5, 0.25]
    assert torch.equal(learnables[0].linears[0].lora_b, torch.zeros(64, 4))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_update(decoder, samples, poison) -> None:
    learnables = fresh_learnables(decoder, settings(), torch.float32)
    before = [p.clone() for p in learnables[0].parameters()]
    hidden = decoder.block_inputs(samples)
    with pytest.raises(CalibrationDivergedError):
        window_training.train_window(
            decoder, [0], learnables, hidden, torch.full_like(hidden, poison), ratio=1.0,
            config=settings(), seed=(0,), on_update=lambda loss: None,
        )  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(learnables[0].parameters(), before, strict=True))


def test_window_order_runs_all_stages_inside_each_window(decoder, samples) -> None:
    results, finished = [], []
    config = settings(epochs=2, intra_order="window", schedule="0-1,1-2,3-4")
    calibrated(decoder, samples, config, on_window=results.append, on_block=finished.append)
    assert [(r.window, r.ratio) for r in results] == [
        (window, ratio) for window in ([0, 1], [1, 2], [3, 4]) for ratio in (0.5, 1.0)
    ]
    assert [r.step for r in results] == [1, 2, 3, 4, 5, 6]
    assert finished == [0, 1, 2, 3, 4]


def same(first, second) -> bool:
    """Whether two calibrations ended with the same bits."""
    return all(
        torch.equal(p, q)
        for one, other in zip(first, second, strict=True)
        for p, q in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_both_orders_are_the_same_without_stages(decoder, samples) -> None:
    states = [
        calibrated(decoder, samples, settings(gamma=1.0, intra_order=order, schedule="0-2,2-4"))
        for order in ("network", "window")
    ]
    assert same(*states)


@pytest.mark.parametrize("order", ["network", "window"])
def test_blocks_are_final_when_they_are_handed_out(decoder, samples, order) -> None:
    config = settings(epochs=2, intra_order=order)
    learnables = fresh_learnables(decoder, config, torch.float32)
    handed = {}

    def keep(block) -> None:
        state = learnables[block].state_dict()
        handed[block] = {name: value.clone() for name, value in state.items()}

    windows = make_windows(decoder.depth, config)
    calibrate(decoder, samples, windows, learnables, config, on_block=keep)
    assert list(handed) == list(range(decoder.depth))
    for block, made in enumerate(learnables):
        assert all(torch.equal(v, handed[block][n]) for n, v in made.state_dict().items())


def test_targets_can_see_the_quantized_models_input(decoder, samples, monkeypatch) -> None:
    seen = []

    def record(decoder, window, learnables, inputs, targets, **rest):
        seen.append((list(window), inputs.clone(), targets.clone()))
        return 1.0, 0.0, 0

    monkeypatch.setattr(window_passes, "train_window_guarded", record)
    calibrated(decoder, samples, settings(target_input="quant", gamma=1.0, schedule="0-1,2-4"))
    for window, inputs, targets in seen:
        assert torch.equal(targets, run_blocks(decoder, window, inputs, 4))


@pytest.mark.slow
def test_recomputing_blocks_changes_no_bit(decoder, samples, monkeypatch) -> None:
    config = settings(schedule="0-2,2-4", epochs=2, abits=8, quantize_attention=True)
    plain = calibrated(decoder, samples, config)
    monkeypatch.setattr(window_training, "RECOMPUTE_ABOVE", 0)
    assert same(plain, calibrated(decoder, samples, config))


def test_hidden_states_on_disk_change_no_bit(decoder, samples, tmp_path) -> None:
    config = settings(epochs=2, schedule="0-1,2-4")
    with ActivationCache(tmp_path / "cache") as cache:
        mapped = calibrated(decoder, samples, config, cache=cache)
        names = {path.name for path in (tmp_path / "cache" / "rank-0").iterdir()}
    assert names == {"x_fp", "x_q", "targets"}
    assert not (tmp_path / "cache" / "rank-0").exists()
    assert same(mapped, calibrated(decoder, samples, config))


def test_learning_rates_can_be_scaled_by_the_batch(decoder, samples) -> None:
    common = {"schedule": "0-4", "gamma": 1.0, "epochs": 1, "batch_size": 4}
    scaled = calibrated(decoder, samples, settings(**common, lr_scale_by_batch=True))
    fourfold = calibrated(decoder, samples, settings(**common, lr_lora=1.2e-2, lr_lwc=1.2e-1))
    for first, second in zip(scaled, fourfold, strict=True):
        torch.testing.assert_close(list(first.parameters()), list(second.parameters()))


@pytest.mark.slow
def test_channel_scaling_recovers_what_outlier_channels_cost(decoder, loaded, samples) -> None:
    """Outliers that leave the function as it is: a gain times 30, its readers' columns over 30."""
    with torch.no_grad():
        for block in decoder.blocks:
            attention, mlp = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[[3, 40]] *= 30
                for reader in readers:
                    reader.weight[:, [3, 40]] /= 30
    rates = {"lr_lora": 1e-3, "lr_lwc": 1e-2, "lr_scale": 1e-1, "epochs": 8, "gamma": 1.0}
    config = settings(wbits=8, abits=4, act_sym=True, schedule="block", **rates)
    learned = simulated_weights(decoder, calibrated(decoder, samples, config))
    fmt = activation_format(config)
    expected = model_logits(loaded.model)(samples)
    rounded = [rtn_weights(decoder, b, weight_format(config, torch.float32)) for b in range(5)]
    errors = [
        (simulated_logits(decoder, weights, fmt)(samples) - expected).square().mean().item()
        for weights in (rounded, learned)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_rare_experts_stay_as_they_were_made(tiny, tokens) -> None:
    decoder = TransformersDecoder(tiny("qwen3_moe"))
    config = settings(group_size=8, schedule="0-2", gamma=1.0, min_expert_tokens=24)
    learnables = fresh_learnables(decoder, config, torch.float32)
    fresh = [made.linear("mlp.experts.down_proj").upper.clone() for made in learnables]
    counts = {}
    calibrate(
        decoder, tokens, [[0, 1, 2]], learnables, config,
        on_experts=lambda block, seen: counts.__setitem__(block, seen),
    )  # fmt: skip
    hidden = decoder.block_inputs(tokens)
    for block in range(3):
        # Counted again by hand, from the router's own definition.
        module = decoder.blocks[block]
        caught = []
        hook = module.mlp.gate.register_forward_pre_hook(
            lambda _, args, c=caught: c.append(args[0])
        )
        hidden = run_blocks(decoder, [block], hidden, 4)
        hook.remove()
        top = (caught[0] @ module.mlp.gate.weight.T).topk(2).indices
        assert counts[block].tolist() == [(top == expert).sum().item() for expert in range(4)]
        trained = counts[block] >= 24
        changed = (learnables[block].linear("mlp.experts.down_proj").upper != fresh[block]).flatten(
            1
        )
        assert changed.any(dim=1).tolist() == trained.tolist()
    assert not all((seen >= 24).all() for seen in counts.values())


def test_batch_orders_are_permutations_that_change_with_the_epoch() -> None:
    drawn: dict[int, list[int]] = {}
    for epoch, index in batches(10, 3, 3, (2, 0, 1)):
        drawn.setdefault(epoch, []).extend(index.tolist())
    assert all(sorted(order) == list(range(10)) for order in drawn.values())
    assert all(a != b for a, b in pairwise(drawn.values()))


def test_windows_behind_rounding_change_scales_alone_and_lower_their_loss(decoder, samples) -> None:
    results, final = [], []
    base = {"wbits": 2, "group_size": 32, "sym": False, "nsamples": 8, "seqlen": 64}
    rounded = calibrated(decoder, samples, SliderConfig(**base))
    config = SliderConfig(**base, method="combined", range_epochs=4, lr_range=3e-3)
    learnables = calibrated(
        decoder, samples, config, on_window=results.append, on_block=final.append
    )

    # Every block is handed out once, behind its last window.
    assert final == list(range(decoder.depth))
    assert [result.ratio for result in results] == [1.0] * 6
    assert all(result.last_loss < result.first_loss for result in results)

    # Codes and zero points are those of compensated rounding, scales are not, nor far from them.
    for made, before in zip(learnables, rounded, strict=True):
        for name in made.names:
            new, old = made.linear(name).rescaled(), before.linear(name).rescaled()
            assert torch.equal(new.codes, old.codes)
            assert torch.equal(new.zero, old.zero)
            ratio = new.scale / old.scale
            assert not torch.equal(new.scale, old.scale)
            assert ratio.log().abs().max() < 0.2
        assert not any(linear.lora_b.any() for linear in made.linears)


def test_windows_behind_rounding_match_the_full_model_better(decoder, samples) -> None:
    base = {"wbits": 2, "group_size": 32, "sym": False, "nsamples": 8, "seqlen": 64}
    full = simulated_logits(decoder, None)(samples)
    errors = {}
    for method in ("compensated", "combined"):
        changes = {"range_epochs": 4} if method == "combined" else {}
        config = SliderConfig(**base, method=method, **changes)
        learnables = calibrated(decoder, samples, config)
        logits = simulated_logits(decoder, simulated_weights(decoder, learnables))(samples)
        errors[method] = (logits - full).square().mean().item()
    assert errors["combined"] < 0.95 * errors["compensated"]


def test_a_window_behind_rounding_that_diverges_names_its_own_rate(decoder, samples) -> None:
    base = {"wbits": 2, "group_size": 32, "sym": False, "nsamples": 8, "seqlen": 64}
    config = SliderConfig(**base, method="combined", lr_range=1e30)
    with pytest.raises(CalibrationDivergedError, match=r"lower lr_range$"):
        calibrated(decoder, samples, config)


@pytest.mark.parametrize("method", ["compensated", "combined"])
def test_a_model_in_float64_stays_in_it(method, tiny, tokens) -> None:
    decoder = TransformersDecoder(tiny("llama").double())
    config = SliderConfig(
        method=method, wbits=4, group_size=8, nsamples=len(tokens), seqlen=tokens.shape[1]
    )
    learnables = [made.double() for made in fresh_learnables(decoder, config, torch.float64)]
    windows = [[0, 1], [1, 2]] if method == "combined" else []
    calibrate(decoder, tokens, windows, learnables, config)
    logits = simulated_logits(decoder, simulated_weights(decoder, learnables))(tokens)
    assert logits.dtype == torch.float64
