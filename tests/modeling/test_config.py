"""Settings of the transformer: ranges, presets, and the number of parameters."""

import pytest
import torch
from torch import nn

from cogview.config_io import from_mapping, to_mapping
from cogview.errors import InputError
from cogview.modeling.config import (
    LAYER_PARTS,
    PRESETS,
    PROJECTIONS,
    AttentionConfig,
    ReconstructionQuality,
    TransformerConfig,
    preset,
)
from cogview.modeling.transformer import Transformer

TINY = {"num_layers": 2, "width": 32, "num_heads": 4, "vocabulary_size": 128}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_layers": 0}, r"num_layers must be in \[1, \d+\], got 0"),
        ({"width": 0}, r"width must be in \[1, \d+\], got 0"),
        ({"num_heads": -1}, r"num_heads must be in \[1, \d+\], got -1"),
        ({"vocabulary_size": 0}, r"vocabulary_size must be in \[1, \d+\], got 0"),
        ({"max_positions": 0}, r"max_positions must be in \[1, \d+\], got 0"),
        ({"num_layers": 10**18}, r"num_layers must be in \[1, 1000\], got 10{18}$"),
        ({"width": 10**18}, r"width must be in \[1, \d+\], got 10{18}$"),
        ({"vocabulary_size": 10**18}, r"vocabulary_size must be in \[1, \d+\], got 10{18}$"),
        ({"max_positions": 10**18}, r"max_positions must be in \[1, \d+\], got 10{18}$"),
        ({"branch_norm_init": float("nan")}, r"branch_norm_init must be in \[-1000, 1000\], got nan"),
        ({"branch_norm_init": 1e308}, r"branch_norm_init must be in \[-1000, 1000\], got 1e\+308"),
        ({"num_heads": 5}, "width 32 does not divide into 5 heads"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_transformer_config_raises_value_error_when_a_setting_is_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**TINY, **setting})


def test_transformer_config_head_size_is_width_per_head():
    assert TransformerConfig(**TINY).head_size == 8


def test_preset_4b_has_the_published_number_of_parameters():
    """48 layers of width 2560, 58,240 ids, 1089 positions."""
    config = preset("4b", vocabulary_size=58_240)
    assert (config.num_layers, config.width, config.num_heads) == (48, 2560, 40)
    assert config.num_parameters == 3_928_849_920


def test_presets_grow_and_match_their_names():
    sizes = []
    for name in PRESETS:
        config = preset(name, vocabulary_size=128, max_positions=16)
        layers = config.num_parameters - (128 + 16 + 2) * config.width
        named = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert 0.8 < layers / named < 1.25, name
        sizes.append(layers)
    assert sizes == sorted(sizes)


def test_preset_passes_the_other_settings_on():
    config = preset("5m", vocabulary_size=9216, max_positions=128, dropout=0.0)
    assert (config.vocabulary_size, config.max_positions, config.dropout) == (9216, 128, 0.0)


def test_preset_lists_the_known_names_when_unknown():
    with pytest.raises(ValueError, match="preset '5b' is unknown; known: 5m, 20m, 100m, 300m, 1b, 4b"):
        preset("5b", vocabulary_size=128)


def test_projections_are_the_linear_layers_of_the_transformer():
    """Adapters, quantization and estimates rely on this table."""
    config = TransformerConfig(**TINY)
    layer = Transformer(config).layers[1]
    found = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert {name: tuple(module.weight.shape) for name, module in found.items()} == {
        name: (outputs * config.width, inputs * config.width) for name, (outputs, inputs) in PROJECTIONS.items()
    }


def test_tensor_shapes_are_those_of_the_transformer_in_its_order():
    """Files are compared with them before a transformer is built."""
    config = TransformerConfig(**TINY)
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    assert list(config.tensor_shapes.items()) == [(name, tuple(tensor.shape)) for name, tensor in state.items()]


def test_layer_parts_hold_every_parameter_of_a_layer():
    layer = Transformer(TransformerConfig(**TINY)).layers[0]
    names = {name.rpartition(".")[0] for name, _ in layer.named_parameters()}
    assert names == set(LAYER_PARTS)


@pytest.mark.parametrize("quantiles", [(24.0, 23.0, 30.0), (24.0, 25.0, float("inf")), (float("nan"), 25.0, 30.0)])
def test_reconstruction_quality_raises_value_error_when_quantiles_are_impossible(quantiles):
    with pytest.raises(ValueError, match="must be finite and in ascending order, got"):
        ReconstructionQuality(**dict(zip(("p01", "p05", "median"), quantiles, strict=True)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "window"}, r"attention: the window must be in \[1, \d+\], got 0"),
        ({"pattern": "window", "window": 10**9}, r"attention: the window must be in \[1, \d+\], got 10{9}"),
        ({"pattern": "window", "window": 8, "pivots": -1}, r"attention: the pivots must be in \[0, \d+\], got -1"),
        ({"window": 8}, "attention: window 8 and pivots 0 need the pattern window, got the pattern dense"),
        ({"pattern": "dense", "pivots": 4}, "attention: window 0 and pivots 4 need the pattern window"),
    ],
)
def test_attention_config_raises_value_error_when_a_setting_is_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**settings)


def test_transformer_config_of_dense_attention_is_written_as_before():
    dense = TransformerConfig(**TINY)
    plain = to_mapping(dense)
    assert "attention" not in plain
    assert from_mapping(TransformerConfig, plain, where="config") == dense
    named = {**plain, "attention": {"pattern": "dense"}}
    assert from_mapping(TransformerConfig, named, where="config") == dense


def test_transformer_config_of_window_attention_is_read_as_it_was_written():
    sparse = TransformerConfig(**TINY, attention=AttentionConfig(pattern="window", window=12, pivots=5))
    plain = to_mapping(sparse)
    assert plain["attention"] == {"pattern": "window", "window": 12, "pivots": 5}
    assert from_mapping(TransformerConfig, plain, where="config") == sparse


def test_transformer_config_names_a_pattern_that_is_unknown():
    with pytest.raises(InputError, match='config, attention, pattern: expected one of dense, window, got "sparse"'):
        from_mapping(TransformerConfig, {**TINY, "attention": {"pattern": "sparse"}}, where="config")
