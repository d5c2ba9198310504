"""Settings of the transformer, and presets from the small ones to four billion parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of the transformer. CogView's has 48 layers of width 2560 with 40 heads."""

    num_layers: int
    width: int
    num_heads: int
    vocabulary_size: int  # padded: the rows of the embedding
    max_positions: int = 1089
    dropout: float = 0.1  # in training: on embeddings and on both branches of a layer
    # What the norms on branch outputs are initialised with. At the released 1, each branch adds unit variance to
    # embeddings of 0.02, so that a token's identity is all but lost behind the first one until training digs it out.
    branch_norm_init: float = 1.0
    # Learned positions begin as sinusoids, alike where they are near, and not as noise, from which attention has to
    # find out first which positions are neighbours; until then a word like 左边 belongs to no name.
    sinusoidal_positions: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "num_heads", "vocabulary_size", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} does not divide into {self.num_heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, tied embedding counted once."""
        layer = 12 * self.width**2 + 17 * self.width
        return self.num_layers * layer + 2 * self.width + (self.vocabulary_size + self.max_positions) * self.width


# layers, width, heads; the name says the parameters of the layers, roughly
PRESETS: dict[str, tuple[int, int, int]] = {
    "5m": (6, 256, 8),
    "20m": (10, 416, 8),
    "100m": (12, 832, 13),
    "300m": (24, 1024, 16),
    "1b": (24, 1792, 28),
    "4b": (48, 2560, 40),
}


def preset(
    name: str,
    vocabulary_size: int,
    max_positions: int = 1089,
    dropout: float = 0.1,
    branch_norm_init: float = 1.0,
    sinusoidal_positions: bool = False,
) -> TransformerConfig:
    """The config of a preset for a vocabulary; raises ValueError with the known names."""
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
