"""The CPU operator with each instruction set's kernels, across block edges, temperatures, shards and thread counts."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.testing import assert_close

from cellfast.ops import ntxent_loss, ntxent_loss_reference

choose = torch.ops.cellfast.ntxent_cpu_kernels
# Asked from the library: a test of every set it has, on any processor, runs the sets that processor runs and skips the others by name.
KERNELS, SUPPORTED = (choose(which).split(",") for which in ("all", "supported"))


def chosen(name: str):
    """The kernels of that name while a test runs; skips where this processor does not run them."""
    if name not in SUPPORTED:
        pytest.skip(f"needs a processor with {name}")
    assert choose(name) == name
    yield name
    choose("auto")


@pytest.fixture(params=KERNELS)
def kernels(request):
    yield from chosen(request.param)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rows(num_rows: int, dim: int, *, dtype=torch.float64, hard: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    z = scale * torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(num_rows + dim), dtype=torch.float64)
    half = num_rows // 2
    z[half:] = hard * z[:half] + (1 - hard) * z[half:]
    return z.to(dtype)


def with_gradient(function, z: torch.Tensor, *arguments, **options) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = z.detach().clone().requires_grad_()
    loss = function(leaf, *arguments, **options)
    loss.backward()
    return loss.detach(), leaf.grad


def assert_within_budget(z: torch.Tensor, temperature: float, *, normalize: bool = True) -> None:
    """Loss and gradient as far from float64's truth as plain PyTorch in the same dtype, and a few roundings."""
    truth, true_grad = with_gradient(ntxent_loss_reference, z.double(), temperature, normalize=normalize)
    plain, plain_grad = with_gradient(ntxent_loss_reference, z, temperature, normalize=normalize)
    ours, grad = with_gradient(ntxent_loss, z, temperature, normalize=normalize)
    eps = torch.finfo(z.dtype).eps
    largest = float((z.double().square().sum(1).max() if normalize is False else 1) / temperature)
    assert abs(float(ours) - float(truth)) <= abs(float(plain) - float(truth)) + 4 * eps * max(1.0, float(truth), largest)
    size = float(true_grad.abs().max())
    error = float((grad.double() - true_grad).abs().max())
    # A logit of size s is off by s roundings, and the gradient by that fraction of itself.
    assert error <= float((plain_grad.double() - true_grad).abs().max()) + (16 + 4 * largest) * eps * size + 1e-30


# Rows per register tile, panel and block (48, 96, 192) and one off; columns of no, one and several vectors and a rest.
@pytest.mark.parametrize("num_rows", [2, 14, 46, 48, 50, 98, 194, 1026])
@pytest.mark.parametrize("dim", [16, 33])
def test_any_number_of_rows(kernels, num_rows, dim):
    z = rows(num_rows, dim)
    assert_close(with_gradient(ntxent_loss, z, 0.2), with_gradient(ntxent_loss_reference, z, 0.2), rtol=1e-9, atol=1e-13)
    assert_within_budget(z.float(), 0.2)


@pytest.mark.parametrize("dim", [1, 7, 32, 65, 129, 300])
def test_any_number_of_columns(kernels, dim):
    z = rows(110, dim)
    assert_close(with_gradient(ntxent_loss, z, 0.2), with_gradient(ntxent_loss_reference, z, 0.2), rtol=1e-9, atol=1e-13)
    if dim > 1:  # one column has two directions and no gradient: its error has nothing to be compared with
        assert_within_budget(z.float(), 0.2)


@pytest.mark.parametrize("hard", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.01, 0.0134, 0.05, 0.5, 1.0, 100.0])
def test_any_temperature_and_hard_positives(kernels, temperature, hard):
    z = rows(98, 24, hard=hard)
    ours, grad = with_gradient(ntxent_loss, z, temperature)
    expected, expected_grad = with_gradient(ntxent_loss_reference, z, temperature)
    assert float(ours) >= 0
    assert_close(ours, expected, rtol=1e-8, atol=1e-12)
    assert_close(grad, expected_grad, rtol=1e-7, atol=1e-9 * float(expected_grad.abs().max()) + 1e-14)
    assert_within_budget(z.float(), temperature)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 3.0, 30.0])
def test_rows_as_they_are(kernels, scale):
    """Without normalisation logits have no bound: up to 10^4 in tiles, beyond that and far below the largest row by row."""
    z = rows(60, 12, scale=scale)
    z[::3] *= 0.01
    assert_within_budget(z.float(), 0.1, normalize=False)
    ours, grad = with_gradient(ntxent_loss, z, 0.1, normalize=False)
    expected, expected_grad = with_gradient(ntxent_loss_reference, z, 0.1, normalize=False)
    assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert_close(grad, expected_grad, rtol=1e-6, atol=1e-9 * float(expected_grad.abs().max()))


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_shards_make_the_whole(kernels, num_shards):
    z = rows(4 * 5 * 3 * 3, 20)
    tau = torch.tensor(0.1, dtype=torch.float64)
    loss, zhat, inv_norm, lse = torch.ops.cellfast.ntxent_forward(z, tau, True)
    whole, _ = torch.ops.cellfast.ntxent_backward(torch.ones(()), zhat, inv_norm, lse, tau, True, z.dtype)
    half, per_view = len(z) // 2, len(z) // (2 * num_shards)
    total = 0.0
    for shard in range(num_shards):
        mine = torch.cat([torch.arange(per_view) + shard * per_view, torch.arange(per_view) + half + shard * per_view])
        row_loss, row_lse = torch.ops.cellfast.ntxent_shard_forward(zhat, tau, shard, num_shards)
        assert_close(row_lse, lse[mine], rtol=1e-12, atol=1e-12)
        total += float(row_loss.sum())
        grad, _ = torch.ops.cellfast.ntxent_shard_backward(
            torch.ones(()), zhat, inv_norm[mine], lse, tau, True, shard, num_shards, z.dtype
        )
        assert_close(grad, whole[mine], rtol=1e-9, atol=1e-13)
    assert_close(total / len(z), float(loss), rtol=1e-12, atol=0)


