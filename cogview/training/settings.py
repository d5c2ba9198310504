"""The settings of training a transformer, as a recipe has them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from cogview.tokenizers.tasks import trained_tasks
from cogview.vqvae.lr_schedule import warmup_cosine


@dataclass(frozen=True, kw_only=True)
class TransformerTraining:
    """Settings of a run. A step is one update of the weights with ``batch_size`` rows."""

    steps: int
    batch_size: int = 32
    # Rows that a process computes at once: its share of a batch is computed in as many parts as that takes, or more
    # where lengths differ much, so the batch stays what it is with any number of processes. 0: as many as fit, on a
    # CPU all.
    micro_batch_size: int = 0
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.04
    clip_norm: float = 1.0
    tasks: dict[str, float] = field(default_factory=lambda: {"generate": 1.0})  # and their shares of the rows
    text_loss_weight: float = 0.1  # of the texts that pictures are drawn from; captions count in full
    # Where a text names two things, which of them a place shows is learnt late from codes, which ask for it and for the
    # look of the thing at once. A store that says which name stands where (``named``) lets a drawing tell the name too,
    # and a description while it still reads the codes.
    name_loss_weight: float = 0.0
    caption_dropout: float = 0.1  # share of captions left out, so that guidance is possible later
    # Once the first codes of a thing are known the others follow from them, so the text, and in upscaling the small
    # picture, is asked at one or two places alone, and learnt slowly. Two remedies, for rows that draw a picture: a
    # share that sees [MASK] in place of every code, and one that sees it at a share of the places drawn per row. Where
    # every code is hidden each is told from text and place alone, so ``full_mask_targets`` of them, drawn per row, do for
    # a cheaper row (0: all).
    full_mask_rate: float = 0.0
    full_mask_targets: int = 0
    partial_mask_rate: float = 0.0
    # Where a loss or a gradient is not finite, the step is skipped in either case. ``stop`` then ends the run, ``skip``
    # goes on; float16 goes on with a smaller loss scale, for which such steps are usual, unless the loss itself is not
    # finite. The first one is looked into, and what is needed to see it again is kept.
    nonfinite: Literal["skip", "stop"] = "stop"
    seed: int = 0
    num_workers: int = 0  # processes that read the store and arrange its rows

    def __post_init__(self) -> None:
        if not 0 < self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must be from 1 to steps - 1 ({self.steps - 1}), got {self.warmup_steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.micro_batch_size < 0 or self.num_workers < 0:
            raise ValueError(
                f"micro_batch_size and num_workers must not be negative, got {self.micro_batch_size} and {self.num_workers}"
            )
        for name in ("caption_dropout", "full_mask_rate", "partial_mask_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.full_mask_rate + self.partial_mask_rate > 1:
            raise ValueError(
                f"full_mask_rate {self.full_mask_rate} and partial_mask_rate {self.partial_mask_rate} are shares of all rows: their sum "
                "must not be above 1"
            )
        if self.full_mask_targets < 0:
            raise ValueError(f"full_mask_targets must be 0 (all) or more, got {self.full_mask_targets}")
        for task, share in self.tasks.items():
            if task not in trained_tasks():
                raise ValueError(f"task {task!r} is unknown; known: {', '.join(trained_tasks())}")
            if not 0 < share < math.inf:
                raise ValueError(f"the share of task {task!r} must be above 0, got {share}")
        if not self.tasks:
            raise ValueError(f"there must be a task to train for; known: {', '.join(trained_tasks())}")
        for name in ("text_loss_weight", "name_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step: a linear warm-up, then a cosine down to ``final_learning_rate``."""
        return warmup_cosine(
            step,
            peak=self.learning_rate,
            final=self.final_learning_rate,
            warmup_steps=self.warmup_steps,
            steps=self.steps,
        )


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What computes steps below the trainer.

    ``torch`` is one process, or several with the same weights each (DistributedDataParallel). ``deepspeed`` divides
    among the processes what ``zero`` says: 1 the optimizer's numbers, 2 the gradients as well, 3 the weights as well
    (ZeRO, arXiv:1910.02054). ``offload`` keeps the optimizer's numbers in the memory of the host.
    """

    name: Literal["torch", "deepspeed"] = "torch"
    zero: int = 2  # stage 1 keeps whole gradients, in bfloat16 6 bytes for each parameter
    offload: bool = False
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"  # auto: the least recomputation that fits
    compile: bool = False  # each layer by torch.compile
    config: dict[str, Any] = field(default_factory=dict)  # goes into DeepSpeed's configuration, over ours

    def __post_init__(self) -> None:
        if self.name == "torch":
            if self.offload or self.config:
                raise ValueError("offload and config are DeepSpeed's: set name: deepspeed")
            return
        if self.zero == 0:
            raise ValueError(
                "zero: 0 divides nothing, and in bfloat16 DeepSpeed's stage 0 learns something else than stages 1 to "
                "3: set name: torch, which does the same rightly"
            )
        if self.zero not in (1, 2, 3):
            raise ValueError(f"zero must be 1, 2 or 3, got {self.zero}")
        if self.compile and self.zero == 3:
            raise ValueError(
                "compile does not go with zero: 3, whose weights have no size while they are away: set zero: 2, or "
                "compile: false"
            )
