"""Training the transformer: exact resuming, losses by hand, accumulation, left-out captions, the order of rows."""

# B rows, T places of a row, V ids of a kind

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview.checkpoints.folder import Model, ModelConfig
from cogview.checkpoints.image import codebook_hash
from cogview.config import TransformerConfig
from cogview.data.sampler import sample_index
from cogview.data.store import ABSENT, StoreHeader, StoreWriter, TokenStore, pad_text
from cogview.errors import InputError
from cogview.tokenizers.text import TextTokenizer, train_text_tokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.transformer import TransformerTrainer, TransformerTraining, store_batches
from cogview.transformer import Transformer
from cogview.vqvae.model import VQVAE, VQVAEConfig

CPU = torch.device("cpu")
CODES, GRID = 32, 8
CAPTIONS = ("一个红苹果", "蓝色背景上的三只狐狸", "汽车的左边是一条鱼", "打开的书上面有两只狗")


@functools.cache
def text_tokenizer() -> TextTokenizer:
    return TextTokenizer(train_text_tokenizer(CAPTIONS, size=400, coverage=1.0))


def new_model(seed: int = 0, dropout: float = 0.0) -> Model:
    torch.manual_seed(1)
    image_tokenizer = VQVAE(VQVAEConfig(channels=(4, 4, 8), encoder_blocks=(0, 0, 0), num_codes=CODES, code_width=4))
    vocabulary = Vocabulary(num_image_codes=CODES, num_text_pieces=text_tokenizer().size)
    shape = TransformerConfig(
        num_layers=2,
        width=32,
        num_heads=2,
        vocabulary_size=vocabulary.padded_size,
        max_positions=100,
        dropout=dropout,
    )
    torch.manual_seed(seed)
    config = ModelConfig(
        transformer=shape,
        vocabulary=vocabulary,
        grid=GRID,
        tasks=("generate",),
        max_text=30,
        codebook_sha256=codebook_hash(image_tokenizer),
    )
    return Model(
        config=config,
        transformer=Transformer(shape),
        image_tokenizer=image_tokenizer,
        text_tokenizer=text_tokenizer(),
    )


def settings(**changes) -> TransformerTraining:
    return TransformerTraining(**{"steps": 100, "batch_size": 8, "warmup_steps": 2, "caption_drop": 0.0, **changes})


def trainer(model: Model | None = None, **changes) -> TransformerTrainer:
    return TransformerTrainer(model or new_model(), settings(**changes), CPU, None)


def rows(step: int = 0, size: int = 8, *, equal: bool = False) -> dict[str, np.ndarray]:
    """Rows as a store gives them, a function of the step; with ``equal`` all texts are as long."""
    random = np.random.default_rng(step)
    texts = [text_tokenizer().encode(CAPTIONS[0 if equal else i]) for i in random.integers(len(CAPTIONS), size=size)]
    return {
        "text": pad_text(texts, 20),
        "image": random.integers(CODES, size=(size, GRID**2)).astype(np.uint16),
    }


KEEP_ALL = np.ones(8, dtype=bool)


def test_steps_equal_half_of_them_and_the_rest_after_a_restart(tmp_path):
    changes = {"caption_drop": 0.5, "hidden_rows": 0.5, "accumulation": 2, "steps": 6}
    whole = trainer(new_model(dropout=0.2), **changes)
    figures = [whole.step(step, rows(step)) for step in range(6)]

    first = trainer(new_model(dropout=0.2), **changes)
    for step in range(3):
        first.step(step, rows(step))
    first.save(tmp_path)
    torch.rand(5)  # a process that starts anew has another state
    second = trainer(new_model(seed=4, dropout=0.2), **changes)
    second.load(tmp_path)
    assert [second.step(step, rows(step)) for step in range(3, 6)] == figures[3:]
    for name, tensor in whole.transformer.state_dict().items():
        assert torch.equal(tensor, second.transformer.state_dict()[name]), name

    without = trainer(new_model(dropout=0.0), **changes)
    assert without.step(0, rows(0))["loss"] != figures[0]["loss"]  # dropout did take part


