"""Whole pipelines of tiny random components, and the commands that work on their directories."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from effml_common.errors import InputError
from fis_dit.adapters.apply import apply_fis
from fis_dit.adapters.pipelines import run_pipeline
from fis_dit.cli import COMMANDS
from fis_dit.config import FISConfig

CLIP = (21, 16, 16)  # 6 latent frames of 2 x 2 latent pixels, 1 token each
CONFIG = FISConfig(dense_head=1, dense_tail=1)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def characters() -> PreTrainedTokenizerFast:
    vocabulary = {chr(code): code - 30 for code in range(32, 127)} | {"<pad>": 0, "<unk>": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


def wan_transformer(made: Any = WanTransformer3DModel, **changes: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 16}
    sizes |= {"in_channels": 16, "out_channels": 16, "freq_dim": 16, "num_layers": 4}
    torch.manual_seed(0)
    return made(**{**sizes, "rope_max_seq_len": 32, **changes}).eval()


def wan_parts(**parts: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=100,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return {
        "tokenizer": characters(),
        "text_encoder": UMT5EncoderModel(text).eval(),
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    }


def make_wan() -> WanPipeline:
    return WanPipeline(**wan_parts(transformer=wan_transformer()))


def make_wan_a14b() -> WanPipeline:
    both = {"transformer": wan_transformer(), "transformer_2": wan_transformer()}
    return WanPipeline(**wan_parts(**both), boundary_ratio=0.8)


def make_wan_5b() -> WanPipeline:
    return WanPipeline(**wan_parts(transformer=wan_transformer()), expand_timesteps=True)


def make_wan_i2v() -> WanImageToVideoPipeline:
    parts = wan_parts(transformer=wan_transformer(in_channels=36))
    return WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None)


def make_wan_vace() -> WanVACEPipeline:
    made = wan_transformer(WanVACETransformer3DModel, vace_layers=[0, 2], vace_in_channels=96)
    return WanVACEPipeline(**wan_parts(transformer=made))


def make_hunyuan() -> HunyuanVideo15Pipeline:
    torch.manual_seed(0)
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling={"rope_type": "default", "mrope_section": [1, 1, 2]},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    t5 = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(qwen).eval(),
        tokenizer=characters(),
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=4,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=16,
            text_embed_2_dim=16,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type="t2v",
        ).eval(),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=1.0),
    )


MAKERS = {
    "wan": make_wan,
    "wan-a14b": make_wan_a14b,
    "wan-5b": make_wan_5b,
    "wan-i2v": make_wan_i2v,
    "wan-vace": make_wan_vace,
    "hunyuan-1.5": make_hunyuan,
}


@pytest.fixture
def ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a package that two pipelines want, where it is missing; prompts here are clean."""
    from diffusers.pipelines.wan import pipeline_wan_i2v, pipeline_wan_vace

    stand_in = SimpleNamespace(fix_text=lambda text: text)
    for module in (pipeline_wan_i2v, pipeline_wan_vace):
        monkeypatch.setattr(module, "ftfy", stand_in, raising=False)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "first.png"
    Image.new("RGB", (16, 16), (200, 30, 90)).save(path)
    return str(path)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pipeline_runs_end_to_end_and_is_itself_again(
    name: str, guidance: float, image, ftfy
) -> None:
    pipe = MAKERS[name]()
    pipe.set_progress_bar_config(disable=True)
    given = {"clip": CLIP, "steps": 4, "guidance": guidance, "seed": 0}
    given |= {"image": image} if name == "wan-i2v" else {}

    def run() -> np.ndarray:
        return np.asarray(run_pipeline(pipe, "a cat", **given))

    dense = run()
    config = FISConfig(dense_head=1, dense_tail=1, dense_steps=(-1,), num_inference_steps=4)
    with apply_fis(pipe, config) as handle:
        sparse = run()
        told = handle.summary()
        assert np.array_equal(run(), sparse)  # the steps are counted from 0 again
    assert np.array_equal(run(), dense)
    assert sparse.shape == dense.shape == (21, 16, 16, 3)
    assert not np.array_equal(sparse, dense)
    assert set(told) == (
        {"transformer", "transformer_2"} if name == "wan-a14b" else {"transformer"}
    )
    for transformer in told.values():
        assert transformer["frames"] == 6
        assert transformer["anchors"][0] == [0, 2, 4, 5]


