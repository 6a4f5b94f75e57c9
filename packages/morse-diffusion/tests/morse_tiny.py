"""Tiny pipelines from the real diffusers and transformers classes; nothing is downloaded."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
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
