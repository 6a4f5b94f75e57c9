"""Whole pipelines of tiny random components, and the command line on their directories."""

from typing import Any

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

from effml_common.cli import main
from fis_dit.cli import COMMANDS

CLIP = (21, 16, 16)  # 6 latent frames of 2 x 2 latent pixels, 1 token each


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


SIZE = ("--height", "16", "--width", "16", "--num-frames", "21")


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
    pipe = HunyuanVideo15Pipeline(
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
    # Of 1,985 tokens beside the clip's, most would be padding.
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 24, 16
    pipe.vision_num_semantic_tokens = 9
    return pipe


MAKERS = {
    "wan": make_wan,
    "wan-a14b": make_wan_a14b,
    "wan-5b": make_wan_5b,
    "wan-i2v": make_wan_i2v,
    "wan-vace": make_wan_vace,
    "hunyuan-1.5": make_hunyuan,
}


def call(*words: str) -> int:
    """Run one command line in this process and return its exit code."""
    return main("fis-dit", "fis-dit", COMMANDS, list(words))
