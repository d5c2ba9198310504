"""Fused linear cross-entropy: every implementation against float64, gradients, memory, and errors."""

# N positions, M positions of one kind, D width, V rows of the embedding, I candidate ids

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogview.kernels import fused_linear_cross_entropy as module
from cogview.kernels.dispatch import select_backend
from cogview.kernels.fused_linear_cross_entropy import (
    LossTargets,
    fused_linear_cross_entropy,
    fused_linear_cross_entropy_reference,
    losses_in_place_torch,
)

FORMS = ("reference", "torch", "triton")
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def force(monkeypatch):
    """Return a function that forces an implementation; the choice is cleared afterwards."""

    def force_form(form):
        if form == "triton":
            pytest.importorskip("triton")
        monkeypatch.setenv("COGVIEW_KERNELS", form)
        select_backend.cache_clear()

    select_backend.cache_clear()
    yield force_form
    select_backend.cache_clear()


def random_inputs(device, dtype=torch.float32, num_places=65, width=24, num_rows=60):
    """Return hidden states and an embedding that are slices of larger tensors."""
    generator = torch.Generator().manual_seed(num_places)
    hidden_ND = torch.randn(num_places, 2 * width, generator=generator)[:, ::2]
    embedding_VD = torch.randn(width, num_rows, generator=generator).T
    return hidden_ND.to(device, dtype), embedding_VD.to(device, dtype)


