"""Tiny pipelines from the real diffusers and transformers classes; nothing is downloaded."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SCHEDULE = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(**options) -> DDIMScheduler:
    settings = {"clip_sample": False, "timestep_spacing": "trailing", **SCHEDULE, **options}
    return DDIMScheduler(num_train_timesteps=1000, **settings)


def tiny_unet(side: int = 16, channels: int = 3) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, block_out_channels=(8, 16),
        layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=8,
    ).eval()  # fmt: skip


def tiny_conditional_unet(xl: bool = False, inputs: int = 4, **options) -> UNet2DConditionModel:
    torch.manual_seed(0)
    extra = (
        {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80, "use_linear_projection": True,
        }
        if xl
        else {}
    )  # fmt: skip
    return UNet2DConditionModel(
        sample_size=16, in_channels=inputs, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
        cross_attention_dim=64 if xl else 32, attention_head_dim=8, **extra, **options,
    ).eval()  # fmt: skip


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, sample_size=32,
    ).eval()  # fmt: skip


def tiny_tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        bos_token_id=76, eos_token_id=77, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=78, pad_token_id=77, projection_dim=32,
    )  # fmt: skip


def tiny_pixels() -> DDIMPipeline:
    pipe = DDIMPipeline(unet=tiny_unet(), scheduler=ddim())
    pipe.scheduler = ddim()  # the pipeline's constructor switches its scheduler back to defaults
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd(**unet) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(text_config()).eval(),
        tokenizer=tiny_tokenizer(), unet=tiny_conditional_unet(**unet), scheduler=ddim(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.scheduler = ddim()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config()).eval(),
        tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(),
        unet=tiny_conditional_unet(xl=True), scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip
    pipe.scheduler = ddim()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_dit():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, attention_bias=True, num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate", norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    pipe = DiTPipeline(transformer=lively(transformer).eval(), vae=tiny_vae(), scheduler=ddim())
    pipe.scheduler = ddim()
    pipe.set_progress_bar_config(disable=True)
    inputs = {"class_labels": [1, 2], "guidance_scale": 3.0, "output_type": "np"}
    return pipe, inputs, {"guidance_scale": 3.0}


def tiny_pixart():
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=32, in_channels=4, cross_attention_dim=16, out_channels=8,
        attention_bias=True, num_embeds_ada_norm=1000, use_additional_conditions=False,
        norm_type="ada_norm_single", norm_elementwise_affine=False,
    )  # fmt: skip
    pipe = PixArtAlphaPipeline(
        transformer=lively(transformer).eval(), vae=tiny_vae(), scheduler=ddim(),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip
    pipe.scheduler = ddim()
    pipe.set_progress_bar_config(disable=True)
    text, mask = torch.randn(1, 8, 32), torch.ones(1, 8)
    inputs = {
        "prompt_embeds": text, "prompt_attention_mask": mask, "negative_prompt": None,
        "negative_prompt_embeds": -text, "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0, "output_type": "latent", "height": 32, "width": 32,
        "use_resolution_binning": False, "return_dict": False,
    }  # fmt: skip
    return pipe, inputs, {"guidance_scale": 3.0}


def tiny_sd3():
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=24,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=lively(transformer).eval(), vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    text, pooled = torch.randn(1, 8, 32), torch.randn(1, 64)
    inputs = {
        "prompt_embeds": text, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": -text,
        "negative_pooled_prompt_embeds": -pooled, "guidance_scale": 3.0, "output_type": "latent",
        "height": 32, "width": 32, "return_dict": False,
    }  # fmt: skip
    return pipe, inputs, {}


def tiny_flux():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = FluxPipeline(
        transformer=lively(transformer).eval(), vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    text, pooled = torch.randn(1, 8, 32), torch.randn(1, 32)
    inputs = {
        "prompt_embeds": text, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": -text,
        "negative_pooled_prompt_embeds": -pooled, "true_cfg_scale": 3.0, "output_type": "latent",
        "height": 32, "width": 32, "return_dict": False,
    }  # fmt: skip
    return pipe, inputs, {"guidance_scale": 3.0, "calls_per_step": 2}


def lively(network):
    """Layers that these classes start at zero would make every output zero."""
    for p in network.parameters():
        if float(p.detach().abs().max()) == 0:
            torch.nn.init.normal_(p, std=0.05)
    return network
