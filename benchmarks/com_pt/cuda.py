"""Hot paths of com-pt: a training step of CLIP and of Llama, growth, and an evaluation's forward passes.

The steps are ``com_pt.training.step.train_step`` on modules and optimizers that accelerate has
prepared, as in the trainer, in bf16 autocast; on a fake device without autocast they run in float32 as
they are. AdamW is fused, and each step is one that is logged: it reads its values once.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.hot_path_timing import main
from benchmarks.hot_paths import HotPath, Kit, count, print_table
from com_pt.adapters.accelerator import make_accelerator
from com_pt.adapters.grow import grow
from com_pt.adapters.open_clip_models import build_clip, clip_config
from com_pt.method.losses import InverseFeatureLoss
from com_pt.method.metrics import encode_images, encode_texts
from com_pt.method_config import ChainConfig, StageConfig
from com_pt.training.frozen import hold_in_autocast_type
from com_pt.training.optimizer import make_optimizer
from com_pt.training.stage_model import StageModel
from com_pt.training.step import train_step
from com_pt.training.tasks.base import Task
from com_pt.training.tasks.causal_lm import CausalLMTask
from com_pt.training.tasks.clip import ClipTask
from effml_common.stopping import StepMonitor

WAITS = {"stopping.py:read": 0.0}  # an update that is logged reads its values once
VOCABULARY = 49408


def clip_step(
    kit: Kit, tiny: bool, micro_batches: int = 1, images: int = 256, alone: bool = False
) -> Callable[[], object]:
    """One update of a ViT-L/16 CLIP beside a frozen ViT-B/16, or alone; one caption an image."""
    small, large = clip_specs(tiny)
    batch, size = (4, 32) if tiny else (images, 224)
    data = (kit.randn(batch, 3, size, size), kit.randint(VOCABULARY, batch, 1, 77))
    return training(kit, ClipTask({}), None if alone else small, large, data, micro_batches)


def llama_step(
    kit: Kit, tiny: bool, micro_batches: int = 1, use_cache: bool = True
) -> Callable[[], object]:
    """One update of a Llama of 1.2 billion parameters beside one of 0.3.

    The library keeps keys and values unless it is told not to; its empty cache cannot be made on the
    device that is registered from Python.
    """
    sizes = ((64, 2), (128, 2)) if tiny else LLAMAS
    small, large = ({**llama_spec(*size), "use_cache": use_cache} for size in sizes)
    data = kit.randint(small["vocab_size"], 4, 32 if tiny else 2048)
    return training(kit, CausalLMTask({}), small, large, data, micro_batches)


def growth(kit: Kit, tiny: bool) -> Callable[[], object]:
    """A ViT-L/16 CLIP from a ViT-B/16, where their weights are."""
    small, large = (
        kit.module(lambda spec=spec: build_clip(clip_config(spec))) for spec in clip_specs(tiny)
    )
    return lambda: grow(small, large)


def evaluation(kit: Kit, tiny: bool) -> Callable[[], object]:
    """Unit embeddings of 256 images and 256 texts by a ViT-L/16 CLIP, as ``eval`` makes them."""
    model = kit.module(lambda: build_clip(clip_config(clip_specs(tiny)[1]))).eval()
    batch, size = (4, 32) if tiny else (256, 224)
    images, tokens = kit.randn(batch, 3, size, size), kit.randint(VOCABULARY, batch, 77)

    def embed() -> object:
        with kit.autocast():
            return encode_images(model, images), encode_texts(model, tokens)

    return embed


def training(
    kit: Kit, task: Task, small: Any, large: Any, data: Any, micro_batches: int = 1
) -> Callable[[], object]:
    """A step of the large model, with the small one as its predecessor if there is one.

    All is as the trainer prepares it. Each step is one that is logged.
    """
    autocast = kit.device.type in ("cpu", "cuda")
    accelerator = (
        make_accelerator("bf16", kit.device) if autocast
        else make_accelerator("fp32", torch.device("cpu"))
    )  # fmt: skip
    accelerator.device_placement = False

    # Widths differ between the Llamas, so that a projector is trained beside the model.
    loss, predecessor = None, None
    if small is not None:
        pair = (
            (large["hidden_size"], small["hidden_size"]) if "hidden_size" in large else (512, 512)
        )
        loss = InverseFeatureLoss(dict.fromkeys(task.streams, pair))
        predecessor = held(kit, task, small, accelerator)
    stage: Any = kit.module(lambda: StageModel(task, task.build(large).train(), loss))

    settings = StageConfig(name="L", model=large)
    chain = ChainConfig(task="clip", stages=(settings,))
    optimizer = make_optimizer(stage, chain, settings, fused=True)
    make_moments(optimizer)
    wrapped = stage
    if autocast:
        wrapped, optimizer = accelerator.prepare(stage, optimizer)
    monitor = StepMonitor(kit.device)

    def update() -> object:
        train_step(
            stage,
            wrapped,
            predecessor,
            data,
            optimizer,
            accelerator,
            monitor=monitor,
            micro_batches=micro_batches,
        )
        return monitor.read()

    return update


def held(kit: Kit, task: Task, spec: Any, accelerator: Any) -> Any:
    """A frozen predecessor in the types that ``hold_in_autocast_type`` gives it."""

    def make() -> StageModel:
        model = task.build(spec).eval().requires_grad_(False)
        hold_in_autocast_type(model, accelerator)
        return StageModel(task, model, None)

    return kit.module(make)


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Let AdamW make its moments, as its first update does, without a forward pass."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def clip_specs(tiny: bool) -> tuple[Any, Any]:
    """Predecessor and successor."""
    if not tiny:
        return "compt-ViT-B-16", "compt-ViT-L-16"
    return tuple(
        {
            "embed_dim": 512,
            "vision_cfg": {"image_size": 32, "layers": layers, "width": width, "patch_size": 16},
            "text_cfg": {"width": width, "heads": width // 64, "layers": layers},
        }
        for width, layers in ((64, 1), (128, 2))
    )  # pyright: ignore


LLAMAS = ((1024, 12), (2048, 16))  # width and layers; the larger is Llama 3.2 1B


def llama_spec(width: int, layers: int) -> dict[str, Any]:
    """A Llama 3.2 of this width: heads of 64 in groups of four, the embedding tied."""
    return {
        "vocab_size": 128256 if width >= 1024 else 257,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(4, width // 64),
        "num_key_value_heads": max(1, width // 256),
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }


PATHS = [
    HotPath(
        "CLIP step, ViT-L/16 beside ViT-B/16, batch 256", clip_step, fake="cpu", allow=WAITS
    ),
    HotPath(
        "Llama step, 1.2B beside 0.3B, 4 x 2048 tokens", llama_step, fake="cpu", allow=WAITS
    ),
    HotPath(
        "growth, CLIP ViT-B/16 to ViT-L/16", growth,
        allow={"growth.py:check_weights": 1.0}, compile=False,
    ),
    HotPath("evaluation, CLIP ViT-L/16, 256 images and texts", evaluation),
]  # fmt: skip

# What the predecessor adds at the paper's batch, which takes eight cards; counted and not timed.
PAPERS_BATCH = 1024
ALONE, BESIDE = (
    HotPath(
        f"CLIP step, ViT-L/16 {name}, batch {PAPERS_BATCH:,}",
        partial(clip_step, images=PAPERS_BATCH, alone=alone), fake="cpu", allow=WAITS,
    )
    for name, alone in (("alone", True), ("beside ViT-B/16", False))
)  # fmt: skip


def predecessor_overhead(alone: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, float]:
    """What a predecessor adds to a step, as shares of the step alone, from both counts."""
    flops = [sum(cost["flops"].values()) for cost in (alone, beside)]
    pairs = {"FLOPs": flops}
    for name, figure in (
        ("device time", "device_ms"),
        ("launches", "launches"),
        ("memory", "peak"),
    ):
        pairs[name] = [alone[figure], beside[figure]]
    pairs["bytes"] = [cost["read"] + cost["written"] for cost in (alone, beside)]
    return {name: after / before - 1 for name, (before, after) in pairs.items()}


def print_overhead() -> None:
    """Print both counts, and what the predecessor adds."""
    costs = {path.name: count(path) for path in (ALONE, BESIDE)}
    print()
    print_table([(name, cost, {}) for name, cost in costs.items()])
    shares = predecessor_overhead(*costs.values())
    print(f"the predecessor adds {', '.join(f'{v:.1%} {name}' for name, v in shares.items())}")


if __name__ == "__main__":
    main("com_pt", PATHS)
    if "--predict" in sys.argv:
        print_overhead()
