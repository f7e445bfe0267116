"""The NT-Xent operator against a double loop in float64, plain PyTorch, and the traps of the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cellfast.ops import ntxent_loss, ntxent_loss_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
CUDA = [pytest.param("cuda", marks=pytest.mark.cuda)]


def oracle(z: np.ndarray, temperature: float, *, normalize: bool = True) -> float:
    """The loss by its definition, row by row, in float64."""
    z = z.astype(np.float64)
    if normalize:
        z = z / np.sqrt((z * z).sum(axis=1, keepdims=True))
    rows = len(z)
    total = 0.0
    for i in range(rows):
        logits = [float(z[i] @ z[j]) / temperature for j in range(rows) if j != i]
        top = max(logits)
        lse = top + math.log(sum(math.exp(s - top) for s in logits))
        total += lse - float(z[i] @ z[(i + rows // 2) % rows]) / temperature
    return total / rows


def rows(num_rows: int, dim: int, *, seed: int = 0, dtype=torch.float32, device: str = "cpu", hard: float = 0.0) -> torch.Tensor:
    """Random projections; ``hard`` mixes that much of the positive into each row."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    half = num_rows // 2
    z[half:] = hard * z[:half] + (1 - hard) * z[half:]
    return z.to(dtype).to(device)


def gradient(function, z: torch.Tensor, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = z.detach().clone().requires_grad_()
    loss = function(leaf, *arguments)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("num_rows", "dim"), [(2, 3), (4, 1), (6, 8), (34, 17), (130, 64), (66, 129)])