def random_targets(device, num_places=65, ids=(range(17), range(20, 59))):
    """Return two kinds of targets that share positions; the second has a weight of 0, and all tensors are strided."""
    generator = torch.Generator().manual_seed(num_places)
    found = []
    for number, among in enumerate(ids):
        places_M = torch.randperm(num_places, generator=generator)[: -(-num_places // 3)]
        targets_M2 = torch.randint(among.start, among.stop, (len(places_M), 2), generator=generator)
        weights_M = torch.rand(len(places_M), generator=generator)
        weights_M[-1] *= 1 - number
        found.append(LossTargets(among, *(x.to(device) for x in (places_M, targets_M2[:, 1], weights_M))))
    return found


def expected_by_loops(hidden_ND, embedding_VD, targets):
    """Return total, losses and both gradients in float64, position by position."""
    hidden_ND, embedding_VD = (x.detach().double().requires_grad_() for x in (hidden_ND, embedding_VD))
    total, losses = torch.zeros((), dtype=torch.float64, device=hidden_ND.device), []
    for got in targets:
        rows_ID, own_losses = embedding_VD[got.ids.start : got.ids.stop], []
        for position, target in zip(got.positions_M.tolist(), got.targets_M.tolist(), strict=True):
            own_losses.append(-(rows_ID @ hidden_ND[position]).log_softmax(dim=0)[target - got.ids.start])
        losses.append(torch.stack(own_losses))
        total = total + (losses[-1] * got.weights_M).sum()
    return total, losses, torch.autograd.grad(total, (hidden_ND, embedding_VD))


def learnt(hidden_ND, embedding_VD, targets, scale=1.0):
    """Return the same from ``fused_linear_cross_entropy``, with gradients of ``scale`` times the total."""
    hidden_ND, embedding_VD = (x.detach().requires_grad_() for x in (hidden_ND, embedding_VD))
    total, losses = fused_linear_cross_entropy(hidden_ND, embedding_VD, targets)
    return total, losses, torch.autograd.grad(scale * total, (hidden_ND, embedding_VD))


@forms
@pytest.mark.parametrize("num_places", [1, 7, 65, 257])
def test_fused_linear_cross_entropy_matches_float64(force, device, monkeypatch, form, num_places):
    """There are several chunks, the last of which is smaller."""
    force(form)
    monkeypatch.setattr(module, "CHUNK_BYTES", {device.type: 4 * 39 * 50})
    inputs, targets = random_inputs(device, num_places=num_places), random_targets(device, num_places)
    total, losses, gradients = learnt(*inputs, targets)
    expected_total, expected_losses, expected_gradients = expected_by_loops(*inputs, targets)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected_total, atol=1e-5, rtol=1e-6)
    for got, expected in zip(losses, expected_losses, strict=True):
        assert got.dtype == torch.float32
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    for got, expected in zip(gradients, expected_gradients, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_fused_linear_cross_entropy_computes_in_float64_when_inputs_are_float64(force, device, form):
    force(form)
    inputs, targets = random_inputs(device, torch.float64), random_targets(device)
    total, losses, gradients = learnt(*inputs, targets)
    expected = expected_by_loops(*inputs, targets)
    # Only the order of a sum differs.
    torch.testing.assert_close((total, losses, gradients), expected, atol=1e-13, rtol=1e-13)


@forms
@pytest.mark.parametrize("weight", [1.0, 1e-7, 1e4])
def test_fused_linear_cross_entropy_is_as_exact_as_its_products_when_float16(force, device, form, weight):
    """Weights of 1 / N underflow in float16 if nothing scales them, and large ones overflow.

    The reference does without, as its gradients are scaled before the products.
    """
    force(form)
    inputs = random_inputs(device, torch.float16)
    targets = [dataclasses.replace(got, weights_M=got.weights_M * weight) for got in random_targets(device)]
    total, _, gradients = learnt(*inputs, targets, scale=1 / weight)
    expected_total, _, expected_gradients = expected_by_loops(*inputs, targets)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected_total, rtol=4e-3, atol=0)
    for got, expected in zip(gradients, expected_gradients, strict=True):
        assert got.dtype == torch.float16
        error = (got.double() - expected / weight).abs().max()
        assert error < 8e-3 * (expected / weight).abs().max()


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_linear_cross_entropy_is_zero_when_all_weights_are_zero(force, device, form, dtype):
    force(form)
    targets = [dataclasses.replace(got, weights_M=got.weights_M * 0) for got in random_targets(device, 7)]
    torch.set_flush_denormal(True)  # as in training: 0 must not be divided by a flushed number
    try:
        total, losses, gradients = learnt(*random_inputs(device, dtype, num_places=7), targets)
    finally:
        torch.set_flush_denormal(False)
    assert total == 0
    assert min(got.min() for got in losses) > 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_ids", [38, 39, 207])
def test_fused_linear_cross_entropy_ignores_uninitialized_memory(dtype, num_ids, monkeypatch):
    """Gradients were occasionally NaN: a product read uninitialized memory after the rows of logits."""
    empty = torch.Tensor.new_empty

    def spoilt(self, *shape, **options):
        return empty(self, *shape, **options).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", spoilt)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(203, 32, generator=generator).to(dtype).requires_grad_()
    embedding = torch.randn(300, 32, generator=generator).to(dtype).requires_grad_()
    targets = LossTargets(
        ids=range(7, 7 + num_ids),
        positions_M=torch.arange(64),
        targets_M=torch.full((64,), 9),
        weights_M=torch.full((64,), 1 / 64),
    )
    total, _ = fused_linear_cross_entropy(hidden, embedding, [targets])
    total.backward()
    for number in (total, hidden.grad, embedding.grad):
        assert torch.isfinite(number).all()


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_linear_cross_entropy_equals_head_and_cross_entropy_under_autocast(force, device, form, dtype):
    force(form)
    if form == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    inputs, targets = random_inputs(device), random_targets(device)
    results = []
    for way in (fused_linear_cross_entropy_reference, fused_linear_cross_entropy):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.autocast(device.type, dtype):
            total, losses = way(*leaves, targets)
        results.append((total, *losses, *torch.autograd.grad(total, leaves)))
    *expected_losses, d_hidden, d_embedding = results[0]
    for got, expected in zip(results[1], expected_losses, strict=False):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)  # logits are rounded in the same way
    exact = expected_by_loops(*inputs, targets)[2]
    for got, rounded, true in zip(results[1][-2:], (d_hidden, d_embedding), exact, strict=True):
        assert got.dtype == torch.float32
        assert 0 < (got - true).norm() <= 1.1 * (rounded - true).norm()


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("asked", [(True, False), (False, True)])
def test_fused_linear_cross_entropy_computes_one_gradient_when_one_is_asked(force, device, form, asked):
    force(form)
    targets = random_targets(device)
    leaves = [x.requires_grad_(asks) for x, asks in zip(random_inputs(device), asked, strict=True)]
    both = learnt(*leaves, targets)[2]
    total, _ = fused_linear_cross_entropy(*leaves, targets)
    total.backward()
    for leaf, expected, asks in zip(leaves, both, asked, strict=True):
        assert torch.equal(leaf.grad, expected) if asks else leaf.grad is None


