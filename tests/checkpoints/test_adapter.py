"""LoRA adapters: trained beside a model, stored in the format of PEFT, merged and unmerged."""

import json
import math
import re
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview.checkpoints.adapted_weights import open_adapters
from cogview.checkpoints.adapter import (
    BASE_FILE,
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    Adapter,
    BaseModelInfo,
    load_adapter,
    save_adapter,
)
from cogview.checkpoints.adapter_choice import AdapterChoice
from cogview.checkpoints.adapter_merge import merge_folder
from cogview.checkpoints.checkpoint import load_transformer, read_config
from cogview.checkpoints.grammar import GRAMMAR_FILE
from cogview.checkpoints.precision import Precision
from cogview.checkpoints.registry import resolve_checkpoint
from cogview.checkpoints.v1_convert import convert_folder
from cogview.errors import InputError
from cogview.modeling.lora import LoraSettings, add_lora, has_adapter
from cogview.modeling.transformer import MLP, Transformer
from cogview.pipeline.cogview import CogView

FOX = "一只狐狸"
CPU = torch.device("cpu")
IDS = torch.randint(0, 8000, (2, 12), generator=torch.Generator().manual_seed(3))
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["attention.output"]}


@pytest.fixture(scope="module")
def base(tiny_checkpoint):
    """The description of the tiny model in its adapters."""
    return BaseModelInfo.of("tiny", read_config(tiny_checkpoint))


@pytest.fixture
def transformer(tiny_checkpoint):
    """The transformer of the tiny model, its weights mapped from their file."""
    return load_transformer(tiny_checkpoint, CPU, torch.float32)