def test_losses_are_the_cross_entropy_of_each_kind_of_id_among_its_own(tmp_path):
    subject = trainer()
    subject.transformer.eval()
    vocabulary = subject.model.config.vocabulary
    given = rows(size=3)
    image_losses, text_losses = [], []
    for text, image in zip(given["text"], given["image"], strict=True):
        pieces = [int(piece) for piece in text if piece != ABSENT]
        command = vocabulary.command
        sequence = [
            command("[ROI1]"),
            *(CODES + piece for piece in pieces),
            *(command("[TINY]"), command("[BOI1]")),
            *map(int, image),
            command("[EOI1]"),
        ]
        with torch.no_grad():
            logits_TV = subject.transformer(torch.tensor([sequence[:-1]]))[0]
        for place, target in enumerate(sequence[1:]):
            if 0 < place + 1 <= len(pieces):
                wanted = logits_TV[place, CODES : vocabulary.size].log_softmax(dim=0)[target - CODES]
                text_losses.append(-wanted.item())
            elif len(pieces) + 3 <= place + 1 < len(pieces) + 3 + GRID**2:
                image_losses.append(-logits_TV[place, :CODES].log_softmax(dim=0)[target].item())
    assert len(image_losses) == 3 * GRID**2
    assert len(text_losses) == (given["text"] != ABSENT).sum()
    image, text = subject.losses(given, np.ones(3, dtype=bool))
    assert image.item() == pytest.approx(np.mean(image_losses), abs=1e-5)
    assert text.item() == pytest.approx(np.mean(text_losses), abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_the_loss_is_that_of_the_image_and_a_share_of_that_of_the_text(weight):
    figures = trainer(text_loss_weight=weight).step(0, rows())
    assert figures["loss"] == pytest.approx(figures["image_loss"] + weight * figures["text_loss"])
    assert figures["image_loss"] == pytest.approx(math.log(CODES), abs=0.2)  # nothing is learnt yet


def gradients(subject: TransformerTrainer, given: dict[str, np.ndarray], monkeypatch) -> dict[str, torch.Tensor]:
    """What one step would update with, before it does."""
    monkeypatch.setattr(subject.optimizer, "step", lambda: None)
    monkeypatch.setattr(subject.optimizer, "zero_grad", lambda set_to_none: None)
    subject.step(0, given)
    return {name: parameter.grad for name, parameter in subject.transformer.named_parameters()}


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_batch(parts, monkeypatch):
    given = rows(equal=True)
    whole = gradients(trainer(), given, monkeypatch)
    in_parts = gradients(trainer(accumulation=parts), given, monkeypatch)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(in_parts[name], gradient, atol=1e-6, rtol=1e-4)


def test_training_memorises_eight_rows():
    subject = trainer(steps=100, learning_rate=1e-2, warmup_steps=10)
    first = subject.step(0, rows())
    for step in range(1, 100):
        last = subject.step(step, rows())
    assert last["image_loss"] < 0.25 * first["image_loss"]
    assert last["text_loss"] < 0.25 * first["text_loss"]


def test_a_caption_that_is_left_out_is_an_empty_text():
    subject, given = trainer(caption_drop=1.0), rows(size=2)
    batch = subject.arrange(given, np.array([False, True]))
    command = subject.model.config.vocabulary.command
    length = 3 + GRID**2 + 1
    assert batch.ends.tolist() == [length, length + (given["text"][1] != ABSENT).sum()]
    assert batch.ids[0, :3].tolist() == [command("[ROI1]"), command("[TINY]"), command("[BOI1]")]
    assert batch.ids[0, 3 : length - 1].tolist() == given["image"][0].tolist()
    assert (batch.ids[0, length:] == command("[PAD]")).all()

    figures = subject.step(0, given)  # drops both
    assert figures["text_loss"] == 0
    assert figures["loss"] == figures["image_loss"] > 0


def test_left_out_captions_are_a_share_that_seed_and_step_decide(monkeypatch):
    kept: list[np.ndarray] = []

    def note(self, given, keep, hide):
        kept.append(keep)
        weight = self.transformer.final_norm.weight
        return weight.sum(), weight.sum()

    monkeypatch.setattr(TransformerTrainer, "losses", note)
    given = {name: np.repeat(values, 50, axis=0) for name, values in rows().items()}
    subject = trainer(caption_drop=0.25)
    for step in (0, 1, 0):
        subject.step(step, given)
    trainer(caption_drop=0.25, seed=1).step(0, given)
    assert all(0.18 < 1 - keep.mean() < 0.32 for keep in kept)
    assert (kept[0] == kept[2]).all()
    assert (kept[0] != kept[1]).any()
    assert (kept[0] != kept[3]).any()


def test_hidden_codes_are_a_share_that_seed_and_step_decide():
    """Half of the chosen rows hide every code, the others a share between none and all; captions left out hide none."""
    subject = trainer(hidden_rows=0.5, caption_drop=0.2)
    keep, hide = subject.choices(3, 4000, 64)
    for again, same in zip(subject.choices(3, 4000, 64), (keep, hide), strict=True):
        assert (again == same).all()
    assert (subject.choices(4, 4000, 64)[1] != hide).any()
    share = hide.mean(axis=1)
    assert not hide[~keep].any()
    assert 0.46 < (share[keep] > 0).mean() < 0.54
    assert 0.22 < (share[keep] == 1).mean() < 0.28
    assert 0.4 < share[(share > 0) & (share < 1)].mean() < 0.6
    assert not trainer(caption_drop=0.2).choices(3, 4000, 64)[1].any()


def test_a_hidden_code_is_learnt_but_not_seen():
    """With every code hidden, the loss at a place follows from text and place: other codes before it change nothing."""
    subject = trainer()
    given, everything = rows(), np.ones_like(rows()["image"], dtype=bool)
    changed = {**given, "image": given["image"].copy()}
    changed["image"][:, 0] = (changed["image"][:, 0] + 1) % CODES  # the first code is also a target: compare the others

    def loss_of_the_rest(rows: dict[str, np.ndarray], hide: np.ndarray) -> torch.Tensor:
        batch = subject.arrange(rows, KEEP_ALL)
        subject.arrange = lambda *_: replace(batch, loss=batch.loss & (np.cumsum(batch.kinds == 2, axis=1) > 1))
        try:
            return subject.losses(rows, KEEP_ALL, hide)[0]
        finally:
            del subject.arrange

    with torch.no_grad():
        subject.transformer.eval()
        hidden = [loss_of_the_rest(content, everything) for content in (given, changed)]
        seen = [loss_of_the_rest(content, ~everything) for content in (given, changed)]
        assert torch.equal(subject.losses(given, KEEP_ALL, ~everything)[0], subject.losses(given, KEEP_ALL)[0])
    assert torch.equal(*hidden)
    assert not torch.equal(*seen)
    assert not torch.equal(hidden[0], seen[0])


def test_the_learning_rate_rises_then_falls_to_its_end():
    chosen = settings(steps=20, warmup_steps=4, learning_rate=1e-2, final_learning_rate=1e-4)
    rates = [chosen.learning_rate_at(step) for step in range(21)]
    assert rates[0] == pytest.approx(1e-2 / 4)
    assert rates[3] == rates[4] == pytest.approx(1e-2)
    assert rates[12] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[20] == pytest.approx(1e-4)
    subject = TransformerTrainer(new_model(), chosen, CPU, None)
    assert subject.step(1, rows())["learning_rate"] == rates[1]
    assert {group["lr"] for group in subject.optimizer.param_groups} == {rates[1]}


def test_biases_and_norms_do_not_decay():
    decays = {group["weight_decay"]: group["params"] for group in trainer(weight_decay=0.3).optimizer.param_groups}
    assert {parameter.dim() for parameter in decays[0.3]} == {2}
    assert {parameter.dim() for parameter in decays[0.0]} == {1}
    assert sum(map(len, decays.values())) == len(list(new_model().transformer.parameters()))


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_as_they_were():
    subject = trainer()
    with torch.no_grad():
        subject.transformer.final_norm.bias[0] = torch.inf
    before = {name: tensor.clone() for name, tensor in subject.transformer.state_dict().items()}
    with pytest.raises(InputError, match="gradient of step 3 is not finite; lower the learning rate, or resume"):
        subject.step(3, rows())
    for name, tensor in subject.transformer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_bfloat16_autocast_stays_near_float32():
    plain = trainer()
    halved = TransformerTrainer(new_model(), settings(), CPU, torch.bfloat16)
    for exact, rounded in zip(plain.losses(rows(), KEEP_ALL), halved.losses(rows(), KEEP_ALL), strict=True):
        assert exact.item() != rounded.item()
        assert exact.item() == pytest.approx(rounded.item(), rel=0.02)


def test_weights_of_another_codebook_are_not_taken_up(tmp_path):
    first = trainer()
    first.save(tmp_path)
    other = new_model()
    other.image_tokenizer.quantizer.codebook.mul_(-1)
    other.config = ModelConfig(**{**vars(other.config), "codebook_sha256": codebook_hash(other.image_tokenizer)})
    with pytest.raises(InputError, match="trained on the codes of another image tokenizer"):
        trainer(other).load(tmp_path)


def write_store(path: Path, count: int) -> TokenStore:
    header = StoreHeader(
        fields={"text": 20, "image": GRID**2},
        grid=GRID,
        num_image_codes=CODES,
        num_text_pieces=text_tokenizer().size,
        layouts=("generate",),
        codebook_sha256="a",
        text_sha256="b",
    )
    with StoreWriter(path, header) as writer:
        writer.append(rows(9, count))
    return TokenStore(path)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_rows_of_a_step_are_a_function_of_seed_and_step(tmp_path, workers):
    store = write_store(tmp_path, 21)
    chosen = settings(steps=7, seed=3, workers=workers)
    given = list(store_batches(store, chosen, 0))
    assert len(given) == 7
    for step, batch in enumerate(given):
        expected = store.read(sample_index(3, np.arange(8 * step, 8 * step + 8), 21))
        assert set(batch) == {"text", "image"}
        for name in batch:
            assert np.array_equal(batch[name], expected[name])
    resumed = list(store_batches(store, chosen, 5))
    assert len(resumed) == 2
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(resumed, given[5:], strict=True))