@forms
def test_fused_linear_cross_entropy_gives_the_same_losses_without_gradients(force, device, form):
    force(form)
    inputs, targets = random_inputs(device), random_targets(device)
    expected_total, expected_losses, _ = learnt(*inputs, targets)
    total, losses = fused_linear_cross_entropy(*inputs, targets)  # none requires a gradient
    assert not total.requires_grad
    with torch.no_grad():
        again, _ = fused_linear_cross_entropy(inputs[0].requires_grad_(), inputs[1], targets)
    assert not again.requires_grad
    assert total == expected_total == again
    assert all(map(torch.equal, losses, expected_losses))


def test_fused_linear_cross_entropy_computes_no_gradient_when_none_is_needed(force, device, monkeypatch):
    force("torch")
    written = []

    def spy(logits_MI, targets_M, weights_M, write):
        written.append(write)
        return losses_in_place_torch(logits_MI, targets_M, weights_M, write)

    monkeypatch.setattr(module, "losses_in_place_torch", spy)
    hidden_ND, embedding_VD = random_inputs(device)
    hidden_ND.requires_grad_()
    with torch.no_grad():
        fused_linear_cross_entropy(hidden_ND, embedding_VD, random_targets(device))
    assert written == [False, False]
    fused_linear_cross_entropy(hidden_ND, embedding_VD, random_targets(device))
    assert written == [False, False, True, True]


@forms
def test_fused_linear_cross_entropy_scales_both_gradients_by_that_of_the_total(force, device, form):
    force(form)
    inputs, targets = random_inputs(device), random_targets(device)
    once, thrice = (learnt(*inputs, targets, scale)[2] for scale in (1.0, 3.0))
    for single, triple in zip(once, thrice, strict=True):
        torch.testing.assert_close(triple, 3 * single, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("scale", [1, 2])
def test_fused_linear_cross_entropy_raises_at_a_second_backward(force, device, scale):
    """Gradients are scaled in place; scaling them again would be silently wrong."""
    force("torch")
    hidden_ND, embedding_VD = random_inputs(device)
    total, _ = fused_linear_cross_entropy(hidden_ND.requires_grad_(), embedding_VD, random_targets(device))
    (scale * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    total, _ = fused_linear_cross_entropy(hidden_ND, embedding_VD, random_targets(device))
    (gradient,) = torch.autograd.grad(total**2, hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@forms
def test_fused_linear_cross_entropy_accepts_empty_kinds_and_repeated_positions(force, device, form):
    force(form)
    inputs, targets = random_inputs(device), random_targets(device)
    none = LossTargets(range(3), *(x[:0] for x in (targets[0].positions_M, targets[0].targets_M, targets[0].weights_M)))
    total, losses, gradients = learnt(*inputs, [none, targets[0], targets[0]])
    assert losses[0].shape == (0,)
    expected_total, _, expected_gradients = expected_by_loops(*inputs, [targets[0]])
    torch.testing.assert_close(total.double(), 2 * expected_total, atol=1e-5, rtol=1e-6)
    for got, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), 2 * expected, atol=2e-5, rtol=0)
    total, _, gradients = learnt(*inputs, [none])
    assert total == 0
    assert not any(gradient.any() for gradient in gradients)


@forms
def test_fused_linear_cross_entropy_does_not_overflow_when_logits_are_a_million(force, device, form):
    force(form)
    hidden_ND = torch.tensor([[1024.0], [-1024.0]], device=device)
    embedding_VD = torch.tensor([[1024.0], [1024.0], [1023.0], [-1024.0]], device=device)
    both = torch.tensor([0, 1], device=device)
    targets = [LossTargets(range(4), both, torch.tensor([0, 2], device=device), torch.ones(2, device=device))]
    _, losses, gradients = learnt(hidden_ND, embedding_VD, targets)
    torch.testing.assert_close(losses[0].tolist(), [0.6931472, 2.0**21 - 1024], atol=1e-6, rtol=1e-7)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_fused_linear_cross_entropy_can_run_twice(force, device):
    force("torch")
    inputs, targets = random_inputs(device), random_targets(device)
    first, second = learnt(*inputs, targets), learnt(*inputs, targets)
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[2], second[2]))