def test_a_missing_ftfy_is_named(image, monkeypatch) -> None:
    from diffusers.pipelines.wan import pipeline_wan_i2v

    monkeypatch.delattr(pipeline_wan_i2v, "ftfy", raising=False)
    pipe = make_wan_i2v()
    with pytest.raises(InputError, match="pip install ftfy"):
        run_pipeline(pipe, "a cat", clip=CLIP, steps=1, guidance=1.0, seed=0, image=image)


def test_both_wan_transformers_know_the_global_step() -> None:
    pipe = make_wan_a14b()
    pipe.set_progress_bar_config(disable=True)
    with apply_fis(pipe, CONFIG) as handle:
        run_pipeline(pipe, "a cat", clip=CLIP, steps=4, guidance=1.0, seed=0)
        told = handle.summary()
    assert told["transformer_2"]["last_step"] == 3
    steps = [told[name]["forwards"] for name in ("transformer", "transformer_2")]
    assert steps[0] > 0
    assert sum(steps) == 4


def call(name: str, *words: str, tmp_path: Path) -> int:
    from effml_common.cli import main

    return main("fis-dit", "fis-dit", COMMANDS, [name, *words])


@pytest.fixture
def wan_directory(tmp_path: Path) -> Path:
    make_wan().save_pretrained(tmp_path / "wan")
    return tmp_path / "wan"


SIZE = ("--height", "16", "--width", "16", "--num-frames", "21")


def test_generate_writes_both_clips_their_distance_and_the_plan(wan_directory, tmp_path) -> None:
    out = tmp_path / "out"
    words = (str(wan_directory), *SIZE, "--compare-dense", "--dtype", "float32", "--out", str(out))
    assert call("generate", *words, "--format", "gif", tmp_path=tmp_path) == 0
    report = json.loads((out / "run" / "report.json").read_text())
    row = next(row for row in report["rows"] if row["name"] == "FIS")
    assert row["metrics"]["relative L2"]["mean"] > 0
    for name in ("FIS", "dense"):
        metrics = next(row for row in report["rows"] if row["name"] == name)["metrics"]
        assert 0 < metrics["transformer seconds"]["mean"] < metrics["seconds"]["mean"]
    for name in ("fis.gif", "dense.gif"):
        with Image.open(out / name) as clip:
            assert clip.size == (16, 16)
    assert FISConfig.from_json((out / "run" / "plan.json").read_text()).stride == 2


def test_a_comparison_makes_one_step_of_each_kind_before_it_times_any(
    wan_directory, tmp_path, monkeypatch
) -> None:
    generate = importlib.import_module("fis_dit.generate")
    steps: list[tuple[int, str]] = []

    def watch(*args: Any, **settings: Any) -> Any:
        steps.append((settings["steps"], settings["output_type"]))
        return run_pipeline(*args, **settings)

    monkeypatch.setattr(generate, "run_pipeline", watch)
    words = (str(wan_directory), *SIZE, "--dtype", "float32", "--out", str(tmp_path / "out"))
    assert call("generate", *words, "--compare-dense", tmp_path=tmp_path) == 0
    assert steps == [(1, "latent"), (4, "np")] * 2
    steps.clear()
    assert call("generate", *words, tmp_path=tmp_path) == 0
    assert steps == [(4, "np")]


def test_generate_writes_mp4_where_imageio_is_there(wan_directory, tmp_path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    words = (str(wan_directory), *SIZE, "--dtype", "float32", "--out", str(tmp_path / "out"))
    assert call("generate", *words, "--format", "mp4", tmp_path=tmp_path) == 0
    assert (tmp_path / "out" / "fis.mp4").stat().st_size > 100


def test_a_plan_of_the_command_line_is_one_that_generate_takes(
    wan_directory, tmp_path, capsys
) -> None:
    prompts, plan = tmp_path / "prompts.txt", tmp_path / "plan.json"
    prompts.write_text("a cat\n\na dog\n")
    words = (str(wan_directory), "--prompts", str(prompts), *SIZE, "--out", str(plan))
    for method in ("local", "endpoint"):
        capsys.readouterr()
        extra = ("--target-speedup", "1.01", "--method", method, "--json")
        assert call("plan", *words, *extra, tmp_path=tmp_path) == 0
        told = json.loads(capsys.readouterr().out)
        chosen = FISConfig.from_json(plan.read_text())
        assert told["sparse_blocks"] == list(chosen.blocks)
        assert told["speedup"] >= 1.01
        # The blocks of lowest score are the sparse ones.
        ranked = sorted(range(4), key=lambda block: told["scores"][block])
        assert sorted(ranked[: len(chosen.blocks)]) == list(chosen.blocks)
    assert (chosen.layers, chosen.frames) == (4, 6)
    again = (str(wan_directory), *SIZE, "--plan", str(plan), "--dtype", "float32")
    assert call("generate", *again, "--out", str(tmp_path / "o"), tmp_path=tmp_path) == 0


def test_inspect_tells_cost_from_configs_alone(wan_directory, tmp_path, capsys) -> None:
    for file in wan_directory.rglob("*.safetensors"):
        file.unlink()
    words = (str(wan_directory), *SIZE, "--json")
    assert call("inspect", *words, tmp_path=tmp_path) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["frames"], told["tokens_per_frame"], told["depth"]) == (6, 1, 4)
    assert told["parameters"] == sum(p.numel() for p in wan_transformer().parameters())
    assert told["anchors"] == [[0, 2, 4, 5], [0, 1, 3, 5]]