@pytest.fixture(scope="module")
def write_adapter(tiny_checkpoint):
    """A function that writes an adapter without PEFT: random A and B of some projections, and PEFT's settings."""

    def write(folder, targets=("attention.output",), rank=4, dtype=torch.float32, base=None, **settings):
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(rank)
        transformer = Transformer(read_config(tiny_checkpoint).transformer)
        tensors = {}
        for name, module in transformer.named_modules():
            if name.endswith(targets) and isinstance(module, torch.nn.Linear):
                outputs, inputs = module.weight.shape
                for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    tensor = torch.randn(shape, generator=generator) / 10
                    tensors[f"{PREFIX}{name}.lora_{part}.weight"] = tensor.to(dtype)
        save_file(tensors, folder / WEIGHTS_FILE)
        plain = PLAIN | {"r": rank, "target_modules": list(targets)} | settings
        (folder / CONFIG_FILE).write_text(json.dumps(plain))
        if base is not None:
            (folder / BASE_FILE).write_text(json.dumps(base))
        return folder

    return write


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, base, tmp_path_factory):
    """A transformer with a trained adapter of all projections; its settings; its folder."""
    pytest.importorskip("peft")
    transformer = load_transformer(tiny_checkpoint, CPU, torch.float32)
    settings = LoraSettings(rank=4, alpha=24.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(transformer, settings)
    optimizer = torch.optim.SGD([p for p in transformer.parameters() if p.requires_grad], lr=10.0)
    for _ in range(2):  # the first gives B its values, the second A
        optimizer.zero_grad()
        transformer(IDS[:, :-1]).flatten(0, 1).sub(0).pow(2).mean().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("adapters") / "狐狸"
    save_adapter(folder, transformer, settings, base)
    return transformer.eval(), settings, folder


@pytest.fixture
def load_adapted(tiny_checkpoint):
    """A function that loads the tiny transformer with adapters, each given as NAME[:SCALE]."""

    def load(*adapters, folder=tiny_checkpoint, dtype=torch.float32, quantization=None):
        choices = [AdapterChoice.parse(str(adapter)) for adapter in adapters]
        opened = open_adapters(choices, read_config(folder), str(folder))
        return load_transformer(folder, CPU, dtype, quantization, adapters=opened)

    return load


@contextmanager
def one_line(words):
    """Expect an InputError of one line that contains ``words``."""
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        yield
    assert "\n" not in str(caught.value)


@torch.no_grad()
def logits(transformer):
    return transformer(IDS)


def test_add_lora_starts_without_effect_and_trains_the_adapter_only(transformer, tiny_checkpoint):
    pytest.importorskip("peft")
    before = logits(transformer)
    transformer.prepare_cpu()
    add_lora(transformer, LoraSettings(rank=2, targets=("mlp.input", "attention.query_key_value")))
    assert torch.equal(logits(transformer), before)
    with torch.no_grad():
        transformer.get_parameter("layers.1.mlp.input.lora_B.default.weight").fill_(0.1)
    assert not torch.allclose(logits(transformer), before)  # the packed weights, which have no adapter, are not used
    transformer(IDS).sum().backward()
    trained = {name for name, parameter in transformer.named_parameters() if parameter.grad is not None}
    assert trained == {
        f"layers.{layer}.{target}.lora_{part}.default.weight"
        for layer in (0, 1)
        for target in ("mlp.input", "attention.query_key_value")
        for part in "AB"
    }
    with one_line("has an adapter already: only one can be trained at a time"):
        add_lora(transformer, LoraSettings())


def test_training_changes_the_adapter_only(trained, tiny_checkpoint):
    transformer, _, _ = trained
    stored = load_file(tiny_checkpoint / "model.safetensors")
    own = {name.replace(".base_layer", ""): tensor for name, tensor in transformer.state_dict().items()}
    assert all(torch.equal(own[name], tensor) for name, tensor in stored.items())
    parts = {name: tensor for name, tensor in own.items() if ".lora_" in name}
    assert len(parts) == 2 * 4 * 2
    assert all(tensor.any() for tensor in parts.values())
    assert not torch.allclose(logits(transformer), logits(load_transformer(tiny_checkpoint, CPU, torch.float32)))


def test_mlp_applies_its_adapter_when_bias_and_gelu_are_fused(trained, monkeypatch):
    """The fused kernel multiplies by the weight alone, so that it would skip the adapter."""
    transformer, _, _ = trained
    mlp: MLP = transformer.layers[0].mlp
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = mlp(x)
        monkeypatch.setattr("cogview.modeling.transformer.bias_gelu_is_fused", lambda *_: True)
        assert torch.equal(mlp(x), expected)


def test_adapters_are_added_while_weights_are_loaded(trained, load_adapted, tiny_checkpoint):
    adapted, _, folder = trained
    file = (tiny_checkpoint / "model.safetensors").read_bytes()
    torch.testing.assert_close(logits(load_adapted(folder)), logits(adapted), atol=1e-5, rtol=0)
    assert (tiny_checkpoint / "model.safetensors").read_bytes() == file  # which the weights are mapped from


def test_adapters_at_half_scale_add_half_the_sum_of_their_changes(load_adapted, write_adapter, tmp_path):
    """The order does not matter, and an adapter may be there twice."""
    one = write_adapter(tmp_path / "one", targets=("attention.output", "mlp.input"))
    other = write_adapter(tmp_path / "other", targets=("mlp.input",), rank=2)
    base, first, second = (load_adapted(*given).state_dict() for given in ((), (one,), (other,)))
    halves, reverse, twice = (
        load_adapted(*given).state_dict()
        for given in ((f"{one}:0.5", f"{other}:0.5"), (f"{other}:0.5", f"{one}:0.5"), (f"{one}:0.5", f"{one}:0.5"))
    )
    assert (first["layers.0.mlp.input.weight"] - second["layers.0.mlp.input.weight"]).abs().max() > 0.01
    for name, weight in base.items():
        expected = weight.double() + (first[name].double() - weight) / 2 + (second[name].double() - weight) / 2
        torch.testing.assert_close(halves[name].double(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(reverse[name], halves[name], atol=1e-6, rtol=0)
        torch.testing.assert_close(twice[name], first[name], atol=1e-6, rtol=0)


def test_adapters_at_scale_0_leave_every_bit(tiny_checkpoint, tiny_model, trained, write_adapter, tmp_path):
    off = CogView.from_pretrained(tiny_checkpoint, device="cpu", adapter={trained[2]: 0})
    (image,), (same,) = (model.generate(FOX, seed=7) for model in (off, tiny_model))
    assert image.tobytes() == same.tobytes()
    weights = tiny_model.transformer.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in off.transformer.state_dict().items())
    with one_line("there is no adapter at nowhere"):  # off, and yet it must exist
        CogView.from_pretrained(tiny_checkpoint, device="cpu", adapter="nowhere:0")


def test_save_adapter_roundtrips_through_load_adapter(trained, transformer, base, tmp_path):
    adapted, settings, folder = trained
    assert load_adapter(transformer, folder) == settings
    assert torch.equal(logits(transformer), logits(adapted))
    assert all(p.requires_grad == (".lora_" in name) for name, p in transformer.named_parameters())
    assert Adapter(folder).base == base
    assert Adapter(folder).weights().keys() == {n for n, p in transformer.named_parameters() if p.requires_grad}
    # Load into a model in training, as a resumed run does, and store other weights than the model's.
    halved = {name: tensor.detach() / 2 for name, tensor in adapted.named_parameters() if ".lora_" in name}
    save_adapter(tmp_path / "half", adapted, settings, base, halved)
    load_adapter(transformer, tmp_path / "half")
    assert all(torch.equal(transformer.get_parameter(name), tensor) for name, tensor in halved.items())


def test_save_adapter_writes_a_folder_that_peft_reads(trained, transformer):
    peft = pytest.importorskip("peft")
    adapted, settings, folder = trained
    model = peft.PeftModel.from_pretrained(transformer, folder)
    assert torch.equal(logits(model), logits(adapted))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (settings.rank, settings.alpha, "tiny")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_load_adapter_reads_a_folder_of_peft(transformer, load_adapted, tiny_checkpoint, tmp_path, rslora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=12, use_rslora=rslora, target_modules=["mlp.output"], init_lora_weights=False
    )
    model = peft.get_peft_model(transformer, config)
    model.save_pretrained(tmp_path / "theirs")
    ours, going_on = load_adapted(tmp_path / "theirs"), load_transformer(tiny_checkpoint, CPU, torch.float32)
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=0)
    load_adapter(going_on, tmp_path / "theirs")
    torch.testing.assert_close(logits(going_on), logits(model), atol=1e-5, rtol=0)
    assert Adapter(tmp_path / "theirs").base is None


@pytest.mark.parametrize(("settings", "scale"), [({}, 3.0), ({"use_rslora": True}, 6.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_are_rounded_once(load_adapted, write_adapter, tmp_path, settings, scale, dtype):
    folder = write_adapter(tmp_path / "adapter", dtype=torch.float16, **settings)
    before, parts = load_adapted().state_dict(), load_file(folder / WEIGHTS_FILE)
    for name, weight in load_adapted(folder, dtype=dtype).state_dict().items():
        expected = before[name].double()
        stored = PREFIX + name.removesuffix("weight")
        if name.endswith(".attention.output.weight"):
            change = parts[f"{stored}lora_B.weight"].double() @ parts[f"{stored}lora_A.weight"].double()
            expected = expected + scale * change
        torch.testing.assert_close(weight, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_from_pretrained_merges_the_adapter(tiny_checkpoint, tiny_model, trained):
    adapted, _, folder = trained
    model = CogView.from_pretrained(tiny_checkpoint, device="cpu", adapter=folder)
    assert model.label == f"{tiny_checkpoint} + {folder}"
    torch.testing.assert_close(logits(model.transformer), logits(adapted), atol=1e-5, rtol=0)
    (drawn,) = model.generate(FOX, seed=7)
    (without,) = tiny_model.generate(FOX, seed=7)
    assert (drawn.codes != without.codes).any()


def test_from_pretrained_ignores_the_grammar_of_prompts_with_an_adapter(tiny_checkpoint, trained, tmp_path):
    """An adapter may have learnt words and characters that the grammar calls unknown or converts."""
    grammar = resolve_checkpoint("cogview-emoji") / GRAMMAR_FILE
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    shutil.copy(grammar, folder)
    plain, adapted = (CogView.from_pretrained(folder, device="cpu", adapter=adapter) for adapter in (None, trained[2]))
    assert plain.prompt_warning("三隻狗") == "“三隻狗”: 隻 is read as 只"
    assert adapted.prompt_warning("三隻狗") == "“三隻狗”: 33% of its characters are unknown to the model"
    assert plain.tokenize(["三隻狗"])[0].ids == plain.tokenize(["三只狗"])[0].ids
    assert adapted.tokenize(["三隻狗"])[0].ids != adapted.tokenize(["三只狗"])[0].ids


def test_generate_applies_the_adapter_during_training(tiny_checkpoint, trained):
    """Training generates sample sheets; packed weights would be those without the adapter."""
    adapted, _, folder = trained
    merged = CogView.from_pretrained(tiny_checkpoint, device="cpu", adapter=folder)
    parts = vars(merged.model) | {"transformer": adapted}
    learning = CogView(type(merged.model)(**parts), merged.placement, "training")
    assert (has_adapter(adapted), adapted.cpu_layers) == (True, None)
    (one,), (other,) = (model.generate(FOX, seed=7, top_k=1) for model in (learning, merged))
    assert one.log_probability == pytest.approx(other.log_probability, rel=1e-4)


def test_lora_settings_reject_invalid_values():
    assert LoraSettings(rank=8, alpha=16.0).scale == 2.0
    for wrong, words in (
        ({"rank": 0}, "rank of an adapter must be at least 1, got 0"),
        ({"alpha": math.nan}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"targets": ()}, "targets must name at least one of attention.query_key_value"),
        ({"targets": ("mlp.inputs",)}, 'the target "mlp.inputs" is unknown; did you mean "mlp.input"?'),
        ({"targets": ("头",)}, 'the target "头" is unknown; known: attention'),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            LoraSettings(**wrong)


def test_adapter_reports_folders_that_are_no_adapter(write_adapter, tmp_path):
    def refused(folder, words):
        with one_line(words):
            Adapter(folder)

    refused(tmp_path / "nowhere", "there is no adapter at")
    folder = write_adapter(tmp_path / "adapter")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        lacking = shutil.copytree(folder, tmp_path / f"without {file}")
        (lacking / file).unlink()
        refused(lacking, f"is incomplete: {file} is missing")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    content = (damaged / WEIGHTS_FILE).read_bytes()
    (damaged / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])
    refused(damaged, "adapter_model.safetensors is damaged: ")
    for text, words in (("{", "is not JSON"), ("[]", "holds no settings")):
        (damaged / CONFIG_FILE).write_text(text)
        refused(damaged, words)
    for number, (settings, words) in enumerate(
        [
            ({"peft_type": "IA3"}, "the adapter is of the type IA3, and only LORA can be used"),
            ({"use_dora": True}, "use_dora is true, which is not supported"),
            ({"bias": "all"}, 'bias is "all", which is not supported'),
            ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa", which is not supported'),
            ({"r": "4"}, 'r must be a whole number from 1 to 65536, got "4"'),
            ({"r": 10**400, "use_rslora": True}, "r must be a whole number from 1 to 65536, got 1000"),
            ({"r": 8}, "attention.output has parts of the shapes [4, 32] and [32, 4], which are not those of rank 8"),
            ({"lora_alpha": None}, "lora_alpha must be a finite number, got null"),
            ({"lora_alpha": 10**400}, "lora_alpha must be a finite number, got 1000"),
            ({"lora_alpha": True}, "lora_alpha must be a finite number, got true"),
            ({"lora_dropout": float("nan")}, "lora_dropout must be a finite number, got NaN"),
            ({"lora_alpha": -1}, "alpha must be above 0, got -1"),
        ]
    ):
        other = shutil.copytree(folder, tmp_path / f"settings {number}")
        (other / CONFIG_FILE).write_text(json.dumps(PLAIN | settings))
        refused(other, words)
    tensors = load_file(folder / WEIGHTS_FILE)
    first = next(name for name in tensors if "lora_B" in name)
    for number, (changed, words) in enumerate(
        [
            ({}, "holds nothing"),
            ({name: tensor for name, tensor in tensors.items() if name != first}, f"{first} is missing"),
            (
                tensors | {f"{PREFIX}embedding.lora_embedding_A": torch.ones(2)},
                "holds base_model.model.embedding.lora_embedding_A, which does not belong to a LoRA adapter",
            ),
        ]
    ):
        other = shutil.copytree(folder, tmp_path / f"tensors {number}")
        save_file(changed, other / WEIGHTS_FILE)
        refused(other, words)


def test_check_model_refuses_an_adapter_of_another_model(transformer, tiny_checkpoint, write_adapter, base, tmp_path):
    config, plain = read_config(tiny_checkpoint), vars(base)

    def refused(folder, words, name="cogview-emoji"):
        with one_line(words):
            Adapter(folder).check_model(config, name)

    deeper = write_adapter(tmp_path / "deeper", base=plain | {"num_layers": 4})
    words = "belongs to a model of 4 layers of width 32 with 2 heads and {0} ids (tiny), this one has 2 layers of width"
    refused(deeper, words.format(base.vocabulary_size))
    refused(write_adapter(tmp_path / "codes", base=plain | {"codebook_sha256": "0" * 64}), "of another image tokenizer")
    named = write_adapter(tmp_path / "named", base=plain | {"name": "cogview-base"})
    refused(named, "was made for cogview-base, not for cogview-emoji")
    Adapter(named).check_model(config, str(tiny_checkpoint))  # a folder may be that model

    folder = write_adapter(tmp_path / "by hand")
    tensors = load_file(folder / WEIGHTS_FILE)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: torch.ones(4, 48)}, folder / WEIGHTS_FILE)
    with one_line("another width: layers.0.attention.output is 32 x 48 there and 32 x 32 in"):
        Adapter(folder).check(transformer.config)
    save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    with one_line("changes layers.7.attention.output, which this model does not have"):
        Adapter(folder).check(transformer.config)
    save_file(tensors | {name: tensors[name] * math.nan}, folder / WEIGHTS_FILE)
    with one_line("attention.output.lora_A.weight has 128 of 128 numbers that are NaN or infinite: "):
        Adapter(folder).check(transformer.config)


def test_load_adapter_refuses_other_projections(transformer, write_adapter, tmp_path):
    pytest.importorskip("peft")
    small = write_adapter(tmp_path / "small")
    large = write_adapter(tmp_path / "large", targets=("attention.output", "mlp.input"))
    wide = write_adapter(tmp_path / "wide", rank=8)
    load_adapter(transformer, small)
    with one_line("has layers.0.mlp.input.lora_A.default.weight, which is not trained here"):
        load_adapter(transformer, large)
    with pytest.raises(
        InputError, match=r"has \[8, 32\] for layers.0.attention.output.lora_A.default.weight, expected"
    ):
        load_adapter(transformer, wide)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_adapters_are_added_before_weights_are_quantized(
    load_adapted, trained, tiny_checkpoint, tmp_path, quantization
):
    """The result equals the merged folder, opened in the same format."""
    _, _, folder = trained
    merge_folder(tiny_checkpoint, [Adapter(folder)], tmp_path / "merged", name="")
    expected = load_adapted(folder=tmp_path / "merged", dtype=torch.bfloat16, quantization=quantization).state_dict()
    found = load_adapted(folder, dtype=torch.bfloat16, quantization=quantization).state_dict()
    assert {tensor.dtype for tensor in found.values()} >= {torch.int8 if quantization == "int8" else torch.uint8}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_load_adapted_refuses_another_quantization_than_that_of_the_folder(
    load_adapted, trained, tiny_checkpoint, tmp_path
):
    convert_folder(tiny_checkpoint, tmp_path / "rounded", precision=Precision(quantization="int8"))
    with one_line("the weights are stored as int8, which cannot be turned into int4"):
        load_adapted(trained[2], folder=tmp_path / "rounded", dtype=torch.bfloat16, quantization="int4")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_adapters_are_added_to_weights_that_are_stored_quantized(
    trained, tiny_checkpoint, tmp_path, caplog, quantization
):
    """They are restored, changed and quantized again; without quantization the sum is exact."""
    folder = trained[2]
    convert_folder(tiny_checkpoint, tmp_path / "rounded", precision=Precision(quantization=quantization))
    merge_folder(tmp_path / "rounded", [Adapter(folder)], tmp_path / "merged", name="")
    base = CogView.from_pretrained(tmp_path / "rounded", device="cpu", dtype="float32").transformer.state_dict()
    exact = CogView.from_pretrained(tmp_path / "rounded", device="cpu", dtype="float32", adapter=folder)
    assert not caplog.records
    for name, weight in exact.transformer.state_dict().items():
        projection = name.removesuffix(".weight")
        if projection in Adapter(folder).projections:
            change = Adapter(folder).change(projection)
            torch.testing.assert_close(
                weight - base[name], change.factor * change.b_NR @ change.a_RK, atol=1e-6, rtol=0
            )
        else:
            assert torch.equal(weight, base[name])
    found = CogView.from_pretrained(tmp_path / "rounded", device="cpu", adapter=folder)
    assert "it is quantized again with the adapter, which adds as large an error" in caplog.text
    expected = CogView.from_pretrained(tmp_path / "merged", device="cpu").transformer.state_dict()
    assert found.placement.weight_format == quantization
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.transformer.state_dict().items())


def test_add_lora_names_the_extra_when_peft_is_missing(transformer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with one_line("pip install 'cogview[lora]'"):
        add_lora(transformer, LoraSettings())