@pytest.mark.slow
def test_fused_linear_cross_entropy_works_with_compile_and_checkpointing(force, device):
    from torch.utils.checkpoint import checkpoint

    force("triton")
    inputs, targets = random_inputs(device, num_places=7), random_targets(device, 7)
    _, _, expected = learnt(*inputs, targets)

    def total(hidden_ND, embedding_VD):
        return fused_linear_cross_entropy(hidden_ND * 1.0, embedding_VD, targets)[0]

    compiled = torch.compile(total, backend="aot_eager")
    for way in (compiled, lambda *leaves: checkpoint(total, *leaves, use_reentrant=False)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        for got, wanted in zip(torch.autograd.grad(way(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest result of an operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("form", FORMS)
def test_fused_linear_cross_entropy_never_stores_all_logits(force, device, monkeypatch, form):
    """The gradient of the embedding is the largest tensor, although all logits would be eight times as large."""
    force(form)
    monkeypatch.setattr(module, "CHUNK_BYTES", {device.type: 2**16})
    inputs = random_inputs(device, num_places=65, width=8, num_rows=4000)
    targets = random_targets(device, num_places=65, ids=(range(500), range(1000, 4000)))
    with Largest() as largest:
        learnt(*inputs, targets)
    if form == "reference":
        assert largest.elements == 65 * 4000
    else:
        assert largest.elements == 8 * 4000


# --- the operation in place ---------------------------------------------------------------------------------------


def random_logits(device, dtype, rows, cols, spacing=3):
    """Return logits whose rows are padded."""
    generator = torch.Generator().manual_seed(cols)
    logits_MI = (torch.randn(rows, cols + spacing, generator=generator) * 4).to(device, dtype)[:, :cols]
    targets_M = torch.randint(cols, (rows,), generator=generator).to(device)
    return logits_MI, targets_M, torch.randn(rows, generator=generator).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (7, 7), (65, 65), (7, 257), (3, 4096), (2, 4099), (3, 8192), (2, 9000)]
)
def test_losses_in_place_is_as_exact_as_pytorch(device, dtype, rows, cols):
    """The columns are within one block, exactly one block, and more than one block."""
    pytest.importorskip("triton")
    from cogview.kernels.fused_linear_cross_entropy_triton import losses_in_place

    logits_MI, targets_M, weights_M = random_logits(device, dtype, rows, cols)
    true_MI = logits_MI.double().requires_grad_()
    true_losses = F.cross_entropy(true_MI, targets_M, reduction="none")
    (true_gradient,) = torch.autograd.grad((true_losses * weights_M).sum(), true_MI)
    errors = []
    for way in (losses_in_place_torch, losses_in_place):
        untouched = logits_MI.as_strided((rows, cols + 3), logits_MI.stride()).clone()
        own_MI = untouched[:, :cols]
        losses_M = way(own_MI, targets_M, weights_M, False)
        assert torch.equal(own_MI, logits_MI)
        assert torch.equal(way(own_MI, targets_M, weights_M, True), losses_M)
        assert torch.equal(untouched[:, cols:], logits_MI.as_strided((rows, cols + 3), logits_MI.stride())[:, cols:])
        errors.append([(losses_M - true_losses).abs().max(), (own_MI - true_gradient).abs().max()])
    of_size = [true_losses.abs().max() + 16, weights_M.abs().max()]
    for torch_error, error, size in zip(*errors, of_size, strict=True):
        assert error <= 2 * torch_error + 2.0**-22 * size


def test_losses_in_place_passes_the_checks_of_custom_operators(device):
    pytest.importorskip("triton")
    from cogview.kernels.fused_linear_cross_entropy_triton import _losses_in_place

    torch.library.opcheck(_losses_in_place, (*random_logits(device, torch.float32, 3, 5), True))


def test_losses_in_place_accepts_an_empty_chunk(device):
    pytest.importorskip("triton")
    from cogview.kernels.fused_linear_cross_entropy_triton import losses_in_place

    assert losses_in_place(*random_logits(device, torch.float32, 0, 5), True).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_MI": torch.zeros(2, 3, dtype=torch.float64)}, "logits_MI must be float32, float16 or bfloat16, got"),
        (
            {"logits_MI": torch.zeros(3, 2).T},
            r"one column or more, one beside the other, got \(2, 3\) with strides \(1",
        ),
        ({"targets_M": torch.tensor([0, 3])}, r"targets_M must be from 0 to 2, got \[0, 3\]"),
        ({"weights_M": torch.ones(3)}, r"weights_M must be float32 \(2,\) on cpu, got torch.float32 \(3,\) on cpu"),
    ],
)
def test_losses_in_place_raises_value_error_when_inputs_are_unsupported(changes, message):
    pytest.importorskip("triton")
    from cogview.kernels import triton_utils as launch
    from cogview.kernels.fused_linear_cross_entropy_triton import losses_in_place

    if not launch.INTERPRETED:
        pytest.skip("on a GPU numbers are not looked at")
    good = {"logits_MI": torch.zeros(2, 3), "targets_M": torch.tensor([0, 2]), "weights_M": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        losses_in_place(**{**good, **changes}, write=True)


# --- errors -------------------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ids": range(20, 61)},
            r"targets\[1\].ids must be a range of 1 to 60 rows of the embedding, got range\(20, 61",
        ),
        ({"ids": range(20, 59, 3)}, r"targets\[1\].ids must be a range of 1 to 60 rows.*got range\(20, 59, 3\)"),
        ({"targets_M": torch.tensor([20, 59])}, r"targets\[1\].targets_M must be from 20 to 58, got 59"),
        ({"targets_M": torch.tensor([19, 20])}, r"targets\[1\].targets_M must be from 20 to 58, got 19"),
        ({"positions_M": torch.tensor([65, 0])}, r"targets\[1\].positions_M must be from 0 to 64, got 65"),
        ({"positions_M": torch.tensor([0, -1])}, r"targets\[1\].positions_M must be from 0 to 64, got -1"),
        (
            {"positions_M": torch.tensor([0, 1], dtype=torch.int32)},
            r"targets\[1\].positions_M must be torch.int64 \(2,\) on cpu, got torch.int32 \(2,\) on cpu",
        ),
        ({"targets_M": torch.tensor([30])}, r"targets\[1\].targets_M must be torch.int64 \(2,\) .*int64 \(1,\) on cpu"),
        ({"weights_M": torch.ones(2).double()}, r"targets\[1\].weights_M must be torch.float32 .* got torch.float64"),
        ({"weights_M": torch.ones(2, device="meta")}, r"targets\[1\].weights_M must be .* on cpu, got .* on meta"),
    ],
)
def test_fused_linear_cross_entropy_raises_value_error_when_targets_do_not_fit(force, form, changes, message):
    if torch.cuda.is_available() and form == "triton":
        pytest.skip("tensors on a CPU")
    force(form)
    cpu = torch.device("cpu")
    good = LossTargets(range(20, 59), torch.tensor([3, 4]), torch.tensor([30, 31]), torch.ones(2))
    wrong = dataclasses.replace(good, **changes)
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(*random_inputs(cpu), [good, wrong])


@pytest.mark.parametrize(
    ("hidden_ND", "embedding_VD", "message"),
    [
        (
            torch.zeros(2, 3, 4),
            torch.zeros(5, 4),
            r"hidden_ND must be a matrix of floats, got torch.float32 \(2, 3, 4\)",
        ),
        (torch.zeros(3, 4), torch.zeros(5, 4).int(), "embedding_VD must be a matrix of floats, got torch.int32"),
        (torch.zeros(3, 4), torch.zeros(5, 6), "embedding_VD must be of width 4 on cpu as hidden_ND is, got 6 on cpu"),
        (
            torch.zeros(3, 4),
            torch.zeros(5, 4).half(),
            "embedding_VD must be torch.float32 as hidden_ND is, got torch.f",
        ),
    ],
)
def test_fused_linear_cross_entropy_raises_value_error_when_matrices_do_not_fit(
    force, hidden_ND, embedding_VD, message
):
    force("torch")
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(hidden_ND, embedding_VD, [])
