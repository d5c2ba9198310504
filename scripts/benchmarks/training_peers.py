"""The peers of a comparison of training: a plain PyTorch loop in the style of nanoGPT, and transformers' Trainer.

Both compute the logits of all ids at all positions, and ignore targets without loss, as they do by default.
"""

# B rows of a step, T positions of a row, D width, V vocabulary
from __future__ import annotations

import importlib
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import plain_gpt
import torch
from torch import Tensor
from torch.nn import functional as F
from training_rows import NO_LOSS, SEED, PlainRow, TrainingCase

from cogview.errors import InputError
from cogview.modeling.config import TransformerConfig

PLAIN_MODES = {
    f"plain loop, {rows}, {'compiled' if compiled else 'eager'}": (rows, compiled)
    for rows in ("padded", "packed")
    for compiled in (False, True)
}
TRAINER_MODES = {
    f"Trainer, {sampler}, {'compiled' if compiled else 'eager'}": (sampler, compiled)
    for sampler in ("random", "group_by_length")
    for compiled in (False, True)
}
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP_NORM = 1e-3, (0.9, 0.99), 0.04, 1.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Batch = tuple[Tensor, Tensor]  # inputs and targets (B, T)


class TrainingBlock(plain_gpt.Block):
    """The layer of the plain GPT without a cache."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the residual stream."""
        batch, length, width = x.shape
        split = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_output(F.gelu(self.mlp_input(self.mlp_norm(x)), approximate="tanh"))


