"""Every setting of fis-dit: its default, its unit and its check, once.

The symbols are those of "Frame Interleaved Sparsity" (arXiv 2605.11869): ``stride`` is n, the sparse
blocks are counted by j, ``step_shift`` rotates the residue over denoising steps, which the paper does
not have.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from effml_common.device import DEVICE_HELP
from effml_common.errors import ConfigError, InputError
from effml_common.logging import warn
from effml_common.parsing import require, setting

SCHEMA = 1  # of a plan as JSON
DENSE_SHARE = 0.075  # of the depth that is dense at each end, where nothing else is said
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


def _require_count(config: Any, *names: str, least: int = 1) -> None:
    """Refuse settings that are no whole numbers of at least ``least``."""
    for name in names:
        value = getattr(config, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        require(is_whole, f"{name} is {value!r}", f"give a whole number, {least} or more")
        require(value >= least, f"{name} is {value}", f"give {least} or more")


def _require_choice(config: Any, name: str, allowed: Any) -> None:
    """Refuse a setting that is none of the values of a Literal."""
    value, known = getattr(config, name), get_args(allowed)
    require(value in known, f"{name} is {value!r}", f"use one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class FISConfig:
    """Which frames of which blocks are computed, and how the others are filled in.

    Raises:
        ConfigError: A ``ValueError`` that names the field that is wrong.

    >>> FISConfig(stride=2).sparse_blocks(depth=40)[:3]
    (3, 4, 5)
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
    model_class: str | None = setting(None, "transformer class that a plan was calibrated for")
    layers: int | None = setting(None, "number of blocks that a plan was calibrated for")
    frames: int | None = setting(
        None, "latent frames, after patching, that a plan was calibrated for"
    )

    def __post_init__(self) -> None:
        # Whole numbers, and words of a list.
        _require_count(self, "stride")
        _require_count(self, "step_shift", least=0)
        for name in ("dense_head", "dense_tail", "num_inference_steps", "layers", "frames"):
            if getattr(self, name) is not None:
                _require_count(self, name, least=0 if name.startswith("dense") else 1)
        for name, allowed in (("lift", Lift), ("sites", Sites), ("kv", Keys), ("pattern", Pattern)):
            _require_choice(self, name, allowed)

        # Lists of whole numbers, kept as tuples.
        for name in ("blocks", "dense_steps", "condition_frames"):
            value = getattr(self, name)
            if value is not None:
                require(
                    not isinstance(value, str) and all(type(i) is int for i in value),
                    f"{name} is {value!r}, which is no list of whole numbers",
                    f"give a list such as {name}=(0, 1)",
                )
                object.__setattr__(self, name, tuple(value))

        # What excludes each other.
        require(
            not (self.lift == "state" and self.sites == "attn"),
            "lift 'state' interpolates block outputs, which sites='attn' does not see",
            "use lift='residual' or sites='block'",
        )

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "FISConfig":
        """Make a named setting.

        Args:
            name: "paper-like", "quality" or "safe".
            changes: Fields with other values than the preset's.

        >>> FISConfig.from_preset("quality", stride=3).step_shift
        1
        """
        require(name in PRESETS, f"there is no preset {name!r}", f"use one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def sparse_blocks(self, depth: int) -> tuple[int, ...]:
        """Return the sparse blocks of a model of ``depth`` blocks, ascending and without duplicates.

        Raises:
            ConfigError: If a block is out of range.
        """
        if self.blocks is None:
            # 3 of 40 (Wan 14B), 2 of 30 (Wan 5B), 4 of 54 (HunyuanVideo 1.5).
            dense_end = max(1, round(DENSE_SHARE * depth))
            head = dense_end if self.dense_head is None else self.dense_head
            tail = dense_end if self.dense_tail is None else self.dense_tail
            return tuple(range(head, max(head, depth - tail)))

        blocks = tuple(sorted(set(self.blocks)))
        outside = [block for block in blocks if not 0 <= block < depth]
        require(not outside, f"block {outside[:1]} is not among 0 to {depth - 1}", "change blocks")
        return blocks

    def fit_to_model(self, model_class: str, depth: int) -> "FISConfig":
        """Check which model a plan was made for; with ``strict=False`` rescale it to another one.

        Args:
            model_class: Name of the transformer's class.
            depth: Number of its blocks.

        Raises:
            ConfigError: If the plan is for another model.
        """
        if self.model_class in (None, model_class) and self.layers in (None, depth):
            return self
        planned = f"{self.model_class} of {self.layers} blocks"
        problem = f"the plan is for {planned}, not {model_class} of {depth}"
        if self.strict:
            raise ConfigError(f"{problem}; plan again, or set strict=False")
        warn(f"{problem}; its block list was rescaled")
        return self._rescale(depth)

    def _rescale(self, depth: int) -> "FISConfig":
        """Return the same plan with its block list stretched or shrunk to another depth."""
        if self.blocks is None or self.layers in (None, depth):
            return replace(self, layers=None, model_class=None)
        scale = depth / self.layers
        blocks = {min(depth - 1, int((block + 0.5) * scale)) for block in self.blocks}
        return replace(self, blocks=tuple(sorted(blocks)), layers=None, model_class=None)

    def to_json(self) -> str:
        """Write one JSON object with a schema version, which ``from_json`` reads back."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "FISConfig":
        """Read what ``to_json`` wrote.

        Args:
            text: One JSON object.

        Raises:
            ConfigError: If it is no such object, of another schema, or a value is out of range.

        >>> FISConfig.from_json(FISConfig(stride=3).to_json()).stride
        3
        """
        # An object of this schema, with known fields only.
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

        # JSON has lists where the settings have tuples.
        for name in ("blocks", "dense_steps", "condition_frames"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**{name: value for name, value in values.items() if name != "schema"})


def read_setting(
    plan: str | None, preset: str, num_inference_steps: int | None = None
) -> FISConfig:
    """Read the setting in a plan file, or take a preset.

    Args:
        plan: JSON file of ``fis-dit plan``; None takes the preset.
        preset: Name of a preset.
        num_inference_steps: Denoising steps of the run, for a setting that does not say so.

    Raises:
        InputError: If the file cannot be read or holds no plan.
    """
    config = FISConfig.from_preset(preset)
    if plan is not None:
        try:
            text = Path(plan).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{plan} cannot be read ({error}); write it with fis-dit plan"
            ) from None
        config = FISConfig.from_json(text)
    if config.num_inference_steps is None:
        config = replace(config, num_inference_steps=num_inference_steps)
    return config


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipShape:
    """Size of the clip to be made, in pixels and pixel frames."""

    height: int = setting(720, "pixels")
    width: int = setting(1280, "pixels")
    num_frames: int = setting(81, "frames of the clip, before the VAE")

    def __post_init__(self) -> None:
        _require_count(self, "height", "width", "num_frames")


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
        _require_choice(self, "preset", Preset)
        if self.stride is not None:
            _require_count(self, "stride")


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
        _require_count(self, "num_inference_steps")
        require(
            1 <= self.target_speedup < 100,
            f"target_speedup is {self.target_speedup}",
            "give 1 or more and less than 100, such as 2",
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
    format: Literal["gif", "mp4"] = setting("gif", "format of the clips; mp4 needs fis-dit[video]")
    fps: int = setting(16, "frames per second of the file")
    out: str | None = setting(None, "folder to write; default runs/generate-<time>")
    device: str = setting("auto", DEVICE_HELP)
    dtype: Literal["float32", "bfloat16", "float16"] = setting("bfloat16", "of the weights")

    def __post_init__(self) -> None:
        ClipShape.__post_init__(self)
        _require_count(self, "num_inference_steps", "fps")


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
    warmup: int = setting(2, "forwards before those, which are not timed")
    out: str | None = setting(None, "folder of the report; default runs/bench-<time>")

    def __post_init__(self) -> None:
        _require_count(self, "repeats")
        _require_count(self, "warmup", least=0)
        require(self.random_weights, "bench has no weights to load", "leave --random-weights on")
        for name in self.settings:
            parse_timed_setting(name)


def parse_timed_setting(name: str) -> dict[str, Any]:
    """Read the name of a setting that ``bench`` times, such as "attn-n3" or "block-n2-full".

    Returns:
        Fields of ``FISConfig``: sites, stride and kv.

    Raises:
        ConfigError: If there is no such setting.
    """
    sites, _, rest = name.partition("-n")
    stride, _, keys = rest.partition("-")
    require(
        sites in get_args(Sites) and stride.isdigit() and int(stride) > 0 and keys in ("", "full"),
        f"setting {name!r} is not known",
        "write block-n2, attn-n3 or block-n2-full",
    )
    return {"sites": sites, "stride": int(stride), "kv": keys or "anchor"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Distilled four-step models of moving clips: dense, FIS and other accelerations at equal FLOPs."""

    data: Literal["shapes", "digits"] = setting("shapes", "clips: bouncing shapes, drifting digits")
    seeds: int = setting(1, "seeds of noise and labels; claims need 3")
    clips: int = setting(48, "clips per seed")
    device: str = setting("auto", DEVICE_HELP)
    out: str | None = setting(None, "folder of the report; default runs/demo-<time>")

    def __post_init__(self) -> None:
        _require_count(self, "seeds")
        _require_count(self, "clips", least=4)
