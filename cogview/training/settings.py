"""Settings of training a transformer: the section ``transformer`` of a recipe and its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from cogview.data.fill_masks import check_fill_masks
from cogview.modeling.config import AttentionConfig, Sampling, TransformerConfig, preset
from cogview.modeling.lora import LoraSettings
from cogview.tokenizers.tasks import trained_tasks
from cogview.vqvae.lr_schedule import warmup_cosine
from cogview.vqvae.ranges import COUNT, INTERVAL, WORKERS, check_optimizer, check_ranges

# Intervals of the numbers of ``TransformerTraining``, besides those of every optimizer.
TRAINING_RANGES = {
    "micro_batch_size": "[0, 1048576]",
    "text_loss_weight": "[0, inf)",
    "name_loss_weight": "[0, inf)",
    "caption_dropout": "[0, 1]",
    "source_dropout": "[0, 1]",
    "full_mask_rate": "[0, 1]",
    "full_mask_targets": "[0, 1048576]",
    "partial_mask_rate": "[0, 1]",
    "num_workers": WORKERS,
}


@dataclass(frozen=True, kw_only=True)
class TransformerTraining:
    """Settings of the optimization. A step is one update of the weights with ``batch_size`` rows.

    Attributes:
        steps: Number of steps.
        batch_size: Rows of a step, over all processes.
        micro_batch_size: Maximum number of rows that a process computes at a time. The result does not depend on it.
            0 takes as many as fit into memory; on a CPU, all.
        learning_rate: Learning rate after the warm-up.
        final_learning_rate: Learning rate of the last step.
        warmup_steps: Steps in which the learning rate rises from 0.
        betas: Decay rates of Adam's moments.
        weight_decay: Decay of matrices in AdamW.
        clip_norm: Maximum norm of the gradient, above 0; None for no clipping.
        tasks: Tasks, and their shares of the rows.
        text_loss_weight: Weight of the loss of prompts; that of captions is 1.
        name_loss_weight: Weight of the loss of object names.
        caption_dropout: Fraction of prompts that are left out, for classifier-free guidance (arXiv:2207.12598).
        source_dropout: Fraction of edits that are left without their source image and their instruction, for the
            guidance of the image (arXiv:2211.09800). ``caption_dropout`` leaves out the instruction alone.
        fill_masks: Kinds of the unknown codes of the task fill (``FILL_MASKS``), and their shares of its rows.
        full_mask_rate: Fraction of the rows that generate an image in which every code of the input is masked.
        full_mask_targets: Number of codes that such a row predicts; 0 for all.
        partial_mask_rate: Fraction of the rows that generate an image in which some codes are masked, at a rate that
            is sampled uniformly for each row.
        nonfinite: Whether to stop the run or only to skip the step if a loss or gradient is not finite.
        seed: Seed of weights, order of rows, masks and dropout.
        num_workers: Processes that read stores and build batches; 0 uses the training process.

    Raises:
        ValueError: A setting is outside its range, or a task is unknown.
    """

    steps: int
    batch_size: int = 32
    micro_batch_size: int = 0
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.04
    clip_norm: float | None = 1.0
    tasks: dict[str, float] = field(default_factory=lambda: {"generate": 1.0})
    text_loss_weight: float = 0.1
    # With two objects in a caption, image-code loss alone learns slowly which object a position shows, since a code
    # mixes identity with appearance. A store with the field ``named`` holds the name of the object at each code. The
    # model then also predicts the name: before it sees the code when generating, after it when captioning.
    name_loss_weight: float = 0.0
    caption_dropout: float = 0.1
    source_dropout: float = field(default=0.1, metadata={"omit_default": True})
    fill_masks: dict[str, float] = field(
        default_factory=lambda: {"box": 4.0, "random": 3.0, "side": 2.0, "all": 1.0}, metadata={"omit_default": True}
    )
    # The first codes of an object nearly determine the others. Next-code loss therefore depends on the text, and in
    # upscaling on the small image, at few positions only, and learns from them slowly. Masked input codes remove that
    # shortcut. With full masking each code is predicted from text and position alone, so a few targets suffice and
    # make the row cheaper.
    full_mask_rate: float = 0.0
    full_mask_targets: int = 0
    partial_mask_rate: float = 0.0
    # float16 skips steps as a matter of course, with a smaller loss scale: "stop" concerns only steps whose loss is
    # not finite there. The first step that is not finite is diagnosed and dumped in either case.
    nonfinite: Literal["skip", "stop"] = "stop"
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_optimizer(self)
        check_ranges(self, TRAINING_RANGES)
        if self.full_mask_rate + self.partial_mask_rate > 1:
            raise ValueError(
                f"full_mask_rate {self.full_mask_rate} and partial_mask_rate {self.partial_mask_rate} are shares of "
                "all rows: their sum must not be above 1"
            )
        check_fill_masks(self.fill_masks)
        known = trained_tasks()
        for task, share in self.tasks.items():
            if task not in known:
                raise ValueError(f"task {task!r} is unknown; known: {', '.join(known)}")
            if not 0 < share < math.inf:
                raise ValueError(f"the share of task {task!r} must be above 0 and finite, got {share}")
        if not self.tasks:
            raise ValueError(f"there must be a task to train for; known: {', '.join(known)}")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then cosine decay to ``final_learning_rate``."""
        return warmup_cosine(
            step,
            peak=self.learning_rate,
            final=self.final_learning_rate,
            warmup_steps=self.warmup_steps,
            steps=self.steps,
        )


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The engine that computes steps.

    Attributes:
        name: ``torch`` (one process, or several with a copy of the weights each) or ``deepspeed`` (ZeRO).
        zero: What DeepSpeed partitions among processes (arXiv:1910.02054): 1 the optimizer state, 2 the gradients as
            well, 3 the weights as well. Stage 1 keeps whole gradients, in bfloat16 6 bytes per parameter.
        offload: Keep the optimizer state in the memory of the host.
        checkpointing: Activation checkpointing; ``auto`` is the mode with the least recomputation that fits.
        compile: Compile each layer with ``torch.compile``.
        config: Sections of DeepSpeed's configuration that override the engine's.

    Raises:
        ValueError: The settings contradict each other.
    """

    name: Literal["torch", "deepspeed"] = "torch"
    zero: int = 2
    offload: bool = False
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    compile: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "torch":
            if self.offload or self.config:
                raise ValueError("offload and config are DeepSpeed's: set name: deepspeed")
            return
        if "gradient_clipping" in self.config:
            raise ValueError("gradient_clipping in config has its own setting: set clip_norm in training")
        if self.zero == 0:
            raise ValueError(
                "zero: 0 partitions nothing, and in bfloat16 DeepSpeed's stage 0 trains differently from stages 1 to "
                "3: set name: torch, which computes the same correctly"
            )
        if self.zero not in (1, 2, 3):
            raise ValueError(f"zero must be 1, 2 or 3, got {self.zero}")
        if self.compile and self.zero == 3:
            raise ValueError(
                "compile does not go with zero: 3, whose weights have no size while they are partitioned: set zero: 2, "
                "or compile: false"
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Intervals of a run, in steps.

    Attributes:
        log_every: Interval of logged metrics, at least 1.
        save_every: Interval of checkpoints; 0 saves only at the end.
        evaluate_every: Interval of evaluations; 0 evaluates only at the end.
        keep: Number of recent checkpoints to keep besides the best one, at least 1.

    Raises:
        ValueError: A setting is outside its range.
    """

    log_every: int = 50
    save_every: int = 500
    evaluate_every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        check_ranges(self, {"log_every": COUNT, "save_every": INTERVAL, "evaluate_every": INTERVAL, "keep": COUNT})