def test_inspect_of_the_released_shapes_gives_the_known_speed_up(tmp_path, capsys) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    assert call("inspect", str(file), "--json", tmp_path=tmp_path) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] / 1e9 == pytest.approx(14.29, abs=0.01)
    assert (told["frames"], told["tokens_per_frame"]) == (21, 3600)
    assert told["speedup"] == pytest.approx(2.15, abs=0.01)
    assert told["dense_pflop"] == pytest.approx(6.52, abs=0.01)
    assert call("inspect", str(file), tmp_path=tmp_path) == 0
    assert "2.15x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("generate", "nowhere"), "model_index.json"),
        (("inspect", "nowhere"), "config.json"),
        (("plan", "nowhere", "--prompts", "nothing.txt"), "nothing.txt"),
        (("bench", "--arch", "wan-a14b"), "hours a forward"),
        (("bench", "--settings", "mlp-n2"), "mlp-n2"),
        (("demo", "--clips", "1"), "clips"),
        (("generate", "nowhere", "--plan", "no-plan.json"), "no-plan.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_bad_command_line_is_one_line_and_writes_nothing(
    words, told: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*words, tmp_path=tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if not line.startswith("device: ")]
    assert error.startswith("error: ")
    assert told in error
    assert "; " in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["not json", "[]", '{"_class_name": "FluxTransformer2DModel"}', "{}"]
)
def test_a_config_that_is_none_is_one_line(content: str, tmp_path, capsys) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    assert call("inspect", str(file), tmp_path=tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_bench_builds_its_model_in_the_final_type() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    bench = importlib.import_module("fis_dit.bench")  # the package's name is the function
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
        model, _ = bench.build(
            bench.ARCHITECTURES["tiny"], torch.device("cpu"), dtype=torch.bfloat16
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

    bench = importlib.import_module("fis_dit.bench")  # the package's name is the function
    tiny = bench.ARCHITECTURES["tiny"]
    small = dataclasses.replace(tiny, latent=(16, 5, 8, 8), geometry=(5, 16))
    monkeypatch.setitem(bench.ARCHITECTURES, "tiny", small)
    words = ("--repeats", "2", "--warmup", "0", "--settings", "block-n2", "attn-n2-full", "--json")
    assert call("bench", *words, "--out", str(tmp_path), tmp_path=tmp_path) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["dense", "block-n2", "attn-n2-full"]
    assert all(row["metrics"]["seconds"]["n"] == 2 for row in rows)


def clip_of(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(run_pipeline(pipe, "a cat", clip=CLIP, steps=4, guidance=1.0, seed=0))


@pytest.mark.cuda
def test_a_pipeline_on_a_card_makes_the_clip_of_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipe = make_wan_a14b()
    with apply_fis(pipe, CONFIG):
        expected = clip_of(pipe)
        pipe.to("cuda")  # moved after it was made sparse
        np.testing.assert_allclose(clip_of(pipe), expected, atol=1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("applied", ["before", "after"])
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("keys", ["anchor", "full"])
def test_an_offloaded_pipeline_on_a_card_makes_the_same_clip(
    how: str, applied: str, keys: str, monkeypatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = FISConfig(dense_head=1, dense_tail=1, kv=keys)
    pipe = make_wan_a14b()
    with apply_fis(pipe, config):
        expected = clip_of(pipe)
    if applied == "after":
        getattr(pipe, how)()
    with apply_fis(pipe, config):
        if applied == "before":
            getattr(pipe, how)()
        for _ in range(2):
            np.testing.assert_allclose(clip_of(pipe), expected, atol=1e-2)
