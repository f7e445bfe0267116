"""Convolution of small maps as products: torch's own convolution, to rounding, for any geometry; and where it is not used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cellfast.models import ModelConfig, build_model
from cellfast.ops.small_maps import FEWEST_CELLS, SmallMapConv2d, conv2d_small_maps, use_small_maps


def operands(shape, weight, dtype=torch.float64, memory_format=torch.channels_last):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g, dtype=dtype).to(memory_format=memory_format).requires_grad_() for s in (shape, weight))
    return x, w


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "taps", "stride", "padding"),
    [((3, 3), (3, 3), (1, 1), (1, 1)), ((6, 6), (3, 3), (2, 2), (1, 1)), ((2, 2), (3, 3), (1, 1), (1, 1)), ((1, 1), (3, 3), (1, 1), (1, 1)),
     ((4, 3), (3, 2), (1, 2), (0, 1)), ((5, 4), (2, 4), (3, 1), (1, 0)), ((3, 3), (7, 7), (2, 2), (3, 3)), ((2, 3), (1, 1), (1, 1), (1, 2))],
)  # fmt: skip
def test_equals_the_general_convolution(size, taps, stride, padding, memory_format):
    x, w = operands((5, 7, *size), (4, 7, *taps), memory_format=memory_format)
    bias = torch.arange(4.0, dtype=torch.float64, requires_grad=True)
    got = conv2d_small_maps(x, w, bias, stride=stride, padding=padding)
    expected = F.conv2d(x, w, bias, stride, padding)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    weights = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = (x, w, bias)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, weights), torch.autograd.grad(expected, leaves, weights)):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)


def test_only_the_gradients_that_are_asked_for():
    x, w = operands((4, 3, 3, 3), (2, 3, 3, 3))
    conv2d_small_maps(x.detach(), w, padding=(1, 1)).sum().backward()
    assert x.grad is None
    assert w.grad is not None
    (of_x,) = torch.autograd.grad(conv2d_small_maps(x, w.detach(), padding=(1, 1)).sum(), x)
    torch.testing.assert_close(of_x, torch.autograd.grad(F.conv2d(x, w, padding=1).sum(), x)[0])
    (first,) = torch.autograd.grad((conv2d_small_maps(x, w, padding=(1, 1)) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_shapes_that_do_not_fit_are_refused():
    x, w = operands((4, 3, 3, 3), (2, 5, 3, 3))
    with pytest.raises(ValueError, match=r"same C, got \[4, 3, 3, 3\] and \[2, 5, 3, 3\]"):
        conv2d_small_maps(x, w)
    with pytest.raises(ValueError, match=r"\[4, 4\] does not fit on maps of \[3, 3\]"):
        conv2d_small_maps(*operands((4, 3, 3, 3), (2, 3, 4, 4)))


def ran(module, x, monkeypatch):
    """How many of the module's convolutions took the products."""
    calls = []
    monkeypatch.setattr(
        "cellfast.ops.small_maps.conv2d_small_maps", lambda *a, **k: calls.append(a) or conv2d_small_maps(*a, **k)
    )
    module(x)
    return len(calls)


def test_a_resnet_uses_it_for_its_last_maps_and_keeps_its_results(monkeypatch):
    plain = build_model(ModelConfig("resnet18"), seed=0).train()
    small = use_small_maps(build_model(ModelConfig("resnet18"), seed=0).train())
    assert list(small.state_dict()) == list(plain.state_dict())
    x = torch.rand(FEWEST_CELLS, 3, 48, 48, generator=torch.Generator().manual_seed(3)).to(memory_format=torch.channels_last)
    losses = []
    for model in (plain, small):
        z = model(x)[1]
        loss = (z * torch.linspace(-1, 1, z.numel()).view_as(z)).mean()
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-4)
    for (name, a), b in zip(small.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5 * float(b.grad.abs().max()) + 1e-9, rtol=2e-3, msg=name)
    # 48 px: maps of 3 px in layer3 (four convolutions), of 2 px in layer4 (four).
    with torch.no_grad():
        assert ran(small, x, monkeypatch) == 8
        assert ran(small, x[:8], monkeypatch) == 0  # too few cells
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ran(small, x, monkeypatch) == 0
        assert ran(use_small_maps(small, False), x, monkeypatch) == 0
    assert not any(isinstance(m, SmallMapConv2d) for m in small.modules())


def test_other_convolutions_are_left_alone():
    kept = nn.Sequential(
        nn.Conv2d(256, 256, 3, groups=2, padding=1), nn.Conv2d(256, 256, 3, dilation=2), nn.Conv2d(256, 256, 1), nn.Conv2d(64, 64, 3),
        nn.Conv2d(256, 256, 3, padding="same"), nn.Conv2d(256, 256, 3, padding=1, padding_mode="reflect"),
    )  # fmt: skip
    assert all(type(module) is nn.Conv2d for module in use_small_maps(kept))


def test_exported_and_compiled_graphs_hold_the_general_convolution():
    block = use_small_maps(nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))).eval()
    x = torch.rand(FEWEST_CELLS, 128, 3, 3)
    expected = block(x)
    exported = torch.export.export(block, (x,)).module()
    with pytest.warns(FutureWarning, match="deprecated"):
        traced = torch.jit.trace(block, x)
    assert "convolution" in str(traced.inlined_graph)
    for graph in (exported, traced):
        torch.testing.assert_close(graph(x), expected, atol=1e-5, rtol=0)
