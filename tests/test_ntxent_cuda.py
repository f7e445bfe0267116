"""NT-Xent on a GPU, by every kernel that can serve it there. `pytest -m cuda` needs nothing but a built extension and a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from screens import torchrun
from test_ntxent import gradient, oracle, rows
from torch.testing import assert_close

from cellfast.ops import ntxent_cuda_kernel, ntxent_loss, ntxent_loss_reference

pytestmark = pytest.mark.cuda
ROOT = Path(__file__).resolve().parent.parent
HALF = [torch.bfloat16, torch.float16]
# fmt: off
RAGGED = [(2, 64), (4, 1), (34, 17), (126, 64), (128, 64), (130, 65), (254, 128), (258, 128), (512, 192), (770, 200), (1030, 257), (642, 512)]
# fmt: on


@pytest.fixture(params=["portable", "sm90a"])
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "sm90a" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"the sm90a kernels need compute capability 9.0, this GPU has {torch.cuda.get_device_capability()}")
    before = ntxent_cuda_kernel()
    assert ntxent_cuda_kernel(request.param) == request.param
    yield request.param
    ntxent_cuda_kernel(before)


def dtypes_of(kernel: str) -> list[torch.dtype]:
    return HALF if kernel == "sm90a" else [torch.float64, torch.float32, *HALF]


def assert_within_budget(z: torch.Tensor, temperature: float, *, normalize: bool = True) -> None:
    """Our error against float64 is at most plain PyTorch's in the same dtype, and roundings."""

    def ours_of(t):
        return ntxent_loss(t, temperature, normalize=normalize)

    def plain_of(t):
        return ntxent_loss_reference(t, temperature, normalize=normalize)

    truth, truth_grad = gradient(plain_of, z.double())
    ours, grad = gradient(ours_of, z)
    plain, plain_grad = gradient(plain_of, z)
    rounding = torch.finfo(z.dtype).eps
    assert grad.dtype == z.dtype
    assert abs(float(ours) - float(truth)) <= abs(float(plain) - float(truth)) + 4 * rounding * max(1.0, float(truth))
    size = float(truth_grad.abs().max())
    error = float((grad.double() - truth_grad).abs().max())
    assert error <= float((plain_grad.double() - truth_grad).abs().max()) + 16 * rounding * size


@pytest.mark.parametrize(("num_rows", "dim"), RAGGED)
def test_ragged_sizes_equal_the_definition(kernel, num_rows, dim):
    for dtype in dtypes_of(kernel):
        z = rows(num_rows, dim, dtype=dtype, device="cuda")
        if num_rows == 2:
            loss, grad = gradient(ntxent_loss, z, 0.1)
            assert float(loss) == 0.0
            assert not grad.any()
        else:
            assert_within_budget(z, 0.1)


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("hard", [0.0, 0.9, 0.999])
def test_error_is_within_plain_pytorchs(kernel, temperature, hard):
    for dtype in dtypes_of(kernel):
        assert_within_budget(rows(640, 128, dtype=dtype, device="cuda", hard=hard), temperature)


@pytest.mark.parametrize("temperature", [0.001, 0.005])
def test_temperatures_below_the_range_of_one_shift(kernel, temperature):
    """Sums leave float32's range: those rows are found and computed again."""
    for dtype in dtypes_of(kernel):
        z = rows(300, 96, dtype=dtype, device="cuda", hard=0.5)
        truth = ntxent_loss_reference(ntxent_rounded(z), temperature, normalize=False)
        assert_close(float(ntxent_loss(z, temperature)), float(truth), rtol=1e-3, atol=1e-3)


def ntxent_rounded(z: torch.Tensor) -> torch.Tensor:
    """Normalised rows as the operator stores them, in float64."""
    return torch.ops.cellfast.ntxent_normalize(z, True)[0].double()


def test_long_rows_without_normalisation(kernel):
    for dtype in dtypes_of(kernel):
        for size in (0.5, 20.0):
            z = rows(258, 64, dtype=dtype, device="cuda") * size
            truth = ntxent_loss_reference(z.double(), 1.0, normalize=False)
            assert_close(float(ntxent_loss(z, 1.0, normalize=False)), float(truth), rtol=1e-4, atol=1e-4)


