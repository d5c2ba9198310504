"""The chunk ``parameters``: written as other programs read it, and read as they write it."""

import pytest

from cogview.image_io.a1111 import a1111_parameters, parse_a1111

METADATA = {"prompt": "左边是狐狸，\n右边是狗", "seed": "7", "codes": "1 2 3 4", "guidance": "2.5", "model": "a, b"}


def test_a1111_parameters_are_read_back():
    text = a1111_parameters(METADATA | {"top_k": "5", "cogview": "0.2.0"}, (64, 32))
    assert text == (
        "左边是狐狸，\n右边是狗\nSteps: 4, Sampler: cogview, CFG scale: 2.5, Seed: 7, Size: 64x32, "
        'Model: "a, b", Top k: 5, Version: cogview 0.2.0'
    )
    parsed = parse_a1111(text)
    assert (parsed["prompt"], parsed["seed"], parsed["size"]) == (METADATA["prompt"], "7", "64x32")
    assert (parsed["model"], parsed["top k"]) == ("a, b", "5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a cat, sitting\nNegative prompt: dog, blurry\nSteps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 12",
            {
                "prompt": "a cat, sitting",
                "negative prompt": "dog, blurry",
                "steps": "20",
                "sampler": "DPM++ 2M",
                "cfg scale": "7",
                "seed": "12",
            },
        ),
        ("a cat\nratio: 3:4", {"prompt": "a cat\nratio: 3:4"}),  # no settings
        ('x\nSteps: 1, Seed: 2, Model: "broken', {"prompt": "x", "steps": "1", "seed": "2", "model": "broken"}),
        ("", {"prompt": ""}),
    ],
)
def test_parse_a1111_reads_images_of_other_programs(text, expected):
    assert parse_a1111(text) == expected
