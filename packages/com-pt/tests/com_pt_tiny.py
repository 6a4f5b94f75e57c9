"""Tiny models of the real classes, and small data on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch

from com_pt.training.tasks.clip import ClipTask

torch.set_num_threads(1)
WORDS = ["red", "green", "blue", "a", "square", "picture", "of"]


def clip(width: int = 32, layers: Any = 2, *, text: int | None = None, text_layers: int = 2,
         custom: bool = False, embed: int = 32, patch: int = 4, vocab: int = 10, length: int = 8,
         size: Any = (8, 16), **vision: Any) -> Any:  # fmt: skip
    """An open_clip model for 8x16 pictures, heads of 16 channels."""
    from com_pt.adapters.open_clip_models import build_clip

    return build_clip(spec(width, layers, text=text, text_layers=text_layers, custom=custom,
                           embed=embed, patch=patch, vocab=vocab, length=length, size=size,
                           **vision)).eval()  # fmt: skip


def spec(width: int = 32, layers: Any = 2, *, text: int | None = None, text_layers: int = 2,
         custom: bool = False, embed: int = 32, patch: int = 4, vocab: int = 10, length: int = 8,
         size: Any = (8, 16), **vision: Any) -> dict[str, Any]:  # fmt: skip
    text = text or width
    made = {
        "embed_dim": embed,
        "vision_cfg": {"image_size": size if isinstance(size, int) else list(size),
                       "layers": layers, "width": width,
                       "patch_size": patch, "head_width": 16, **vision},
        "text_cfg": {"context_length": length, "vocab_size": vocab, "width": text,
                     "heads": text // 16, "layers": text_layers},
    }  # fmt: skip
    return {**made, "custom_text": True} if custom else made


def spec_with_swin() -> dict[str, Any]:
    settings = spec(32)
    settings["vision_cfg"] = {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "avg",
                              "timm_proj": "linear", "image_size": 224}  # fmt: skip
    return settings


def vit(width: int = 32, depth: int = 2, **more: Any) -> Any:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=width, depth=depth,
        num_heads=width // 16, **{"num_classes": 5, **more},
    ).eval()  # fmt: skip


def swin(width: int = 16, depths: tuple[int, ...] = (1, 1)) -> Any:
    import timm

    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=width, depths=depths,
        num_heads=tuple(width * 2**i // 16 for i in range(len(depths))), num_classes=5,
    ).eval()  # fmt: skip


def llama_settings(width: int = 32, depth: int = 2, **more: Any) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth,
            "num_attention_heads": width // 8, "num_key_value_heads": width // 16, "head_dim": 8,
            "vocab_size": 257, "max_position_embeddings": 64, **more}  # fmt: skip


def llama(width: int = 32, depth: int = 2, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**llama_settings(width, depth, **more))
    return transformers.LlamaForCausalLM(config).eval()


def features(model: Any, size: tuple[int, int] = (8, 16)) -> dict[str, torch.Tensor]:
    """Outputs of a CLIP model on fixed random inputs."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(4, 3, *size, generator=generator)
    ids = torch.randint(1, 9, (4, 8), generator=generator)
    with torch.no_grad():
        return {"image": model.encode_image(images), "text": model.encode_text(ids)}


def clip_data(folder: Path, **more: Any) -> dict[str, Any]:
    return {"train": str(folder / "captions.tsv"), "tokenizer": WORDS, "context_length": 8,
            "image_size": [8, 16], "captions": 2, **more}  # fmt: skip


def clip_chain(folder: Path, *widths: int, **more: Any) -> dict[str, Any]:
    """The document of a chain file."""
    stages = [{"name": f"W{w}", "model": spec(w)} for w in widths]
    return {"task": "clip", "data": clip_data(folder), "stages": stages, "batch_size": 8,
            "epochs": 2, "lr": 1e-3, "warmup_steps": 2, "individual_epochs": 2, "log_every": 1,
            **more}  # fmt: skip


def task_of(folder: Path, **more: Any) -> ClipTask:
    return ClipTask(clip_data(folder, **more))