def test_the_result_does_not_depend_on_the_number_of_threads(kernels, threads):
    z = rows(1100, 40, dtype=torch.float32)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(with_gradient(ntxent_loss, z, 0.1))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


def test_kernels_agree_with_each_other():
    z = rows(770, 50, dtype=torch.float32)
    found = {}
    try:
        for name in SUPPORTED:
            assert choose(name) == name
            found[name] = with_gradient(ntxent_loss, z, 0.1)
    finally:
        best = choose("auto")
    assert "portable" in found
    assert best in found
    for loss, grad in found.values():
        assert_close(loss, found["portable"][0], rtol=1e-6, atol=0)
        assert_close(grad, found["portable"][1], rtol=1e-4, atol=1e-6 * float(grad.abs().max()))


def test_the_library_names_its_kernels_and_those_of_this_processor():
    assert set(SUPPORTED) <= set(KERNELS)
    assert {"portable", "emulated_bf16", choose("auto")} <= set(SUPPORTED)
    for name in set(KERNELS) - set(SUPPORTED):
        with pytest.raises(RuntimeError, match=f"as far as this processor has them, got {name}"):
            choose(name)


def test_unknown_kernels_are_told():
    before = choose("")
    with pytest.raises(RuntimeError, match=r"instruction_set must be auto, .* portable or emulated_bf16.*got neon"):
        choose("neon")
    assert choose("") == before


@pytest.fixture(params=[name for name in KERNELS if name.endswith("bf16")])
def pair_kernels(request):
    """Kernels that multiply bfloat16; the emulated ones differ in that one instruction only."""
    yield from chosen(request.param)


@pytest.mark.parametrize("num_rows", [2, 14, 46, 48, 50, 98, 194, 1026])
@pytest.mark.parametrize("dim", [1, 16, 33, 128])
def test_bfloat16_rows_multiplied_as_such(pair_kernels, num_rows, dim):
    z = rows(num_rows, dim, dtype=torch.bfloat16)
    truth, true_grad = with_gradient(ntxent_loss_reference, z.double(), 0.2)
    plain, plain_grad = with_gradient(ntxent_loss_reference, z, 0.2)
    ours, grad = with_gradient(ntxent_loss, z, 0.2)
    assert grad.dtype == torch.bfloat16
    assert abs(float(ours) - float(truth)) <= abs(float(plain) - float(truth)) + 2e-3 * max(1.0, float(truth))
    size = float(true_grad.abs().max())
    if dim > 1:
        error = float((grad.double() - true_grad).abs().max())
        assert error <= float((plain_grad.double() - true_grad).abs().max()) + 2**-8 * size


@pytest.mark.parametrize("hard", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_bfloat16_hard_positives_keep_their_gradient(pair_kernels, temperature, hard):
    """Positive pairs are not rounded: at P near 1 their gradient would be lost."""
    z = rows(256, 64, dtype=torch.bfloat16, hard=hard)
    truth, true_grad = with_gradient(ntxent_loss_reference, z.double(), temperature)
    plain, plain_grad = with_gradient(ntxent_loss_reference, z, temperature)
    ours, grad = with_gradient(ntxent_loss, z, temperature)
    assert float(ours) >= 0
    assert abs(float(ours) - float(truth)) <= 0.1 * abs(float(plain) - float(truth)) + 1e-2 * float(truth) + 1e-7
    error = float((grad.double() - true_grad).abs().max())
    assert error <= float((plain_grad.double() - true_grad).abs().max()) + 2**-7 * float(true_grad.abs().max())


PEAK = """
    import torch
    from pathlib import Path
    from cellfast.ops import ntxent_loss

    def status(field):
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

    ntxent_loss(torch.randn(256, 8, requires_grad=True)).backward()
    z = torch.randn({num_rows}, {dim}, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    ntxent_loss(z, 0.1).backward()
    print(status("VmHWM") - before)
"""


def peak_extra_bytes(num_rows: int, dim: int) -> int:
    code = textwrap.dedent(PEAK.format(num_rows=num_rows, dim=dim))
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        if "clear_refs" in error.stderr:
            pytest.skip("needs a system that lets a process start its memory peak anew (/proc/self/clear_refs)")
        raise
    return int(done.stdout)


def test_memory_grows_with_rows_not_with_their_square():
    assert peak_extra_bytes(16384, 16) < 40e6  # the similarities alone would be 1,074 MB


@pytest.mark.slow
def test_memory_of_65536_rows():
    assert peak_extra_bytes(65536, 128) < 200e6
