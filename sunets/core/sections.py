"""Name, type, default and check of every hyper-parameter, with one class per section of `params.yaml`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from sunets.core.names import NAME, check_name

IGNORE_INDEX = 255
"""Label of pixels that no loss and no score counts (PASCAL VOC's border value)."""

Task: TypeAlias = Literal["segmentation", "classification"]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no infinity or NaN, defaults checked too."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


def _check_names(table: dict[str, Any]) -> dict[str, Any]:
    folded: dict[str, str] = {}
    for name in table:
        if (other := folded.setdefault(check_name(name).casefold(), name)) != name:
            raise ValueError(f"the names {other!r} and {name!r} are one file on a Mac; rename one of them")
        if re.fullmatch(r"\d+(e-?\d+)?|nan|inf", name, re.IGNORECASE):  # tables would give back a number
            raise ValueError(f"the name {name!r}: use one that is not a number, such as resnet18")
    return table


Names: TypeAlias = AfterValidator(_check_names)  # type: ignore[valid-type]
Pixels: TypeAlias = Annotated[int, Field(ge=16, le=16384)]
"""Height or width; below 16 pixels no network of the suite can work."""
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]

Count: TypeAlias = Annotated[int, Field(ge=1, le=4096)]


class SyntheticConfig(Section):
    """The embedded data set, drawn by code (`sunets/data/synthetic.py`)."""

    image_size: int = Field(96, ge=32, le=1024)
    """Height and width in pixels."""
    train: int = Field(800, ge=1, le=1_000_000)
    """Images in the training split."""
    val: int = Field(100, ge=1, le=1_000_000)
    """Images in the validation split."""
    test: int = Field(200, ge=1, le=1_000_000)
    """Images in the test split."""
    context: bool = True
    """Whether a class depends on far-away pixels (lighter or darker than the surroundings); False is the control."""
    seed: Seed = 0
    """Seed of the drawing; the data stay the same when the training seeds change."""


DataName: TypeAlias = Literal[
    "synthetic", "synthetic_shapes", "camvid", "voc2012", "coco", "cityscapes", "folder", "imagefolder"
]


class DataConfig(Section):
    """Data set, its directory, and the size of its images."""

    name: DataName = "synthetic"
    """Name of the data set; `synthetic` (segmentation) and `synthetic_shapes` (classification) are embedded."""
    root: str | None = None
    """Directory of the data set; unused by the embedded ones."""
    size: tuple[Pixels, Pixels] | None = None
    """(height, width) to which images and masks are resized on reading; None keeps their sizes."""
    train_split: str = Field("train", pattern=NAME)
    """Split that is trained on (VOC: train, train_aug, trainval, trainval_aug)."""
    val_split: str = Field("val", pattern=NAME)
    """Split that is scored during training."""
    test_split: str = Field("test", pattern=NAME)
    """Split that the evaluation reports."""
    cache: bool = False
    """Keep decoded images in memory; for small sets."""
    workers: int = Field(0, ge=0, le=256)
    """Loader processes of a training; the result does not depend on it."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """Settings of the embedded sets."""

    @property
    def task(self) -> Task:
        """Task of the data set."""
        return "classification" if self.name in ("imagefolder", "synthetic_shapes") else "segmentation"

    @model_validator(mode="after")
    def _root_is_given(self) -> Self:
        if self.root is None and not self.name.startswith("synthetic"):
            raise ValueError(f"root: the data set {self.name!r} needs the directory that holds it")
        _check_names(dict.fromkeys((self.train_split, self.val_split, self.test_split)))
        for key in ("val_split", "test_split"):
            if getattr(self, key) == self.train_split:
                raise ValueError(f"{key}: another split than train_split ({self.train_split}), which is trained on")
        return self


PerStage: TypeAlias = Annotated[int, Field(ge=0, le=4096)] | tuple[Annotated[int, Field(ge=0, le=4096)], ...]


class ModelConfig(Section):
    """One network: a name of the zoo and changes to it. None keeps the value of the named network."""

    name: str
    """A name that `sunets.list_models()` returns."""
    weights: str | None = None
    """Published weights to start from, as named by torchvision or segmentation-models-pytorch."""
    output_stride: Count | None = None
    """Input size over feature size before the head; None is the natural stride."""
    head: str | None = None
    """Segmentation head: linear or degridding."""
    width: Count | None = None
    """Channels inside a U-Net; of small baselines, the channels of the first stage."""
    stem_channels: Count | None = None
    """Channels after the first convolution."""
    stage_channels: tuple[Count, ...] | None = None
    """Channels between U-Nets, one number per stage."""
    num_blocks: PerStage | None = None
    """U-Nets stacked in each stage; one integer holds for every stage."""
    unet_depth: PerStage | None = None
    """Levels (down/up pairs) inside each U-Net, per stage; one integer holds for every stage."""
    dilation: str | tuple[int | tuple[int, ...], ...] | None = None
    """Schedule of stages that keep their resolution: multi_grid, uniform, none, strided, or rates per stage."""
    skip: str | None = None
    """How a U-Net joins its skip connections: concat or sum."""
    in_channels: Count | None = None
    """Channels of the input image."""
    memory_efficient: bool | None = None
    """Recompute each U-Net in the backward pass."""

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `sunets.create_model`, except those of the data: task and num_classes."""
        return {k: v for k in ModelConfig.model_fields if (v := getattr(self, k)) is not None}


