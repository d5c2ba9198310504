"""Adapters with embeddings of words: trained, saved, added to models, and exchanged with PEFT."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogview.checkpoints.adapted_weights import open_adapters
from cogview.checkpoints.adapter import (
    CONFIG_FILE,
    STORED_ROWS,
    WEIGHTS_FILE,
    Adapter,
    BaseModelInfo,
    load_adapter,
    save_adapter,
)
from cogview.checkpoints.adapter_choice import AdapterChoice
from cogview.checkpoints.adapter_merge import merge_folder
from cogview.checkpoints.checkpoint import load_model, load_transformer, read_config
from cogview.errors import InputError
from cogview.modeling.lora import LoraSettings, add_lora, trained_token_ids
from cogview.training.model_setup import word_ids

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
WORD = "立体"  # not among the pieces of the tiny model: six bytes
SETTINGS = LoraSettings(rank=2, alpha=4.0, targets=("mlp.output",), words=(WORD,))


@pytest.fixture(scope="module")
def ids(tiny_checkpoint):
    """The ids of the word."""
    return word_ids(load_model(tiny_checkpoint, CPU, torch.float32), [WORD])


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, ids, tmp_path_factory):
    """A transformer with a trained adapter and trained embeddings, and its folder."""
    transformer = load_transformer(tiny_checkpoint, CPU, torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(transformer, SETTINGS, ids)
    optimizer = torch.optim.SGD([one for one in transformer.parameters() if one.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        transformer(torch.tensor([ids])).pow(2).mean().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("adapters") / "words"
    save_adapter(folder, transformer, SETTINGS, BaseModelInfo.of("tiny", read_config(tiny_checkpoint)))
    return transformer.eval(), folder


def load_adapted(checkpoint, *adapters, dtype=torch.float32):
    """Load a transformer with adapters, each given as NAME[:SCALE]."""
    choices = [AdapterChoice.parse(str(adapter)) for adapter in adapters]
    opened = open_adapters(choices, read_config(checkpoint), str(checkpoint))
    return load_transformer(checkpoint, CPU, dtype, adapters=opened)


@torch.no_grad()
def logits(transformer, ids):
    return transformer(torch.tensor([[5, *ids, 9]]))


def test_word_ids_are_those_of_pieces_or_bytes(tiny_checkpoint, ids, capsys):
    model = load_model(tiny_checkpoint, CPU, torch.float32)
    assert len(ids) == 6
    assert set(ids) < set(model.config.vocabulary.text)
    assert word_ids(model, [WORD, WORD[:1]]) == ids
    assert capsys.readouterr().err == "embeddings of 6 pieces are learnt: those of 立体、立\n"
    assert word_ids(model, []) == []
    assert capsys.readouterr().err == ""


def test_word_ids_of_many_words_are_announced_in_a_short_line(tiny_checkpoint, capsys):
    model = load_model(tiny_checkpoint, CPU, torch.float32)
    word_ids(model, [chr(0x4E00 + number) for number in range(6_000)])
    line = capsys.readouterr().err
    assert len(line) < 200
    assert line.endswith(": those of 一、丁、丂、七、丄、丅、丆、万 and 5992 more\n")


def test_training_changes_no_other_row_of_the_embedding(trained, tiny_checkpoint, ids):
    transformer, folder = trained
    before = load_file(tiny_checkpoint / "model.safetensors")["embedding.weight"]
    merged = load_adapted(tiny_checkpoint, folder).embedding.weight
    changed = (merged != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == ids == trained_token_ids(transformer) == list(Adapter(folder).token_ids)
    torch.testing.assert_close(merged, transformer.embedding.weight, atol=1e-6, rtol=0)
    assert torch.equal(transformer.embedding.token_adapter.base_layer.weight, before)


def test_adapted_transformer_equals_the_trained_one(trained, tiny_checkpoint, ids):
    """The embedding is tied to the output, so the logits of the words change as well."""
    transformer, folder = trained
    expected = logits(transformer, ids)
    torch.testing.assert_close(logits(load_adapted(tiny_checkpoint, folder), ids), expected, atol=1e-5, rtol=0)
    going_on = load_transformer(tiny_checkpoint, CPU, torch.float32)
    load_adapter(going_on, folder)
    assert torch.equal(logits(going_on, ids), expected)
    halves = load_adapted(tiny_checkpoint, f"{folder}:0.5", f"{folder}:0.5")
    torch.testing.assert_close(logits(halves, ids), expected, atol=1e-5, rtol=0)
    assert load_adapted(tiny_checkpoint, folder, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


def test_peft_reads_a_folder_with_words(trained, tiny_checkpoint, ids):
    transformer, folder = trained
    theirs = peft.PeftModel.from_pretrained(load_transformer(tiny_checkpoint, CPU, torch.float32), folder)
    assert torch.equal(logits(theirs, ids), logits(transformer, ids))


def test_adapter_reads_a_folder_of_peft_with_rows(tiny_checkpoint, ids, tmp_path):
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["mlp.output"], trainable_token_indices={"embedding": [ids[2], ids[0]]}
    )
    model = peft.get_peft_model(load_transformer(tiny_checkpoint, CPU, torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 10)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(load_adapted(tiny_checkpoint, tmp_path), ids), logits(model.eval(), ids), atol=1e-5, rtol=0
    )


def test_merge_folder_writes_words_and_refuses_to_remove_them(trained, tiny_checkpoint, ids, tmp_path):
    transformer, folder = trained
    merge_folder(tiny_checkpoint, [Adapter(folder)], tmp_path / "merged", name="")
    merged = load_transformer(tmp_path / "merged", CPU, torch.float32)
    torch.testing.assert_close(logits(merged, ids), logits(transformer, ids), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="cannot be removed: it has learnt embeddings of words, and does not hold"):
        merge_folder(tmp_path / "merged", [Adapter(folder)], tmp_path / "back", name="", sign=-1)
    assert not (tmp_path / "back").exists()


def test_adapter_refuses_rows_that_do_not_fit(trained, tiny_checkpoint, tmp_path):
    _, folder = trained
    tensors, settings = load_file(folder / WEIGHTS_FILE), json.loads((folder / CONFIG_FILE).read_text())
    rows, ids = tensors[STORED_ROWS], settings["trainable_token_indices"]["embedding"]
    without = {name: tensor for name, tensor in tensors.items() if name != STORED_ROWS}
    faults = (
        (tensors, {"embedding": [1, 1, 2, 3, 4, 5]}, "must list different ids of the layer embedding, got "),
        (tensors, {"lm_head": ids}, "must list different ids of the layer embedding"),
        (tensors, {"embedding": [-1, *ids[1:]]}, "must list different ids of the layer embedding"),
        (tensors, None, "must list different ids of the layer embedding, got null"),
        (without, {"embedding": ids}, "must hold 6 rows of the embedding, got nothing"),
        (
            tensors | {STORED_ROWS: rows[:5].clone()},
            {"embedding": ids},
            r"must hold 6 rows of the embedding, got \[5, 32\]",
        ),
        (
            tensors,
            {"embedding": [*ids[:5], 10**6]},
            "has embeddings of width 32 for ids up to 1000000, this model has ",
        ),
        (tensors | {STORED_ROWS: rows * torch.nan}, {"embedding": ids}, "numbers that are NaN or infinite"),
    )
    for number, (weights, indices, message) in enumerate(faults):
        other = shutil.copytree(folder, tmp_path / str(number))
        save_file(weights, other / WEIGHTS_FILE)
        (other / CONFIG_FILE).write_text(json.dumps(settings | {"trainable_token_indices": indices}))
        with pytest.raises(InputError, match=message) as caught:
            Adapter(other).check(read_config(tiny_checkpoint).transformer)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="words must not be empty"):
        LoraSettings(words=("立体", " "))