class TrainingGPT(plain_gpt.PlainGPT):
    """The plain GPT with its loss, and an output that is tied to the embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        shape = (config.num_layers, config.width, config.num_heads, config.vocabulary_size, config.max_positions)
        super().__init__(*shape)
        self.blocks = torch.nn.ModuleList(TrainingBlock(config.width, config.num_heads) for _ in self.blocks)
        self.head.weight = self.embedding.weight
        torch.nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:  # type: ignore[override]
        """Return the mean loss."""
        x = self.embedding(ids_BT) + self.positions(torch.arange(ids_BT.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=NO_LOSS)


class SideLoop(ABC):
    """One side of the comparison, ready to train.

    Attributes:
        side: Its name in ``--sides``.
    """

    side: ClassVar[str]

    @abstractmethod
    def __init__(self, case: TrainingCase, mode: str) -> None:
        """Prepare one of the modes of this side.

        Args:
            case: What all sides train.
            mode: Name of the mode.
        """

    @abstractmethod
    def run(self) -> float:
        """Train all steps; return the seconds."""


class PlainLoop(SideLoop):
    """A loop of AdamW's fused form, autocast and clipping; every run repeats the same steps."""

    side = "plain"

    def __init__(self, case: TrainingCase, mode: str) -> None:
        """Prepare the batches of all steps in one of ``PLAIN_MODES``; see ``SideLoop``."""
        config, steps, pad = case.config.transformer, case.rows, case.config.vocabulary.pad
        self.clock = CLOCKS[case.clock]
        packing, compiled = PLAIN_MODES[mode]
        torch.manual_seed(SEED)
        model = TrainingGPT(config).train()
        self.parameters = list(model.parameters())
        matrices = [parameter for parameter in self.parameters if parameter.dim() > 1]
        vectors = [parameter for parameter in self.parameters if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
        self.model = torch.compile(model, dynamic=False) if compiled else model
        self.dtype = case.dtype
        if packing == "packed":
            self.batches = packed_batches(steps, pad, config.max_positions)
        else:
            longest = max(len(inputs) for rows in steps for inputs, _ in rows)
            # A compiled step has one shape; an eager one pads to the longest row of its batch.
            self.batches = [padded_batch(rows, pad, longest if compiled else 0) for rows in steps]

    def run(self) -> float:
        """Train all steps; return the seconds."""
        start = self.clock()
        for inputs, targets in self.batches:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
                loss = self.model(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self.clock() - start


def padded_batch(rows: Sequence[PlainRow], pad: int, length: int = 0) -> Batch:
    """Return rows padded on the right.

    Args:
        rows: Rows of a step.
        pad: Id of the padding.
        length: Length to pad to, at least; 0 for that of the longest row.
    """
    length = max(length, *(len(inputs) for inputs, _ in rows))
    ids, wanted = np.full((len(rows), length), pad), np.full((len(rows), length), NO_LOSS)
    for index, (inputs, targets) in enumerate(rows):
        ids[index, : len(inputs)], wanted[index, : len(inputs)] = inputs, targets
    return torch.from_numpy(ids), torch.from_numpy(wanted)


def packed_batches(steps: Sequence[Sequence[PlainRow]], pad: int, block: int) -> list[Batch]:
    """Return one stream of all rows, cut into blocks as nanoGPT does; each step has the same number of blocks.

    Args:
        steps: Rows of each step.
        pad: Id of the padding, at the end of the stream.
        block: Positions of a block.
    """
    streams = [np.concatenate([row[part] for rows in steps for row in rows]) for part in (0, 1)]
    blocks = -(-len(streams[0]) // (block * len(steps)))
    missing = blocks * block * len(steps) - len(streams[0])
    padded = [np.append(stream, np.full(missing, fill)) for stream, fill in zip(streams, (pad, NO_LOSS), strict=True)]
    inputs, targets = (torch.from_numpy(stream).view(len(steps), blocks, block) for stream in padded)
    return list(zip(inputs, targets, strict=True))


class RowDataset(torch.utils.data.Dataset[Mapping[str, list[int]]]):
    """Rows for the Trainer, whose model predicts the id after each input: a row has one position more."""

    def __init__(self, rows: Sequence[PlainRow], pad: int) -> None:
        self.rows = [
            {"input_ids": [*inputs.tolist(), pad], "labels": [NO_LOSS, *targets.tolist()], "length": len(inputs) + 1}
            for inputs, targets in rows
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {name: value for name, value in self.rows[index].items() if name != "length"}


class TrainerLoop(SideLoop):
    """The Trainer of transformers on a GPT-2 of the same shape."""

    side = "trainer"

    def __init__(self, case: TrainingCase, mode: str) -> None:
        """Prepare model and dataset in one of ``TRAINER_MODES``; see ``SideLoop``.

        Raises:
            InputError: transformers or accelerate is missing.
        """
        steps, pad = case.rows, case.config.vocabulary.pad
        sampler, compiled = TRAINER_MODES[mode]
        transformers = import_transformers("accelerate")
        torch.manual_seed(SEED)
        shape = gpt2_config(
            case.config.transformer,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            activation_function="gelu_pytorch_tanh",  # the default is the same formula in separate operations
            pad_token_id=pad,
        )
        self.timer = make_timer(len(steps), CLOCKS[case.clock])
        arguments = transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=len(steps) + 1,
            per_device_train_batch_size=len(steps[0]),
            use_cpu=True,
            bf16=case.dtype is not None,
            optim="adamw_torch_fused",
            torch_compile=compiled,
            learning_rate=LEARNING_RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP_NORM,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            train_sampling_strategy=sampler,
            dataloader_pin_memory=False,
            seed=SEED,
        )
        rows = [row for step in [*steps, steps[0]] for row in step]
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(pad), pad_token="[PAD]")
        self.trainer = transformers.Trainer(
            model=transformers.GPT2LMHeadModel(shape),
            args=arguments,
            train_dataset=RowDataset(rows, pad),
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS),
            callbacks=[self.timer],
        )

    def run(self) -> float:
        """Train all steps; return the seconds after the first step, which prepares the others."""
        self.trainer.train()
        return float(self.timer.seconds)


def make_timer(steps: int, clock: Callable[[], float]) -> Any:
    """Return a callback of the Trainer whose ``seconds`` are those of all steps but the first."""

    class StepTimer(import_transformers().TrainerCallback):  # type: ignore[misc]
        """Measures the seconds of ``steps`` steps."""

        seconds, began = 0.0, 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Start after the first step, and stop after the last one."""
            if state.global_step == 1:
                self.began = clock()
            if state.global_step == steps + 1:
                self.seconds = clock() - self.began

    return StepTimer()


def word_tokenizer(pad: int) -> Any:
    """Return a tokenizer that only pads, with the id ``pad``."""
    from tokenizers.models import WordLevel

    from tokenizers import Tokenizer

    return Tokenizer(WordLevel({"[PAD]": pad}, unk_token="[PAD]"))


def gpt2_config(config: TransformerConfig, **others: Any) -> Any:
    """Return the configuration of a GPT-2 of the same shape, whose rows nothing stops early.

    Args:
        config: The shape.
        **others: Other settings of GPT-2.
    """
    shape = {
        "n_layer": config.num_layers,
        "n_embd": config.width,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "vocab_size": config.vocabulary_size,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return import_transformers().GPT2Config(**{**shape, **others})


def import_transformers(*others: str) -> Any:
    """Return the module of the peer.

    Args:
        *others: Packages that it needs.

    Raises:
        InputError: One of them is missing.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    names = ("transformers", *others)
    try:
        modules = [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise InputError(f"{error.name} is missing, a side of this comparison: pip install {' '.join(names)}") from None
    return modules[0]
