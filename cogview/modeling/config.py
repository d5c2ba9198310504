"""Settings of a model: the transformer's shape and presets, default sampling, and the contents of ``config.json``.

This module imports no torch, so that commands can read settings at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

from cogview.errors import InputError
from cogview.image_io.reading import FitRule
from cogview.tokenizers.layouts import Layout, layouts
from cogview.tokenizers.tasks import TASKS, Task, check_grid
from cogview.tokenizers.vocabulary import MAX_GRID, Vocabulary

FORMAT_VERSION = 1  # of ``config.json``

# The projections of a layer by their names in it, with outputs and inputs in multiples of the model's width.
PROJECTIONS: Mapping[str, tuple[int, int]] = {
    "attention.query_key_value": (3, 1),
    "attention.output": (1, 1),
    "mlp.input": (4, 1),
    "mlp.output": (1, 4),
}
# Norms and projections of a layer, in the order in which they compute.
LAYER_PARTS = (
    "attention_norm",
    "attention.query_key_value",
    "attention.output",
    "attention_output_norm",
    "mlp_norm",
    "mlp.input",
    "mlp.output",
    "mlp_output_norm",
)
# Presets from the smallest to that of CogView: layers, width, heads. The name gives the parameters of the layers.
PRESETS: dict[str, tuple[int, int, int]] = {
    "5m": (6, 256, 8),
    "20m": (10, 416, 8),
    "100m": (12, 832, 13),
    "300m": (24, 1024, 16),
    "1b": (24, 1792, 28),
    "4b": (48, 2560, 40),
}


# Limits of the sizes of a transformer: a damaged config must not allocate without bound.
MAX_SIZES = {
    "num_layers": 1000,
    "width": 1 << 17,
    "num_heads": 1 << 12,
    "vocabulary_size": 1 << 24,
    "max_positions": 1 << 20,
}
MAX_GAIN = 1000


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which positions a query attends to.

    Attributes:
        pattern: ``dense`` for all positions up to the query, ``window`` for the sparse attention of CogView
            (arXiv:2105.13290): the most recent positions, and before them only the pivots, which are all positions
            outside of images and a sample of those of each image.
        window: Number of recent positions of the pattern ``window``, the query included; 0 for ``dense``.
        pivots: Number of sampled positions of each image of the pattern ``window``; 0 for ``dense``. A smaller image
            is sampled as a whole.

    Raises:
        ValueError: A number is outside its range, or belongs to the other pattern.
    """

    pattern: Literal["dense", "window"] = "dense"
    window: int = 0
    pivots: int = 0

    def __post_init__(self) -> None:
        if self.pattern == "dense" and (self.window or self.pivots):
            raise ValueError(
                f"attention: window {self.window} and pivots {self.pivots} need the pattern window, got the pattern "
                "dense"
            )
        limit = MAX_SIZES["max_positions"]
        if self.pattern == "window" and not 1 <= self.window <= limit:
            raise ValueError(f"attention: the window must be in [1, {limit}], got {self.window}")
        if not 0 <= self.pivots <= limit:
            raise ValueError(f"attention: the pivots must be in [0, {limit}], got {self.pivots}")

    @property
    def is_dense(self) -> bool:
        """Whether a query attends to all positions before it."""
        return self.pattern == "dense"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and initialization of a transformer.

    CogView's has 48 layers of width 2560 with 40 heads (arXiv:2105.13290, section 2.2).

    Raises:
        ValueError: A number is outside its range, or the width is no multiple of the heads.
    """

    num_layers: int
    width: int
    num_heads: int
    vocabulary_size: int  # padded: the rows of the embedding
    max_positions: int = 1089
    dropout: float = 0.1  # in training: on embeddings and on both branches of a layer
    # Initial gain of the norms on branch outputs. At the released 1, each branch adds unit variance to embeddings of
    # standard deviation 0.02: the first branch nearly hides the identity of a token until training recovers it.
    branch_norm_init: float = 1.0
    # Learned positions start as sinusoids, which are similar where positions are near. From noise, attention first has
    # to learn which positions are neighbours; until then a word like 左边 is attached to no object.
    sinusoidal_positions: bool = False
    attention: AttentionConfig = field(default_factory=AttentionConfig, metadata={"omit_default": True})

    def __post_init__(self) -> None:
        for name, limit in MAX_SIZES.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} must be in [1, {limit}], got {getattr(self, name)}")
        if not abs(self.branch_norm_init) <= MAX_GAIN:
            raise ValueError(f"branch_norm_init must be in [-{MAX_GAIN}, {MAX_GAIN}], got {self.branch_norm_init}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} does not divide into {self.num_heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Number of parameters, with the tied embedding counted once."""
        layer = 12 * self.width**2 + 17 * self.width
        return self.num_layers * layer + 2 * self.width + (self.vocabulary_size + self.max_positions) * self.width

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the transformer by its name, in the order of its state."""
        width, norm = self.width, {"weight": (self.width,), "bias": (self.width,)}
        shapes: dict[str, tuple[int, ...]] = {
            "embedding.weight": (self.vocabulary_size, width),
            "positions.weight": (self.max_positions, width),
        }
        for number in range(self.num_layers):
            for part in LAYER_PARTS:
                tensors: dict[str, tuple[int, ...]] = {**norm}
                if part in PROJECTIONS:
                    outputs, inputs = PROJECTIONS[part]
                    tensors = {"weight": (outputs * width, inputs * width), "bias": (outputs * width,)}
                shapes |= {f"layers.{number}.{part}.{kind}": shape for kind, shape in tensors.items()}
        return shapes | {f"final_norm.{kind}": shape for kind, shape in norm.items()}


def preset(
    name: str,
    vocabulary_size: int,
    max_positions: int = 1089,
    dropout: float = 0.1,
    branch_norm_init: float = 1.0,
    sinusoidal_positions: bool = False,
) -> TransformerConfig:
    """Return the configuration of a preset for a vocabulary.

    Args:
        name: A key of ``PRESETS``, such as ``"20m"``.
        vocabulary_size: Rows of the embedding, padding included.
        max_positions: Number of learned positions.
        dropout: Dropout rate of training, in [0, 1).
        branch_norm_init: Initial gain of the norms on branch outputs.
        sinusoidal_positions: Initialize the learned positions as sinusoids.

    Raises:
        ValueError: The preset is unknown; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    num_layers, width, num_heads = PRESETS[name]
    return TransformerConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        vocabulary_size=vocabulary_size,
        max_positions=max_positions,
        dropout=dropout,
        branch_norm_init=branch_norm_init,
        sinusoidal_positions=sinusoidal_positions,
    )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of sampling; ``GREEDY`` always takes the most probable id.

    Attributes:
        temperature: Divisor of the logits, above 0; lower is more deterministic.
        top_k: Sample from the K most probable ids; 0 keeps every id.
        top_p: Sample from the smallest set of ids whose probabilities sum to P, in (0, 1]; 1 keeps every id
            (nucleus sampling, arXiv:1904.09751).
        min_p: Sample from the ids with at least P times the probability of the most probable one, in [0, 1); 0 keeps
            every id (min-p sampling, arXiv:2407.01082). Where one id is likely, few others remain; where the choice is
            free, nearly all do.
        guidance: Scale S of classifier-free guidance (arXiv:2207.12598): the logits are u + S (c - u), with c and u
            the logits with and without the text. 1 disables it; other values need a model trained with caption dropout.
        image_guidance: Scale I of the guidance of an edit by its source (arXiv:2211.09800): the logits are
            u + I (s - u) + S (c - s), with c the logits with source and text, s with the source alone, and u with
            neither. 1 disables it; other values need a model trained with source dropout.
        text_attention: Factor W, above 0, of the attention weights of the given text
            (CogView2, arXiv:2204.14217); 1 disables it. It needs no special training.
        noise_version: What the noise of an image depends on besides seed and index: 2, on its prompt; 1, on nothing,
            as before version 0.3, so that all prompts of a seed share their noise.

    Raises:
        ValueError: A setting is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0
    text_attention: float = 1.0
    noise_version: int = 2
    image_guidance: float = field(default=1.0, metadata={"omit_default": True})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_count = isinstance(getattr(Sampling, name), int)
            if isinstance(value, bool) or not isinstance(value, Integral if is_count else Real):
                raise InputError(f"{name} must be a {'whole ' if is_count else ''}number, got {value!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; for greedy decoding use top_k 1")
        if self.temperature == math.inf:
            raise ValueError("temperature must be finite, got inf; for a wider choice of ids raise top_k or top_p")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 keeps every id), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be in [0, 1), got {self.min_p}; 0 keeps every id")
        if self.noise_version not in (1, 2):
            raise ValueError(f"noise_version must be 1 or 2, got {self.noise_version}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be a number from 0 on (1: none), got {self.guidance}")
        if not 0 <= self.image_guidance < math.inf:
            raise ValueError(f"image_guidance must be a number from 0 on (1: none), got {self.image_guidance}")
        if not 0 < self.text_attention < math.inf:
            raise ValueError(f"text_attention must be a number above 0 (1: none), got {self.text_attention}")


