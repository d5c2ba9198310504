"""Several sets of weights that pass for one model: each does the tasks it was trained for.

The released CogView has one set of 7.9 GB for drawing, one for captions and one for enlarging, around the same image
and text tokenizers. A set is loaded when a task first needs it, and gives way when another would not fit beside it.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from cogview.checkpoints.checkpoint import check_folder, load_model, load_transformer
from cogview.checkpoints.precision import Precision, converted_specs
from cogview.checkpoints.safetensors_io import WeightsFile
from cogview.device import DevicePlacement, available_memory
from cogview.errors import InputError
from cogview.modeling.transformer import Transformer

HEADROOM = 1.15  # of the weights' size has to be free for them, so that there is room to work
log = logging.getLogger(__name__)


class Bundle:
    """The transformers of ``folders``, by the tasks that they do.

    ``model`` has the tokenizers, and a config with all tasks. InputError if the folders do not share their tokenizers.
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
        self._loaded: OrderedDict[Path, Transformer] = OrderedDict()  # the one used last is the last

    def transformer(self, task: str) -> Transformer:
        """The weights for ``task``, loaded if they are not; those that were not used for longest make room."""
        folder = self.folders[task]
        if folder not in self._loaded:
            placement = self.placement
            weights = WeightsFile(folder / "model.safetensors")
            specs = converted_specs(weights, Precision(placement.dtype, placement.quantization))
            needed = HEADROOM * sum(spec.num_bytes for spec in specs.values())
            while self._loaded and available_memory(placement.device) < needed:
                oldest = next(iter(self._loaded))
                del self._loaded[oldest]  # no name may hold on to it, or its memory is not free yet
                log.info("%s makes room for %s", oldest.name, folder.name)
                gc.collect()
                if placement.device.type == "cuda":
                    torch.cuda.empty_cache()
            log.info("loading %s for the task %s", folder.name, task)
            self._loaded[folder] = load_transformer(folder, placement.device, placement.dtype, placement.quantization)
        self._loaded.move_to_end(folder)
        return self._loaded[folder]
