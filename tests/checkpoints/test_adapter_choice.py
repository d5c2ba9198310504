"""Adapters with scales, as texts."""

import pytest

from cogview.checkpoints.adapter_choice import AdapterChoice
from cogview.errors import InputError


@pytest.mark.parametrize(
    ("text", "name", "scale"),
    [
        ("style", "style", 1.0),
        ("style:0.5", "style", 0.5),
        ("style:0", "style", 0.0),
        ("style:-1", "style", -1.0),
        ("studio/fox-in-ink:.25", "studio/fox-in-ink", 0.25),
        (r"C:\\adapters\\style", r"C:\\adapters\\style", 1.0),
        (r"C:\\adapters\\style:2", r"C:\\adapters\\style", 2.0),
        ("runs/a:b", "runs/a:b", 1.0),
        ("runs/step:7:1", "runs/step:7", 1.0),
        ("style:", "style:", 1.0),
    ],
)
def test_parse_reads_a_number_behind_the_last_colon(text, name, scale):
    assert AdapterChoice.parse(text) == AdapterChoice(name, scale)
    assert AdapterChoice.parse(str(AdapterChoice(name, scale))) == AdapterChoice(name, scale)


def test_str_leaves_out_the_scale_of_training():
    texts = [str(AdapterChoice("style", scale)) for scale in (1, 0.1, 2.0, 0)]
    assert texts == ["style", "style:0.1", "style:2", "style:0"]
    assert str(AdapterChoice("step:7")) == "step:7:1"


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "1e9", "100.1"])
def test_parse_refuses_a_scale_out_of_range(scale):
    with pytest.raises(InputError, match=r"^the scale of an adapter must be from -100 to 100, got .* for style$"):
        AdapterChoice.parse(f"style:{scale}")


@pytest.mark.parametrize("text", ["", ":0.5"])
def test_parse_refuses_an_empty_name(text):
    with pytest.raises(InputError, match="the name of the adapter is empty; expected NAME or NAME:SCALE"):
        AdapterChoice.parse(text)
