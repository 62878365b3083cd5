"""Structure of a SUNet: its fields and their checks, the schedule of dilations, and the named networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

MAX_STAGES = 5
MAX_UNET_DEPTH = 5
DILATIONS = ("multi_grid", "uniform", "none", "strided")
SKIPS = ("concat", "sum")
HEADS = {"segmentation": ("linear", "degridding"), "classification": ("classifier",)}
"""Heads by task; the first is the task's default."""

Rates = tuple[int, int]
"""Dilations of the (first, second) 3x3 convolution of a U-Net level; the way up mirrors them."""


@dataclass(frozen=True, kw_only=True)
class SUNetConfig:
    """Structure of one SUNet. Lists become tuples; one integer for a field per stage holds for every stage.

    Raises:
        ValueError: a value is not allowed; names the field and what is.
    """

    num_classes: int
    """Channels of the logits."""
    width: int
    """Channels inside a U-Net."""
    stem_channels: int
    """Channels after the first convolution; the stem returns twice as many."""
    stage_channels: tuple[int, ...]
    """Channels between U-Nets, one entry per stage; one to five stages."""
    num_blocks: int | tuple[int, ...]
    """U-Nets in each stage. The first one changes the number of channels if necessary."""
    unet_depth: int | tuple[int, ...]
    """Levels (down/up pairs) of each U-Net, one to five, per stage."""
    output_stride: int | None = None
    """Input size over feature size: a power of two from 4 to the natural stride, 4 * 2^(stages - 1), the default.
    It decides which pools between the stages are dropped."""
    dilation: str | tuple[int | tuple[int, ...], ...] = "multi_grid"
    """Dilation of stages after a dropped pool, where a is twice the number of pools dropped before the stage.
    multi_grid (the authors'): D, 2D on the way down and 2D, D up, with D = a * 2^level. uniform: rate a in every 3x3
    convolution. none: rate 1 without striding. strided: U-Nets stride as in other stages. Or one entry per stage: 0 is
    strided, an integer is a uniform rate, a tuple holds D of each level."""
    skip: str = "concat"
    """How a U-Net joins its skip connections: concat or sum."""
    head: str = "linear"
    """linear or degridding (segmentation), classifier (classification)."""
    in_channels: int = 3
    """Channels of the input image."""
    memory_efficient: bool = False
    """Recompute each U-Net in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        def settle(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # the dataclass is frozen

        for name in ("num_classes", "width", "stem_channels", "in_channels"):
            _check_int(name, getattr(self, name), 1)
        settle("stage_channels", _per_stage("stage_channels", self.stage_channels, None))
        stages = len(self.stage_channels)
        settle("num_blocks", _per_stage("num_blocks", self.num_blocks, stages))
        settle("unet_depth", _per_stage("unet_depth", self.unet_depth, stages, MAX_UNET_DEPTH))

        natural = 4 * 2 ** (stages - 1)
        allowed = [4 * 2**k for k in range(stages)]
        settle("output_stride", natural if self.output_stride is None else self.output_stride)
        if type(self.output_stride) is not int or self.output_stride not in allowed:
            raise ValueError(
                f"output_stride: one of {', '.join(map(str, allowed))} for {stages} stages, not {self.output_stride!r}"
            )
        check_choice("skip", self.skip, SKIPS)
        check_choice("head", self.head, sum(HEADS.values(), ()))
        if type(self.memory_efficient) is not bool:
            raise ValueError(f"memory_efficient: true or false, not {self.memory_efficient!r}")
        settle("dilation", _check_dilation(self.dilation, cast(tuple[int, ...], self.unet_depth)))

    @property
    def task(self) -> Literal["segmentation", "classification"]:
        """Task of the head."""
        return "classification" if self.head in HEADS["classification"] else "segmentation"


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: an integer {allowed}, not {value!r}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError where a value is not allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: one of {', '.join(allowed)}, not {value!r}")


def _per_stage(name: str, value: object, stages: int | None, high: int | None = None) -> tuple[int, ...]:
    """Return `value` as a tuple of one checked entry per stage; with `stages` None, it decides their number."""
    if stages is not None and type(value) is int:
        value = (value,) * stages
    if not isinstance(value, tuple | list):
        also = "" if stages is None else " or an integer for all stages"
        raise ValueError(f"{name}: a list of integers, one per stage{also}, not {value!r}")
    if stages is None and not 1 <= len(value) <= MAX_STAGES:
        raise ValueError(f"{name}: one to {MAX_STAGES} stages, not {len(value)}")
    if stages is not None and len(value) != stages:
        raise ValueError(
            f"{name}: {len(value)} entries, but stage_channels has {stages} entries; give one per stage, or an integer "
            f"for all, not {list(value)}"
        )
    for entry in value:
        _check_int(name, entry, 1, high)
    return tuple(value)


def _check_dilation(value: object, unet_depth: tuple[int, ...]) -> str | tuple[int | tuple[int, ...], ...]:
    if isinstance(value, str) and value in DILATIONS:
        return value
    if not isinstance(value, tuple | list):
        raise ValueError(f"dilation: one of {', '.join(DILATIONS)}, or a list with one entry per stage, not {value!r}")
    if len(value) != len(unet_depth):
        raise ValueError(
            f"dilation: {len(value)} entries, but stage_channels has {len(unet_depth)} entries; give one per stage, or "
            f"one of {', '.join(DILATIONS)}"
        )
    entries: list[int | tuple[int, ...]] = []
    for stage, (entry, levels) in enumerate(zip(value, unet_depth, strict=True)):
        if isinstance(entry, tuple | list):
            if len(entry) != levels:
                raise ValueError(
                    f"dilation: {len(entry)} rates for stage {stage}, which has unet_depth {levels}; give one per "
                    f"level, not {list(entry)}"
                )
            for rate in entry:
                _check_int(f"dilation of stage {stage}", rate, 1)
            entries.append(tuple(entry))
        else:
            _check_int(f"dilation of stage {stage}", entry, 0)
            entries.append(cast(int, entry))
    return tuple(entries)


def dilation_schedule(config: SUNetConfig) -> tuple[tuple[Rates, ...] | None, ...]:
    """Return the rates of every stage: one (first, second) pair per level, or None where its U-Nets are strided."""
    depths = cast(tuple[int, ...], config.unet_depth)
    kept_pools = count_kept_pools(config)
    schedule: list[tuple[Rates, ...] | None] = []
    for stage, levels in enumerate(depths):
        entry: int | tuple[int, ...]
        base = 2 * (stage - kept_pools)  # the authors' a
        if isinstance(config.dilation, tuple):
            entry = config.dilation[stage]
        elif base <= 0 or config.dilation == "strided":
            entry = 0
        elif config.dilation == "multi_grid":
            entry = tuple(base * 2**level for level in range(levels))
        else:
            entry = base if config.dilation == "uniform" else 1
        if isinstance(entry, tuple):
            schedule.append(tuple((rate, 2 * rate) for rate in entry))
        else:
            schedule.append(((entry, entry),) * levels if entry else None)
    return tuple(schedule)


def count_kept_pools(config: SUNetConfig) -> int:
    """Count the pools between the stages that are not dropped: k = log2(output_stride / 4)."""
    return (cast(int, config.output_stride) // 4).bit_length() - 1


VARIANTS: dict[str, dict[str, Any]] = {
    "sunet64": {
        "width": 64,
        "stem_channels": 64,
        "stage_channels": (256, 512, 768, 1024),
        "num_blocks": (2, 4, 4, 1),
        "unet_depth": (2, 2, 2, 1),
    },
    "sunet128": {
        "width": 128,
        "stem_channels": 64,
        "stage_channels": (512, 1024, 1536, 2048),
        "num_blocks": (2, 4, 4, 1),
        "unet_depth": (2, 2, 2, 1),
    },
    "sunet7128": {
        "width": 128,
        "stem_channels": 64,
        "stage_channels": (512, 1280, 2048, 2304),
        "num_blocks": (2, 7, 7, 1),
        "unet_depth": (2, 2, 2, 1),
    },
    # For laptops: sunet64 with a quarter of its channels and without its third stage.
    "sunet_tiny": {
        "width": 16,
        "stem_channels": 16,
        "stage_channels": (64, 128, 192),
        "num_blocks": (2, 4, 1),
        "unet_depth": (2, 2, 1),
    },
}
"""The named networks; all but sunet_tiny are the authors'."""