class ModelEntry(ModelConfig):
    """A row of the benchmark: a network and changes of the recipe for it."""

    train: dict[str, Any] = {}
    """Keys of `train` that differ for this model; they are not tuned."""
    label: str | None = None
    """Name in tables and figures; None is the key."""


class AugmentConfig(Section):
    """Random augmentation of a training image, by `torchvision.transforms.v2`."""

    scale: tuple[float, float] | None = None
    """Range of a random resize factor."""
    crop: tuple[Pixels, Pixels] | None = None
    """(height, width) of the random crop, padded where the image is smaller."""
    resized_crop: Pixels | None = None
    """Side of a random resized crop (classification)."""
    flip: bool = True
    """Mirror left-right with probability 0.5."""
    rotate_degrees: float = Field(0.0, ge=0, le=180)
    """Rotation drawn from +- this angle."""
    color_jitter: float = Field(0.0, ge=0, le=1)
    """Brightness, contrast and saturation jitter."""
    lighting: float = Field(0.0, ge=0, le=10)
    """Standard deviation of the PCA lighting noise (Krizhevsky et al., 2012)."""

    @field_validator("scale")
    @classmethod
    def _scale_is_a_range(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not 1 / 16 <= scale[0] <= scale[1] <= 16:
            raise ValueError("a least and a largest factor, from 1/16 to 16")
        return scale


class TrainConfig(Section):
    """The recipe of one training."""

    epochs: int = Field(9, ge=1, le=1_000_000)
    """Passes over the training split."""
    batch_size: int = Field(16, ge=1, le=65536)
    """Images per optimiser step, over all processes."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Images per forward pass and process; smaller than the batch means gradient accumulation."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """SGD with Nesterov momentum, or AdamW."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD momentum."""
    nesterov: bool = True
    """Nesterov momentum for SGD."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the moment estimates."""
    weight_decay: float = Field(1e-2, ge=0)
    """Weight decay."""
    decay_norm_and_bias: bool = True
    """Apply weight decay to BatchNorm parameters and biases too, as in the authors' recipes."""
    head_lr_multiplier: float = Field(1.0, gt=0)
    """Learning rate of the head's weights and BatchNorm, relative to the backbone's (authors: 10 when fine-tuning)."""
    head_bias_lr_multiplier: float = Field(1.0, gt=0)
    """Learning rate of the head's biases, relative to the backbone's (authors: 20 when fine-tuning)."""
    schedule: Literal["constant", "cosine", "poly", "step"] = "cosine"
    """Learning-rate schedule."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Linear warm-up from zero, in epochs."""
    poly_power: float = Field(0.9, gt=0)
    """Exponent of the poly schedule."""
    step_epochs: int = Field(30, ge=1)
    """Epochs between two drops of the step schedule."""
    step_gamma: float = Field(0.1, gt=0, le=1)
    """Factor of each drop of the step schedule."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross entropy."""
    class_weights: (
        Literal["median_frequency", "median_pixel_frequency"] | tuple[Annotated[float, Field(ge=0)], ...] | None
    ) = None
    """Class weights: explicit, or the median over the frequency of the class, its share of the pixels in images that
    show it (median_frequency: Eigen and Fergus, 2015) or of all pixels or labels (median_pixel_frequency)."""
    frozen_bn: bool = False
    """Freeze the running statistics and parameters of BatchNorm."""
    bn_momentum: float | None = Field(None, gt=0, le=1)
    """BatchNorm momentum in every layer; None keeps each network's default."""
    sync_bn: bool = False
    """Compute batch statistics over all processes."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """2-norm that gradients are clipped to."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Data type of automatic mixed precision."""
    channels_last: bool = False
    """Memory format of images and weights."""
    compile: bool = False
    """Compile the network with torch.compile."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda if there is a GPU."""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads of one training; results differ in the last bits between thread counts."""
    validate_every: int = Field(1, ge=1)
    """Epochs between two validations; the last epoch always ends with one."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Minimum time between checkpoints within an epoch; each epoch ends with one."""
    zero_init_residual: bool = False
    """Start residual blocks as their shortcuts, by zeros in the last layer of each branch; an error without any."""
    zero_init_head: bool = False
    """Start with equal logits, by zeros in the head's last layer. What `init_from` loads replaces both starts."""
    init_from: str | None = None
    """Weights file, of this package or the authors, whose backbone training starts from; `{model}` and `{seed}` stand
    for the model's key and the training seed, so that a chain of trainings stays paired."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of the training images."""

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"micro_batch_size: a divisor of batch_size ({self.batch_size}), not {micro}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: less than epochs ({self.epochs}), not {self.warmup_epochs}")
        if self.zero_init_residual and self.frozen_bn and self.init_from is None:
            raise ValueError("zero_init_residual: false with frozen_bn, which would keep a ResNet's branches at zero")
        if isinstance(self.class_weights, tuple):
            positive = [weight for weight in self.class_weights if weight]
            if not positive or not 1e-6 <= min(positive) <= max(positive) <= 1e6:
                raise ValueError("class_weights: 0 or 1e-6 to 1e6, and at least one above 0")
        return self


