"""Packages are named one by one: three of them live at the top level and are linked into ``cogview/``."""

from setuptools import setup

setup(
    packages=[
        "cogview",
        "cogview.benchmark",
        "cogview.checkpoints",
        "cogview.cli",
        "cogview.data",
        "cogview.data.builders",
        "cogview.data.sources",
        "cogview.diagnostics",
        "cogview.emoji",
        "cogview.emoji.evaluation",
        "cogview.evaluation",
        "cogview.evaluation.field_benchmarks",
        "cogview.generation",
        "cogview.image_io",
        "cogview.jobs",
        "cogview.kernels",
        "cogview.modeling",
        "cogview.pipeline",
        "cogview.planning",
        "cogview.tokenizers",
        "cogview.training",
        "cogview.training.engines",
        "cogview.vqvae",
    ],
    package_data={
        "cogview": [
            "checkpoints.yaml",
            "emoji/*.yaml",
            "evaluation/*.css",
            "kernels/c/*",
            "locale/*.po",
            "py.typed",
            "recipes/*",
            "models/*/*",
            "models/*/*/*",
        ]
    },
)