def test_evaluation_gives_the_losses_of_the_held_out_rows_and_a_sheet(tmp_path):
    store = write_store(tmp_path / "store", 16)
    sheets = []
    subject = TransformerTrainer(
        new_model(dropout=0.5),
        settings(caption_drop=0.9),
        CPU,
        None,
        held_out=store,
        draw_sheet=lambda model, path: sheets.append((model, path)),
    )
    subject.step(0, rows())  # leaves it in training mode, with dropout
    figures = subject.evaluate(7, tmp_path)
    assert figures == subject.evaluate(7, tmp_path)
    with torch.no_grad():
        image, text = zip(
            *(subject.losses(store.read(range(first, first + 8)), KEEP_ALL) for first in (0, 8)), strict=True
        )
    assert figures["held_out_image_loss"] == pytest.approx(sum(image).item() / 2)
    assert figures["held_out_text_loss"] == pytest.approx(sum(text).item() / 2)
    assert sheets == [(subject.model, tmp_path / "step-00000007.png")] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 100}, r"warmup_steps must be from 1 to steps - 1 \(99\), got 100"),
        ({"accumulation": 3}, "batch_size 8 does not divide into 3 equal parts"),
        ({"caption_drop": 1.5}, r"caption_drop must be in \[0, 1\], got 1.5"),
        ({"text_loss_weight": -1.0}, "text_loss_weight must not be negative, got -1.0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