class VariantConfig(Section):
    """A test-time variant: scales, mirroring, windows."""

    scales: tuple[Annotated[float, Field(gt=0, le=16)], ...] = Field((1.0,), min_length=1)
    """Image scales whose probabilities are averaged."""
    short_side: Pixels | None = None
    """Length of the image's shorter side at scale 1; None: as it is."""
    flip: bool = False
    """Add the logits of the mirrored image."""
    window: tuple[Pixels, Pixels] | None = None
    """(height, width) of the sliding window; None runs the whole image at once."""
    window_overlap: float = Field(1 / 3, ge=0, lt=1)
    """Share of a window that the next one overlaps; the authors' stride of two thirds is 1/3."""

    def factors(self, height: int, width: int) -> list[float]:
        """Return the factor of each scale for an image of that size."""
        return [scale * (self.short_side or min(height, width)) / min(height, width) for scale in self.scales]


class EvaluateConfig(Section):
    """How a trained network is scored."""

    batch_size: int = Field(16, ge=1, le=65536)
    """Images, or windows, per forward pass."""
    variants: Annotated[dict[str, VariantConfig], Names] = {"single_scale": VariantConfig()}
    """Test-time variants by name; the first is the headline."""
    boundary_tolerance: float = Field(0.0075, gt=0, le=0.1)
    """Tolerance of the boundary F-score as a share of the image diagonal (Perazzi et al., 2016: 0.008)."""
    num_qualitative: int = Field(6, ge=0, le=1000)
    """Test images whose predictions are kept for the qualitative grid."""

    @field_validator("variants")
    @classmethod
    def _at_least_one(cls, variants: dict[str, VariantConfig]) -> dict[str, VariantConfig]:
        if not variants:
            raise ValueError("at least one test-time variant")
        return variants


class CostConfig(Section):
    """How cost, speed and the receptive field are measured."""

    size: tuple[Pixels, Pixels] = (96, 96)
    """(height, width) of the input in pixels."""
    batch_size: int = Field(1, ge=1, le=65536)
    """Images of the input whose multiply-adds and memory are counted, and whose latency is timed."""
    repeats: int = Field(10, ge=3, le=10_000)
    """Timed rounds; every round times each model once."""
    warmup: int = Field(3, ge=1, le=10_000)
    """Untimed rounds before them."""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads while timing."""
    receptive_field_seeds: int = Field(3, ge=1, le=1000)
    """Random initialisations that the effective receptive field is averaged over."""
    receptive_field_images: int = Field(2, ge=1, le=1000)
    """Random images per initialisation."""


class TuningEffort(Section):
    """Effort of tuning a recipe; zero for that of the parameter file."""

    trials: int = 0
    """Recipes that were tried."""
    epochs: int | None = None
    """Epochs of each."""
    seed: int | None = None
    """Seed of the sampler."""


class ReportConfig(Section):
    """What the tables compare, and with what."""

    reference: str = "sunet_tiny"
    """Key of the model that paired differences refer to."""
    title: str = "Synthetic benchmark"
    """Heading of the page."""
    equivalence_margin_percent: float = Field(2.0, ge=0, le=100)
    """Points of score (of 100): a difference whose interval lies within +- this margin is called equivalent."""
    declared_differences: tuple[str, ...] = ()
    """Dotted keys outside `model`, such as train.init_from, in which compared rows may differ; stated by the table."""

    @field_validator("declared_differences")
    @classmethod
    def _keys_exist(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        sections = {"data": DataConfig, "train": TrainConfig, "evaluate": EvaluateConfig, "tune": TuningEffort}
        for key in keys:
            first, *parts = key.split(".")
            section: Any = sections.get(first)
            while section is not None and parts:
                field = getattr(section, "model_fields", {}).get(parts.pop(0))
                section = field and field.annotation
            if section is None:
                raise ValueError(f"{key}: no key of {', '.join(sections)}; check its spelling")
        return keys
