"""Packages are named one by one: three of them live at the top level and are linked into ``cogview/``."""

from setuptools import setup

setup(
    packages=[
        "cogview",
        "cogview.checkpoints",
        "cogview.cli",
        "cogview.data",
        "cogview.data.emoji",
        "cogview.evaluation",
        "cogview.jobs",
        "cogview.kernels",
        "cogview.tokenizers",
        "cogview.training",
        "cogview.vqvae",
    ],
    package_data={"cogview": ["checkpoints.yaml", "py.typed", "models/*/*", "models/*/*/*"]},
)