def test_equals_the_double_loop(device, num_rows, dim, temperature):
    z = rows(num_rows, dim, dtype=torch.float64, device=device)
    assert_close(float(ntxent_loss(z, temperature)), oracle(z.cpu().numpy(), temperature), rtol=1e-10, atol=1e-12)
    z32 = z.float()
    assert_close(float(ntxent_loss(z32, temperature)), oracle(z32.cpu().numpy(), temperature), rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("hard", [0.0, 0.9, 0.999])
@pytest.mark.parametrize(("num_rows", "dim"), [(4, 2), (34, 17), (258, 128)])
def test_gradient_equals_autograd_of_the_definition(device, num_rows, dim, hard, normalize):
    z = rows(num_rows, dim, dtype=torch.float64, device=device, hard=hard)
    loss, grad = gradient(lambda t: ntxent_loss(t, 0.1, normalize=normalize), z)
    expected, expected_grad = gradient(lambda t: ntxent_loss_reference(t, 0.1, normalize=normalize), z)
    assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    assert_close(grad, expected_grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("hard", [0.0, 0.95])
def test_error_is_within_plain_pytorchs(device, dtype, temperature, hard):
    z = rows(256, 96, dtype=dtype, device=device, hard=hard)
    truth, truth_grad = gradient(ntxent_loss_reference, z.double(), temperature)
    ours, grad = gradient(ntxent_loss, z, temperature)
    plain, plain_grad = gradient(ntxent_loss_reference, z, temperature)
    # A dot product of D terms is off by about sqrt(D) roundings whatever its order: 16 is that and a little.
    rounding = torch.finfo(dtype).eps
    assert abs(float(ours) - float(truth)) <= abs(float(plain) - float(truth)) + 4 * rounding * max(1.0, float(truth))
    size = float(truth_grad.abs().max())
    error = float((grad.double() - truth_grad).abs().max())
    assert error <= float((plain_grad.double() - truth_grad).abs().max()) + 16 * rounding * size
    assert grad.dtype == dtype


@pytest.mark.parametrize("device", DEVICES)
def test_parallel_rows_give_log_of_the_number_of_others(device):
    z = torch.ones(64, 16, device=device) * torch.arange(1, 65, device=device)[:, None]
    assert_close(float(ntxent_loss(z, 0.1)), math.log(63), rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_duplicates_stay_negatives(device):
    """The mask is by index: two copies of one cell are each other's negatives."""
    z = rows(8, 5, device=device)
    z[1] = z[0]
    z[5] = z[4] = z[0]
    assert_close(float(ntxent_loss(z, 0.2)), oracle(z.cpu().numpy(), 0.2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_one_cell_has_loss_and_gradient_zero(device):
    loss, grad = gradient(ntxent_loss, rows(2, 7, device=device), 0.1)
    assert float(loss) == 0.0
    assert not grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_give_nan(device, bad):
    z = rows(8, 4, device=device)
    z[3, 2] = bad
    assert math.isnan(float(ntxent_loss(z, 0.1)))


@pytest.mark.parametrize("device", DEVICES)
def test_a_zero_row_has_no_gradient_and_spoils_nothing(device):
    z = rows(8, 4, device=device)
    z[3] = 0
    loss, grad = gradient(ntxent_loss, z, 0.1)
    assert math.isfinite(float(loss))
    assert torch.isfinite(grad).all()
    assert not grad[3].any()


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device):
    z = rows(40, 24, device=device)
    wide = torch.zeros(40, 48, device=device)
    wide[:, ::2] = z
    assert_close(ntxent_loss(wide[:, ::2], 0.1), ntxent_loss(z, 0.1), rtol=0, atol=0)
    assert_close(ntxent_loss(z.T.contiguous().T, 0.1), ntxent_loss(z, 0.1), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_temperature_gets_its_gradient(device):
    z = rows(32, 16, dtype=torch.float64, device=device)
    ours = torch.tensor(0.2, dtype=torch.float64, device=device, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    ntxent_loss(z, ours).backward()
    ntxent_loss_reference(z, plain).backward()
    assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_are_bit_identical(device):
    z = rows(300, 128, device=device)
    first = gradient(ntxent_loss, z, 0.1)
    for _ in range(3):
        again = gradient(ntxent_loss, z, 0.1)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_gradcheck():
    z = rows(10, 6, dtype=torch.float64).requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ntxent_loss, (z, temperature))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("normalize", [True, False])
def test_opcheck(normalize):
    z = rows(12, 5).requires_grad_()
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.cellfast.ntxent_forward.default, (z, tau, normalize))
    _, zhat, inv_norm, lse = torch.ops.cellfast.ntxent_forward(z.detach(), tau.detach(), normalize)
    arguments = (torch.ones(()), zhat, inv_norm, lse, tau.detach(), normalize, torch.float32)
    torch.library.opcheck(torch.ops.cellfast.ntxent_backward.default, arguments)


def test_second_derivatives_are_refused():
    z = rows(8, 4).requires_grad_()
    (first,) = torch.autograd.grad(ntxent_loss(z, 0.1), z, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        first.sum().backward()


def test_second_derivatives_are_refused_inside_a_sum():
    """Not dropped in silence where the sum has another part that depends on z."""
    z = rows(8, 4).requires_grad_()
    (first,) = torch.autograd.grad(ntxent_loss(z, 0.1), z, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        (first.square().sum() + z.square().sum()).backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning", "ignore:.*torch.jit.script.*:DeprecationWarning")
def test_torchscript():
    scripted = torch.jit.script(_scripted)
    z = rows(16, 8)
    assert torch.equal(scripted(z), ntxent_loss(z, 0.2))


def _scripted(z: torch.Tensor) -> torch.Tensor:
    return ntxent_loss(z, 0.2)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return ntxent_loss(z, 0.1)

    z = rows(16, 8)
    program = torch.export.export(Module(), (z,))
    assert torch.equal(program.module()(z), ntxent_loss(z, 0.1))


def test_compile_has_no_graph_breaks():
    compiled = torch.compile(lambda t: ntxent_loss(t * 2.0, 0.1), fullgraph=True, backend="aot_eager")
    z = rows(16, 8)
    ours, grad = gradient(compiled, z)
    expected, expected_grad = gradient(lambda t: ntxent_loss(t * 2.0, 0.1), z)
    assert_close(ours, expected)
    assert_close(grad, expected_grad)


def test_under_autocast_the_loss_is_float32():
    z = rows(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ntxent_loss((z @ torch.eye(8)), 0.1)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("z", "says"),
    [
        (torch.zeros(7, 128), r"z must have shape \[2N, D\] with an even row count, got \[7, 128\]"),
        (torch.zeros(0, 4), r"got \[0, 4\]"),
        (torch.zeros(8), r"got \[8\]"),
        (torch.zeros(4, 0), r"got \[4, 0\]"),
        (torch.zeros(4, 3, dtype=torch.int64), "must be float64, float32"),
    ],
)
def test_wrong_shapes_and_types_are_told(z, says):
    with pytest.raises(ValueError, match=says):
        ntxent_loss(z, 0.1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_wrong_temperatures_are_told(temperature):
    with pytest.raises(ValueError, match="temperature must be a positive finite number"):
        ntxent_loss(rows(4, 3), temperature)


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cuda_equals_cpu(device, dtype):
    z = rows(514, 130, dtype=dtype)
    on_cpu, on_gpu = gradient(ntxent_loss, z, 0.1), gradient(ntxent_loss, z.to(device), 0.1)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert_close(on_gpu[0].cpu(), on_cpu[0], rtol=tolerance, atol=tolerance)
    assert_close(on_gpu[1].cpu(), on_cpu[1], rtol=tolerance, atol=tolerance * float(on_cpu[1].abs().max()))