@dataclass(frozen=True, kw_only=True)
class ArchitectureSettings:
    """A preset of ``TransformerConfig`` and the fields of it that a recipe may change.

    Attributes:
        preset: Name of a preset, such as ``5m``.
        num_layers: Number of layers; None for that of the preset. Few layers try out the recipe of a large model.
        width: Width; None for that of the preset. With ``init_from`` it may be a multiple of that model's width.
        num_heads: Number of attention heads; None for that of the preset.
        max_positions: See ``TransformerConfig``, as for the following.
    """

    preset: str = "5m"
    num_layers: int | None = None
    width: int | None = field(default=None, metadata={"omit_default": True})
    num_heads: int | None = field(default=None, metadata={"omit_default": True})
    max_positions: int = 1089
    dropout: float = 0.1
    branch_norm_init: float = 1.0
    sinusoidal_positions: bool = False
    attention: AttentionConfig = field(default_factory=AttentionConfig, metadata={"omit_default": True})

    def transformer_config(self, vocabulary_size: int) -> TransformerConfig:
        """Return the configuration for a vocabulary.

        Args:
            vocabulary_size: Rows of the embedding, padding included.

        Raises:
            ValueError: The preset is unknown, or a setting is outside its range.
        """
        known = {setting.name for setting in fields(ArchitectureSettings)}
        names = [setting.name for setting in fields(TransformerConfig) if setting.name in known]
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(preset(self.preset, vocabulary_size), **changes)


@dataclass(frozen=True, kw_only=True)
class TransformerSettings(ArchitectureSettings):
    """The section ``transformer`` of a recipe.

    Attributes:
        training: Settings of the optimization.
        tokenizers: Model whose tokenizers to use, by name or folder; None for those that the recipe has trained.
        init_from: Model whose weights to start from, by name or folder; None for random weights.
        lora: Train only a LoRA adapter of ``init_from``.
        engine: The engine that computes steps.
        sampling: Sampling of the sample sheets, and the default of the model until it is packaged.
        run: Intervals of logging, saving and evaluation.
        precision: Dtype of matrix products: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        store: Token store, or dataset of CogView v1; None for the one that ``cogview encode`` has made.
        stores: Several stores and their shares of the rows, instead of ``store``.
        watch_folder: Folder whose new stores are added to the mixture during training, each of their rows as likely
            as any other.
        validation_store: Store of the evaluation; given together with ``store`` or ``stores``.

    Raises:
        ValueError: The settings contradict each other.
    """

    training: TransformerTraining
    tokenizers: str | None = None
    init_from: str | None = None
    lora: LoraSettings | None = None
    engine: EngineSettings = field(default_factory=EngineSettings)
    sampling: Sampling = field(default_factory=Sampling)
    run: RunSettings = field(default_factory=RunSettings)
    precision: str = "auto"
    store: Path | None = None
    stores: dict[str, float] | None = None
    watch_folder: Path | None = None
    validation_store: Path | None = None

    def __post_init__(self) -> None:
        if self.store is not None and self.stores is not None:
            raise ValueError("store is one store and stores are several: give either")
        if (self.store is None and self.stores is None) != (self.validation_store is None):
            given = "store" if self.stores is None else "stores"
            raise ValueError(f"{given} and validation_store belong together: give both, or neither")
        if self.stores is not None and not self.stores:
            raise ValueError("stores must name at least one store")
        for path, share in (self.stores or {}).items():
            if not 0 < share < math.inf:
                raise ValueError(f"the share of the store {path} must be above 0 and finite, got {share}")
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora trains an adapter of a model: name it in init_from")
