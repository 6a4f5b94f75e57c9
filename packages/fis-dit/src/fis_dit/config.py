"""Every setting of fis-dit: its default, its unit and its check, once.

The symbols are those of "Frame Interleaved Sparsity" (arXiv 2605.11869): ``stride`` is n, the sparse
blocks are counted by j, ``step_shift`` rotates the residue over denoising steps (ours).
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from effml_common.device import DEVICE_HELP
from effml_common.errors import ConfigError
from effml_common.settings import require, setting

SCHEMA = 1
Lift = Literal["residual", "hold", "carry", "state"]
Sites = Literal["block", "attn"]
Keys = Literal["anchor", "full"]
Pattern = Literal["interleaved", "static", "random"]
Preset = Literal["paper-like", "quality", "safe"]
PRESETS: dict[str, dict[str, Any]] = {
    "paper-like": {"stride": 2},
    "quality": {"stride": 2, "step_shift": 1},
    "safe": {"stride": 2, "sites": "attn", "step_shift": 1, "dense_steps": (-1,)},
}


def _count(config: Any, *names: str, least: int = 1) -> None:
    for name in names:
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(
            whole and value >= least,
            f"{name} must be {least} or more, got {value!r}",
            "give a count",
        )


def _choice(config: Any, name: str, allowed: Any) -> None:
    value, known = getattr(config, name), get_args(allowed)
    require(value in known, f"{name} is {value!r}", f"use one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class FISConfig:
    """Which frames of which blocks are computed, and how the others are filled in.

    Raises:
        ConfigError: A ``ValueError`` that names the field that is wrong.
    """

    stride: int = setting(2, "n: about one latent frame in n is computed in a sparse block")
    blocks: tuple[int, ...] | None = setting(
        None, "sparse blocks; none for all but dense_head first and dense_tail last ones"
    )
    dense_head: int | None = setting(None, "dense blocks at the front; none for 7.5 % of the depth")
    dense_tail: int | None = setting(None, "dense blocks at the end; none for 7.5 % of the depth")
    dense_steps: tuple[int, ...] = setting((), "denoising steps left dense; -1 is the last one")
    lift: Lift = field(
        default="residual",
        metadata={"help": "how skipped frames are filled: residual, hold, carry, state"},
    )
    sites: Sites = field(
        default="block",
        metadata={"help": "what is sparse: the whole block, or attn, its self-attention"},
    )
    kv: Keys = field(
        default="anchor",
        metadata={"help": "keys and values from anchor frames, or (Wan only) from full"},
    )
    pattern: Pattern = field(
        default="interleaved",
        metadata={
            "help": "interleaved over depth (the method); static and random are for comparison"
        },
    )
    boundaries: bool = setting(True, "always compute the first and the last frame")
    condition_frames: tuple[int, ...] = setting(
        (), "frames that feed no skipped frame, such as the given image of TI2V-5B: 0"
    )
    step_shift: int = setting(0, "additional rotation of the anchors at every denoising step")
    equalize: bool = setting(False, "the same number of anchors in every phase: one compiled shape")
    drop_text_padding: bool = setting(
        False, "HunyuanVideo 1.5, batch 1: trim padded text instead of masking it (exact)"
    )
    num_inference_steps: int | None = setting(
        None, "steps of a run, where the pipeline does not tell and dense_steps counts from the end"
    )
    allow_grad: bool = setting(False, "also run where gradients are recorded in training mode")
    debug: bool = setting(False, "check every sparse block's output for NaN and infinity")
    strict: bool = setting(True, "refuse a plan made for another model; otherwise rescale and warn")
    model_class: str | None = setting(None, "what a plan was calibrated for: transformer class")
    layers: int | None = setting(None, "same: number of blocks")
    frames: int | None = setting(None, "same: latent frames after patching")

    def __post_init__(self) -> None:
        _count(self, "stride")
        _count(self, "step_shift", least=0)
        for name in ("dense_head", "dense_tail", "num_inference_steps", "layers", "frames"):
            if getattr(self, name) is not None:
                _count(self, name, least=0 if name.startswith("dense") else 1)
        for name, allowed in (("lift", Lift), ("sites", Sites), ("kv", Keys), ("pattern", Pattern)):
            _choice(self, name, allowed)
        for name in ("blocks", "dense_steps", "condition_frames"):
            value = getattr(self, name)
            if value is not None:
                require(
                    not isinstance(value, str) and all(type(i) is int for i in value),
                    f"{name} must hold whole numbers, got {value!r}",
                    f"give a list such as {name}=(0, 1)",
                )
                object.__setattr__(self, name, tuple(value))
        require(
            not (self.lift == "state" and self.sites == "attn"),
            "lift 'state' interpolates block outputs, which sites='attn' does not see",
            "use lift='residual' or sites='block'",
        )

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "FISConfig":
        """A named setting: "paper-like", "quality" or "safe"; keyword arguments change fields."""
        require(name in PRESETS, f"there is no preset {name!r}", f"use one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def sparse_blocks(self, depth: int) -> tuple[int, ...]:
        """The sparse blocks of a model of ``depth`` blocks, ascending and without duplicates.

        Raises:
            ConfigError: If a block is out of range.
        """
        if self.blocks is None:
            share = max(
                1, round(0.075 * depth)
            )  # 3 of 40 (Wan 14B), 2 of 30, 4 of 54 (HunyuanVideo)
            head = share if self.dense_head is None else self.dense_head
            tail = share if self.dense_tail is None else self.dense_tail
            return tuple(range(head, max(head, depth - tail)))
        chosen = tuple(sorted(set(self.blocks)))
        bad = [block for block in chosen if not 0 <= block < depth]
        require(not bad, f"block {bad[:1]} is not among 0 to {depth - 1}", "change blocks")
        return chosen

    def rescaled(self, depth: int) -> "FISConfig":
        """The same plan with its block list stretched or shrunk to another depth."""
        if self.blocks is None or self.layers in (None, depth):
            return replace(self, layers=None, model_class=None)
        scale = depth / self.layers
        blocks = {min(depth - 1, int((block + 0.5) * scale)) for block in self.blocks}
        return replace(self, blocks=tuple(sorted(blocks)), layers=None, model_class=None)

    def to_json(self) -> str:
        """One JSON object with a schema version; ``from_json`` reads it back to an equal object."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "FISConfig":
        """Read what ``to_json`` wrote.

        Raises:
            ConfigError: If it is no such object, of another schema, or a value is out of range.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"the plan is not JSON ({error}); write it with fis-dit plan"
            ) from None
        require(
            isinstance(values, dict) and values.get("schema") == SCHEMA,
            f"the plan is not of schema {SCHEMA}",
            "write it again with fis-dit plan",
        )
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known - {"schema"})
        require(not unknown, f"the plan has an unknown field {unknown[:1]}", "remove it")
        lists = ("blocks", "dense_steps", "condition_frames")
        for name in lists:
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**{name: value for name, value in values.items() if name != "schema"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipShape:
    """Size of the clip to be made, in pixels and pixel frames."""

    height: int = setting(720, "pixels")
    width: int = setting(1280, "pixels")
    num_frames: int = setting(81, "frames of the clip, before the VAE")

    def __post_init__(self) -> None:
        _count(self, "height", "width", "num_frames")


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig(ClipShape):
    """Anchors, FLOPs, predicted speed-up and memory, from a model's config alone."""

    model: str = field(
        metadata={"help": "diffusers directory, transformer directory or config.json"}
    )
    preset: Preset = field(default="paper-like", metadata={"help": "setting to start from"})
    stride: int | None = setting(None, "n; none keeps the preset's")
    plan: str | None = setting(None, "JSON file of fis-dit plan, instead of a preset")

    def __post_init__(self) -> None:
        ClipShape.__post_init__(self)
        _choice(self, "preset", Preset)
        if self.stride is not None:
            _count(self, "stride")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig(ClipShape):
    """Calibrate which blocks to leave dense for a target speed-up, and write the plan."""

    model: str = field(metadata={"help": "directory of a diffusers video pipeline"})
    prompts: tuple[str, ...] = field(metadata={"help": "text files, one calibration prompt a line"})
    target_speedup: float = setting(2.0, "speed-up of the blocks by the FLOPs model, 1 or more")
    method: Literal["local", "endpoint"] = setting(
        "local", "score of a block: its own error, or (a pass per block) that of the velocity"
    )
    preset: Preset = field(
        default="paper-like", metadata={"help": "setting whose blocks are chosen"}
    )
    num_inference_steps: int = setting(4, "denoising steps")
    guidance_scale: float = setting(1.0, "1 turns guidance off, as distilled models want it")
    seed: int = setting(0, "seed of the noise")
    out: str = setting("plan.json", "file to write")
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        ClipShape.__post_init__(self)
        _count(self, "num_inference_steps")
        require(
            1 <= self.target_speedup < 100,
            f"target_speedup must be 1 or more, got {self.target_speedup}",
            "try 2",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig(ClipShape):
    """Make a clip with a local diffusers pipeline, sparse and, to compare, dense."""

    model: str = field(metadata={"help": "directory of a diffusers video pipeline"})
    prompt: str = setting("a cat walks over grass", "what the clip shows")
    image: str | None = setting(None, "first frame, for image-to-video pipelines")
    preset: Preset = field(
        default="paper-like", metadata={"help": "setting, unless a plan is given"}
    )
    plan: str | None = setting(None, "JSON file of fis-dit plan")
    lora: str | None = setting(None, "safetensors file of LoRA weights, such as 4-step ones")
    compare_dense: bool = setting(False, "also make the dense clip and report the distance")
    num_inference_steps: int = setting(4, "denoising steps")
    guidance_scale: float = setting(1.0, "1 turns guidance off, as distilled models want it")
    seed: int = setting(0, "seed of the noise")
    format: Literal["gif", "mp4"] = setting("gif", "of the clips; mp4 needs fis-dit[video]")
    fps: int = setting(16, "frames per second of the file")
    out: str | None = setting(None, "folder to write; default runs/generate-<time>")
    device: str = setting("auto", DEVICE_HELP)
    dtype: Literal["float32", "bfloat16", "float16"] = setting("bfloat16", "of the weights")

    def __post_init__(self) -> None:
        ClipShape.__post_init__(self)
        _count(self, "num_inference_steps", "fps")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Time dense against sparse forwards of a random-weight transformer at full shapes."""

    arch: Literal["tiny", "wan-a14b", "wan-5b", "hy15"] = setting("tiny", "shapes of the model")
    random_weights: bool = setting(True, "there is no other way: speed does not depend on weights")
    device: str = setting("auto", f"{DEVICE_HELP}; cpu runs tiny only")
    settings: tuple[str, ...] = setting(
        ("block-n2", "block-n3", "attn-n2", "attn-n3"),
        "sites-stride to time; add -full for all keys",
    )
    repeats: int = setting(5, "timed forwards of every setting, interleaved; the median counts")
    warmup: int = setting(2, "forwards before")
    out: str | None = setting(None, "folder of the report; default runs/bench-<time>")

    def __post_init__(self) -> None:
        _count(self, "repeats")
        _count(self, "warmup", least=0)
        require(self.random_weights, "bench has no weights to load", "leave --random-weights on")
        for name in self.settings:
            sites, _, rest = name.partition("-n")
            stride, _, full = rest.partition("-")
            require(
                sites in get_args(Sites)
                and stride.isdigit()
                and int(stride) > 0
                and full in ("", "full"),
                f"setting {name!r} is not known",
                "write block-n2, attn-n3 or block-n2-full",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Distilled four-step models of moving clips: dense, FIS and its rivals at equal FLOPs."""

    data: Literal["shapes", "digits"] = setting("shapes", "clips: bouncing shapes, drifting digits")
    seeds: int = setting(1, "seeds of noise and labels; claims need 3")
    clips: int = setting(48, "clips per seed")
    device: str = setting("auto", DEVICE_HELP)
    out: str | None = setting(None, "folder of the report; default runs/demo-<time>")

    def __post_init__(self) -> None:
        _count(self, "seeds")
        _count(self, "clips", least=4)
