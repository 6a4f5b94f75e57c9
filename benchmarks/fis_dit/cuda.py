"""Hot paths of fis-dit: one forward of a released video transformer, dense and frame-sparse.

    python -m benchmarks.fis_dit.cuda --predict
    python -m benchmarks.fis_dit.cuda --out runs/cuda

Clips of 81 frames at 1280 x 720, batch 1, bfloat16 as diffusers loads it, random weights. The sparse
forwards run through ``apply_fis`` at every second frame, after one that has made the index tensors.

Seven blocks stand for the whole model, and figures are multiplied: in sparse forwards the first one is
dense, as 6 of the 40 blocks of A14B and 8 of the 54 of HunyuanVideo 1.5 are by default. Peak memory is
that of the seven blocks; the others add their weights (0.65 GiB a block of A14B, 0.28 of HunyuanVideo).
What happens once in a forward is counted in a model without blocks and not multiplied.
"""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.hot_path_timing import main
from benchmarks.hot_paths import HotPath, Kit, Step
from fis_dit import FISConfig, apply_fis
from fis_dit.adapters.random_models import (
    ARCHITECTURES,
    Architecture,
    make_forward_inputs,
    make_random_transformer,
)

BLOCKS = 7
SPARSE = FISConfig(dense_head=1, dense_tail=0)
CLIP = "720p, 81 frames"

WAN = ARCHITECTURES["wan-a14b"]
HUNYUAN = replace(ARCHITECTURES["hy15"], latent=(65, 21, 45, 80), geometry=(21, 3600))
DEPTHS = {WAN.model: 40, HUNYUAN.model: 54}
TINY = {
    WAN.model: replace(ARCHITECTURES["tiny"], latent=(16, 5, 8, 8), geometry=(5, 16)),
    HUNYUAN.model: replace(
        HUNYUAN,
        settings={
            **HUNYUAN.settings,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "rope_axes_dim": (4, 6, 6),
        },
        latent=(65, 5, 4, 4),
        geometry=(5, 16),
    ),
}

# Of the tokens that HunyuanVideo 1.5 keeps for image, glyphs and prompt, this many are used by a prompt
# of two or three sentences that quotes nothing.
VALID_TOKENS = {729: 0, 256: 0, 1000: 200}


def forward(
    kit: Kit,
    tiny: bool,
    architecture: Architecture,
    config: FISConfig | None,
    blocks: int = BLOCKS,
) -> Step:
    """One forward, sparse unless ``config`` is none."""
    shapes = TINY[architecture.model] if tiny else architecture
    shapes = replace(shapes, settings={**shapes.settings, "num_layers": blocks})
    dtype = torch.float32 if tiny and kit.device.type == "cpu" else torch.bfloat16
    model: Any = kit.module(lambda: make_random_transformer(shapes, dtype))
    inputs = make_forward_inputs(shapes, model, lambda *shape: kit.randn(*shape, dtype=dtype))
    if architecture is HUNYUAN:
        for name, length in (("encoder_attention_mask", 1000), ("encoder_attention_mask_2", 256)):
            places = torch.arange(length, device=kit.device)[None]
            inputs[name] = (places < VALID_TOKENS[length]).long()
    if config is not None:
        apply_fis(model, config)

    # Block by block, as diffusers recommends and as the hooks allow.
    if getattr(kit, "compiled", False):
        model._compiled_call_impl = None
        if blocks:
            model.compile_repeated_blocks(fullgraph=True)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return model(**inputs)[0]

    return step


class HunyuanWaits:
    """What the host reads from the device when HunyuanVideo 1.5 sorts its text tokens."""

    def __init__(self) -> None:
        self._reads = dict.fromkeys(VALID_TOKENS, 0)

    def __call__(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Serve a read: whether there is no image, or the rows of a mask."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        from tests.cuda.costs import rows_for_masks

        # The rows of each mask are read in turn with those of its complement.
        length = args[1][0].shape[0]
        self._reads[length] += 1
        valid = VALID_TOKENS[length]
        rows = valid if self._reads[length] % 2 else length - valid
        return func(args[0], rows_for_masks(args[1], rows))


def path(architecture: Architecture, name: str, config: FISConfig | None) -> HotPath:
    """A forward of seven blocks, scaled to the whole model."""
    waits: dict[str, Any] = {}
    if architecture is HUNYUAN:
        waits["transformer_hunyuan_video15.py:forward"] = HunyuanWaits()
        waits["processors.py:__call__"] = VALID_TOKENS[1000]
    return HotPath(
        f"{name}, {CLIP} ({BLOCKS} blocks, scaled)",
        lambda kit, tiny: forward(kit, tiny, architecture, config),
        warm_up=int(config is not None),
        scaled=DEPTHS[architecture.model] / BLOCKS,
        once=lambda kit, tiny: forward(kit, tiny, architecture, None, blocks=0),
        allow=waits,
        compile=architecture is WAN,
    )


PATHS = [
    path(WAN, "one dense forward of Wan 2.2 A14B", None),
    path(WAN, "one sparse forward of Wan 2.2 A14B", SPARSE),
    path(HUNYUAN, "one dense forward of HunyuanVideo 1.5", None),
    path(HUNYUAN, "one sparse forward of HunyuanVideo 1.5", SPARSE),
    path(
        HUNYUAN,
        "one sparse forward of HunyuanVideo 1.5 without padded text",
        replace(SPARSE, drop_text_padding=True),
    ),
]

if __name__ == "__main__":
    main("fis_dit", PATHS)
