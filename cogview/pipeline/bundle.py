"""Bundles: several sets of weights under one name, each for the tasks that it was trained for.

CogView v1 has a set of 7.9 GB for generation, one for captions and one for upscaling, with the same image and text
tokenizers. A set is loaded when a task first needs it, and evicted when another would not fit beside it.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cogview.checkpoints.checkpoint import check_folder, load_model, load_transformer
from cogview.checkpoints.precision import Precision, converted_specs, stored_matrix_dtype
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.device import DevicePlacement, available_memory, keeps_halves
from cogview.errors import InputError
from cogview.modeling.transformer import Transformer

HEADROOM = 1.15  # free memory over the size of the weights that loading requires, so that some is left for work
log = logging.getLogger(__name__)


class Bundle:
    """The transformers of several checkpoint folders, by task.

    Args:
        folders: Checkpoint folder of each task.
        placement: Device and number format of all of them.

    Attributes:
        folders: Checkpoint folder of each task.
        configs: Config of each task's checkpoint.
        model: The shared tokenizers, a config with all tasks, and a transformer without weights.

    Raises:
        InputError: If the folders do not share their tokenizers, or one was not trained for its task.
    """

    def __init__(self, folders: Mapping[str, Path], placement: DevicePlacement) -> None:
        self.placement = placement
        self.folders = dict(folders)
        self.configs = {task: check_folder(folder) for task, folder in folders.items()}
        first = next(iter(folders))
        for task, config in self.configs.items():
            shared = ("vocabulary", "grid", "codebook_sha256", "text_positions", "max_text")
            unlike = [name for name in shared if getattr(config, name) != getattr(self.configs[first], name)]
            if (folders[task] / "text.model").read_bytes() != (folders[first] / "text.model").read_bytes():
                unlike.append("text.model")
            if unlike:
                raise InputError(f"{folders[task]} and {folders[first]} make no bundle: they differ in {unlike[0]}")
            if task not in config.tasks:
                raise InputError(f"{folders[task]} was not trained for the task {task!r}: {', '.join(config.tasks)}")
        model = load_model(folders[first], placement.device, placement.dtype, meta_only=True)
        captions = self.configs.get("caption", model.config)
        config = replace(
            model.config,
            tasks=tuple(folders),
            caption_stop=captions.caption_stop,
            max_caption=captions.max_caption,
        )
        self.model = replace(model, config=config)
        self._loaded: OrderedDict[Path, Transformer] = OrderedDict()  # the most recently used is the last

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_loaded": OrderedDict()}  # a copy loads weights when a task needs them

    def transformer(self, task: str) -> Transformer:
        """Return the transformer for a task, loaded if it was not; the least recently used ones are evicted.

        Args:
            task: Name of a task of the bundle.
        """
        folder = self.folders[task]
        if folder not in self._loaded:
            placement = self.placement
            weights = WeightsFile(folder / "model.safetensors")
            keep_halves = keeps_halves(placement.device, placement.dtype, stored_matrix_dtype(weights.specs))
            specs = converted_specs(weights, Precision(placement.dtype, placement.quantization, keep_halves))
            needed = HEADROOM * sum(spec.num_bytes for spec in specs.values())
            while self._loaded and available_memory(placement.device) < needed:
                oldest = next(iter(self._loaded))
                del self._loaded[oldest]  # a reference would keep its memory
                log.info("evicting %s to load %s", oldest.name, folder.name)
                gc.collect()
                if placement.device.type == "cuda":
                    torch.cuda.empty_cache()
            log.info("loading %s for the task %s", folder.name, task)
            transformer = load_transformer(
                *(folder, placement.device, placement.dtype, placement.quantization), keep_halves=True
            )
            transformer.prepare_cpu()
            self._loaded[folder] = transformer
        self._loaded.move_to_end(folder)
        return self._loaded[folder]