def test_opposite_rows(kernel):
    """One row opposite to all others: its exponentials underflow at a small temperature."""
    for dtype in dtypes_of(kernel):
        z = torch.ones(12, 8, dtype=dtype, device="cuda")
        z[0] = -1
        expected = oracle(ntxent_rounded(z).cpu().numpy(), 0.01, normalize=False)
        assert_close(float(ntxent_loss(z, 0.01)), expected, rtol=1e-4, atol=1e-4)
        _, grad = gradient(ntxent_loss, z, 0.01)
        assert torch.isfinite(grad).all()


def test_parallel_rows_give_log_of_the_number_of_others(kernel):
    for dtype in dtypes_of(kernel):
        z = (
            torch.ones(512, 64, device="cuda", dtype=dtype)
            * torch.tensor([1.0, 2.0, 4.0, 8.0], device="cuda", dtype=dtype).repeat(128)[:, None]
        )
        assert_close(float(ntxent_loss(z, 0.1)), math.log(511), rtol=1e-5, atol=0)


def test_duplicates_stay_negatives(kernel):
    for dtype in dtypes_of(kernel):
        z = rows(8, 5, device="cuda", dtype=dtype)
        z[1] = z[0]
        z[5] = z[4] = z[0]
        expected = oracle(ntxent_rounded(z).cpu().numpy(), 0.2, normalize=False)
        assert_close(float(ntxent_loss(z, 0.2)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_give_nan(kernel, bad):
    z = rows(300, 64, device="cuda", dtype=torch.bfloat16)
    z[3, 2] = bad
    loss, grad = gradient(ntxent_loss, z, 0.1)
    assert math.isnan(float(loss))
    assert torch.isnan(grad).any()


def test_a_zero_row_has_no_gradient_and_spoils_nothing(kernel):
    z = rows(300, 64, device="cuda", dtype=torch.bfloat16)
    z[3] = 0
    loss, grad = gradient(ntxent_loss, z, 0.1)
    assert math.isfinite(float(loss))
    assert torch.isfinite(grad).all()
    assert not grad[3].any()


def test_any_strides_and_misaligned_rows(kernel):
    z = rows(260, 72, device="cuda", dtype=torch.bfloat16)
    wide = torch.zeros(260, 144, device="cuda", dtype=torch.bfloat16)
    wide[:, ::2] = z
    expected = ntxent_loss(z, 0.1)
    assert_close(ntxent_loss(wide[:, ::2], 0.1), expected, rtol=0, atol=0)
    odd = torch.empty(260 * 72 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(260, 72)  # 2 bytes past an aligned address
    odd.copy_(z)
    assert_close(ntxent_loss(odd, 0.1), expected, rtol=0, atol=0)
    zhat = torch.ops.cellfast.ntxent_normalize(z, True)[0]
    odd.copy_(zhat)
    tau = torch.tensor(0.1, dtype=torch.float64, device="cuda")
    for a, b in zip(
        torch.ops.cellfast.ntxent_shard_forward(odd, tau, 0, 1), torch.ops.cellfast.ntxent_shard_forward(zhat, tau, 0, 1)
    ):
        assert torch.equal(a, b)


def test_temperature_gets_its_gradient(kernel):
    for dtype in dtypes_of(kernel):
        z = rows(300, 128, dtype=dtype, device="cuda")
        ours = torch.tensor(0.2, dtype=torch.float64, device="cuda", requires_grad=True)
        plain = ours.detach().clone().requires_grad_()
        ntxent_loss(z, ours).backward()
        ntxent_loss_reference(ntxent_rounded(z), plain, normalize=False).backward()
        tolerance = 1e-7 if dtype == torch.float64 else 2e-3
        assert_close(ours.grad, plain.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_repeats_are_bit_identical(kernel, dim):
    z = rows(3000, dim, device="cuda", dtype=torch.bfloat16)
    first = gradient(ntxent_loss, z, 0.1)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            again = gradient(ntxent_loss, z, 0.1)
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_together_equal_the_whole(kernel, shards):
    z = rows(12 * 131, 100, device="cuda", dtype=torch.bfloat16)
    tau = torch.tensor(0.1, dtype=torch.float64, device="cuda")
    zhat, inv_norm = torch.ops.cellfast.ntxent_normalize(z, True)
    row_loss, lse = torch.ops.cellfast.ntxent_shard_forward(zhat, tau, 0, 1)
    one = torch.ones((), dtype=torch.float64, device="cuda")
    whole, whole_tau = torch.ops.cellfast.ntxent_shard_backward(one, zhat, inv_norm, lse, tau, True, 0, 1, torch.float32)
    grad_tau = 0.0
    for shard in range(shards):
        mine = torch.arange(len(z), device="cuda").view(2, shards, -1)[:, shard].reshape(-1)
        part_loss, part_lse = torch.ops.cellfast.ntxent_shard_forward(zhat, tau, shard, shards)
        assert_close(part_loss, row_loss[mine], rtol=1e-5, atol=1e-5)
        assert_close(part_lse, lse[mine], rtol=1e-5, atol=1e-5)
        part, part_tau = torch.ops.cellfast.ntxent_shard_backward(
            one, zhat, inv_norm[mine], lse, tau, True, shard, shards, torch.float32
        )
        assert_close(part, whole[mine], rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
        grad_tau += float(part_tau)
    assert_close(grad_tau, float(whole_tau), rtol=1e-3, atol=1e-6)


def test_runs_on_the_current_stream(kernel):
    """The input is made late on a side stream; work on another stream would read it before it is there."""
    z = rows(4096, 128, device="cuda", dtype=torch.bfloat16)
    expected = gradient(ntxent_loss, z, 0.1)
    torch.cuda.synchronize()
    late = torch.zeros_like(z)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(z)
        found = gradient(ntxent_loss, late, 0.1)
    side.synchronize()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_captured_in_a_cuda_graph(kernel):
    static = rows(1024, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            static.grad = None
            ntxent_loss(static, 0.1).backward()
    torch.cuda.current_stream().wait_stream(side)
    static.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ntxent_loss(static, 0.1)
        loss.backward()
    for seed in (1, 2):
        z = rows(1024, 128, seed=seed, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            static.copy_(z)
        graph.replay()
        torch.cuda.synchronize()
        expected = gradient(ntxent_loss, z, 0.1)
        assert torch.equal(loss.detach(), expected[0])
        assert torch.equal(static.grad, expected[1])


def test_no_host_synchronisation(kernel):
    z = rows(2048, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    tau = torch.tensor(0.1, dtype=torch.float64, device="cuda", requires_grad=True)
    ntxent_loss(z, tau).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ntxent_loss(z, tau).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_rows", [16384, 65536])
def test_memory_does_not_grow_with_the_square_of_the_rows(kernel, num_rows):
    if kernel == "portable" and num_rows > 16384:
        pytest.skip("the memory is allocated before the kernels, which take long here")
    dim = 128
    z = torch.randn(num_rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ntxent_loss(z, 0.1).backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    # zhat, gradient in two dtypes, partial sums per multiprocessor, and scalars of a row: about 2 KB a row at D = 128.
    assert extra <= num_rows * (16 * dim + 8 * torch.cuda.get_device_properties(0).multi_processor_count + 256) + (1 << 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_cpu(dtype):
    z = rows(514, 130, dtype=dtype)
    on_cpu, on_gpu = gradient(ntxent_loss, z, 0.1), gradient(ntxent_loss, z.cuda(), 0.1)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert_close(on_gpu[0].cpu(), on_cpu[0], rtol=tolerance, atol=tolerance)
    assert_close(on_gpu[1].cpu(), on_cpu[1], rtol=tolerance, atol=tolerance * float(on_cpu[1].abs().max()))


def test_kernels_agree_at_many_rows():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    before = ntxent_cuda_kernel()
    z = rows(8192, 128, device="cuda", dtype=torch.bfloat16, hard=0.5)
    try:
        ntxent_cuda_kernel("portable")
        plain = gradient(ntxent_loss, z.float(), 0.1)
        ntxent_cuda_kernel("sm90a")
        fast = gradient(ntxent_loss, z, 0.1)
    finally:
        ntxent_cuda_kernel(before)
    assert_close(fast[0], plain[0], rtol=1e-3, atol=1e-3)
    assert_close(fast[1].float(), plain[1], rtol=0, atol=2e-2 * float(plain[1].abs().max()))


@pytest.mark.slow
def test_a_million_rows():
    """Offsets beyond 2^31 values and M*M beyond 2^39: the mean of a sample of rows, computed apart, and a finite gradient."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("takes minutes with the portable kernels")
    before = ntxent_cuda_kernel()
    num_rows, dim = 1 << 20, 128
    z = torch.randn(num_rows, dim, device="cuda", dtype=torch.bfloat16)
    try:
        ntxent_cuda_kernel("sm90a")
        tau = torch.tensor(0.1, dtype=torch.float64, device="cuda")
        zhat, inv_norm = torch.ops.cellfast.ntxent_normalize(z, True)
        lse = torch.ops.cellfast.ntxent_shard_forward(zhat, tau, 0, 1)[1]
        chosen = torch.tensor([0, 1, 127, 128, num_rows // 2 - 1, num_rows // 2, num_rows - 1], device="cuda")
        logits = zhat[chosen].float() @ zhat.float().T / 0.1
        logits[torch.arange(len(chosen)), chosen] = -torch.inf
        assert_close(lse[chosen].float(), torch.logsumexp(logits, dim=1), rtol=0, atol=1e-3)
        one = torch.ones((), dtype=torch.float64, device="cuda")
        grad, _ = torch.ops.cellfast.ntxent_shard_backward(one, zhat, inv_norm, lse, tau, False, 0, 1, torch.float32)
        weights = torch.exp(logits.double() - lse[chosen, None]) + torch.exp(logits.double() - lse[None])
        weights[torch.arange(len(chosen)), (chosen + num_rows // 2) % num_rows] -= 2
        expected = weights @ zhat.double() / (num_rows * 0.1)
        assert_close(grad[chosen].double(), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
        assert torch.isfinite(grad).all()
    finally:
        ntxent_cuda_kernel(before)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: rows(8, 4, device="cuda"), "float32|Float"),
        (lambda: rows(8, 4, device="cuda", dtype=torch.float64), "float64|Double"),
        (lambda: rows(8, 520, device="cuda", dtype=torch.bfloat16), "D = 520"),
    ],
)
def test_sm90a_says_what_it_cannot_serve(make, says):
    before = ntxent_cuda_kernel()
    try:
        ntxent_cuda_kernel("sm90a")
        with pytest.raises(RuntimeError, match=rf"sm90a was asked for and cannot serve z: .*({says}|compute capability)"):
            ntxent_loss(make(), 0.1)
    finally:
        ntxent_cuda_kernel(before)


def test_arguments_on_another_device_are_told():
    zhat = torch.ops.cellfast.ntxent_normalize(rows(8, 4, device="cuda"), True)[0]
    with pytest.raises(RuntimeError, match="temperature must be on the device of the rows"):
        torch.ops.cellfast.ntxent_shard_forward(zhat, torch.tensor(0.1, dtype=torch.float64), 0, 1)


def test_environment_chooses_the_kernel():
    code = "import cellfast.ops as o; print(o.ntxent_cuda_kernel())"
    environment = {**os.environ, "CELLFAST_NTXENT_CUDA": "portable", "PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.strip()
        == "portable"
    )


_RANK = """
import os, torch, torch.distributed as dist
from cellfast.losses import NTXentLoss
from cellfast.ops import ntxent_loss
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
torch.manual_seed(0)
n = 96
views = torch.randn(2, world * n, 64, device="cuda")
mine = views[:, rank * n : (rank + 1) * n].reshape(2 * n, 64).clone().requires_grad_()
loss = NTXentLoss(0.1)(mine)
loss.backward()
whole = views.reshape(-1, 64).clone().requires_grad_()
expected = ntxent_loss(whole, 0.1)
expected.backward()
wanted = whole.grad.view(2, world * n, 64)[:, rank * n : (rank + 1) * n].reshape(2 * n, 64)
torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(mine.grad / world, wanted, rtol=1e-4, atol=1e-7)
dist.destroy_process_group()
"""


def test_ranks_over_nccl_equal_one_process(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    done = torchrun(script)
    assert done.returncode == 0, done.stderr[-3000:]