GREEDY = Sampling(top_k=1)
GUIDANCE_SETTINGS = ("image_guidance", "guidance")  # fields of ``Sampling``: scales of the source and of the text


def guidance_settings(task: Task) -> tuple[str, ...]:
    """Return the settings of guidance that apply: none without a prompt, both where training leaves out the source.

    Args:
        task: The task.
    """
    if "prompt" not in task.inputs or task.output != "image":
        return ()
    leaves_out_source = task.masked_image is not None and not task.fills
    return GUIDANCE_SETTINGS if leaves_out_source else GUIDANCE_SETTINGS[1:]


@dataclass(frozen=True, kw_only=True)
class ReconstructionQuality:
    """Quantiles of the PSNR of the image tokenizer's reconstructions of held-out images, in dB.

    An image with a lower PSNR than nearly all of these is unlike the images that a model was trained on.

    Raises:
        ValueError: A quantile is not finite, or they are not in ascending order.
    """

    p01: float  # 99% of the images have at least this
    p05: float
    median: float

    def __post_init__(self) -> None:
        if not -math.inf < self.p01 <= self.p05 <= self.median < math.inf:
            raise ValueError(
                "p01, p05 and median of the reconstruction PSNR must be finite and in ascending order, "
                f"got {self.p01}, {self.p05} and {self.median}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Contents of the ``config.json`` of a checkpoint.

    Raises:
        ValueError: A task is unknown, does not suit the grid or needs more positions than there are, or the vocabulary
            does not match the transformer.
    """

    transformer: TransformerConfig
    vocabulary: Vocabulary
    grid: int  # image codes per side of an image
    tasks: tuple[str, ...]  # rows of the layout table that the model was trained on
    max_text: int  # text tokens of the longest text
    caption_stop: bool = True  # captions end in [SEP]
    max_caption: int | None = None  # text tokens of the longest caption; None: ``max_text``
    text_positions: int | None = None  # positions reserved for a given text; None: as many as it has tokens
    caption_dropout: float = 0.0  # fraction of captions left out in training, for guidance
    # Fraction of edits without source and instruction in training, for the guidance of the image.
    source_dropout: float = field(default=0.0, metadata={"omit_default": True})
    full_mask_rate: float = 0.0  # fraction of generated images whose codes were all masked in training, for ranking
    codebook_sha256: str = ""
    reconstruction_psnr: ReconstructionQuality | None = None  # of images like those of the training; None: unknown
    text_sha256: str = ""  # of text.model; empty in checkpoints of earlier versions
    sampling: Sampling = field(default_factory=Sampling)  # recommended defaults of this model
    upscale_sampling: Sampling | None = None  # those of upscaling, which leaves less open; None: the same
    fit: FitRule = "crop"  # how images that the model is given become squares, as those of its training did
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= MAX_GRID:
            raise ValueError(f"grid must be in [1, {MAX_GRID}], got {self.grid}")
        positions = self.transformer.max_positions
        for name in ("max_text", "max_caption", "text_positions"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= positions:
                raise ValueError(f"{name} must be in [0, {positions}], the positions of the transformer, got {value}")
        for name in ("caption_dropout", "source_dropout", "full_mask_rate"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        check_grid(self.tasks, self.grid)
        table = self.layouts
        unknown = [task for task in self.tasks if task not in table]
        if unknown:
            raise ValueError(f"task {unknown[0]!r} is unknown; known: {', '.join(table)}")
        for task in self.tasks:
            needed = table[task].max_position(self.max_text)
            if needed > self.transformer.max_positions:
                raise ValueError(
                    f"task {task!r} with {self.max_text} pieces of text needs {needed} positions, the transformer has "
                    f"{self.transformer.max_positions}"
                )
        if self.vocabulary.padded_size != self.transformer.vocabulary_size:
            raise ValueError(
                f"the vocabulary has {self.vocabulary.padded_size} rows, the transformer "
                f"{self.transformer.vocabulary_size}"
            )

    def sampling_of(self, task: str) -> Sampling:
        """Return the recommended sampling settings of a task; guidance that does not apply to it is 1.

        Args:
            task: Name of the task.
        """
        sampling = self.sampling
        if self.upscale_sampling is not None and task in ("upscale", "low_level"):
            sampling = self.upscale_sampling
        row = TASKS.get(task)
        if row is None:
            return sampling
        unused = [name for name in GUIDANCE_SETTINGS if name not in guidance_settings(row)]
        if row.output == "image" and "prompt" not in row.inputs:
            unused.append("text_attention")  # there is no text to follow
        changes: dict[str, Any] = {name: 1.0 for name in unused if getattr(sampling, name) != 1}
        return replace(sampling, **changes) if changes else sampling

    @property
    def caption_positions(self) -> int:
        """Number of text tokens that a caption may have."""
        longest = self.layouts["caption"].longest_text(self.transformer.max_positions)
        return min(self.max_caption or self.max_text, longest)

    def longest_row(self, tasks: Sequence[str] | None = None) -> int:
        """Return the length of the longest sequence of ``tasks`` (default: all trained tasks), in tokens."""
        return max(self.layouts[task].length(self.max_text) for task in (self.tasks if tasks is None else tasks))

    @property
    def layouts(self) -> dict[str, Layout]:
        """Layout table at this model's grid, by task."""
        return layouts(self.grid, caption_stop=self.caption_stop, text_positions=self.text_positions)
