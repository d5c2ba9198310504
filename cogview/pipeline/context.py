"""The context of generation: all that programs and the runner need of a model, passed down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cogview.device import DevicePlacement
from cogview.modeling.config import ModelConfig
from cogview.modeling.transformer import Transformer
from cogview.pipeline.inputs import require_int
from cogview.planning.batches import BatchPlanner
from cogview.planning.model_memory import smaller_formats
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.vqvae.model import VQVAE


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineContext:
    """A model that is ready to generate.

    Attributes:
        config: Config of the model, or of a bundle with all its tasks.
        text_tokenizer: Splits prompts and joins captions.
        image_tokenizer: Encodes images and decodes codes.
        transformer_for: Returns the transformer for a task, loaded if it was not.
        planned_transformer: Transformer whose size memory plans use; in a bundle it has no weights.
        placement: Device and number format.
        int8_cache: Whether keys and values are kept in int8.
        convert_prompt: Returns a prompt in the characters of the model.
        speculative: Codes to draft per forward pass; 1: none, None: as many as pay.
    """

    config: ModelConfig
    text_tokenizer: TextTokenizer
    image_tokenizer: VQVAE
    transformer_for: Callable[[str], Transformer]
    planned_transformer: Transformer
    placement: DevicePlacement
    int8_cache: bool
    speculative: int | None
    convert_prompt: Callable[[str], str]

    @property
    def vocabulary(self) -> Vocabulary:
        """Offsets of codes, pieces and commands."""
        return self.config.vocabulary

    def planner(self, max_batch_size: int | None) -> BatchPlanner:
        """Return a planner for the device of the model.

        Args:
            max_batch_size: None: as many as memory holds and pay.

        Raises:
            InputError: If it is no whole number from 1.
        """
        if max_batch_size is not None:
            max_batch_size = require_int(max_batch_size, "the batch size", 1)
        config, placement = self.config, self.placement
        suggestions = partial(
            smaller_formats, config.transformer, config.vocabulary, placement.weight_format, placement.device.type
        )
        return BatchPlanner(placement.device, max_batch_size, suggestions)
