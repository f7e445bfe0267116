"""Encoders against torchvision's and against the layers in their textbook order."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from cellfast.models import ModelConfig, build_model


def gradients(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    network.zero_grad()
    y = network(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    return y.detach(), [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("train", [True, False])
def test_a_resnet_is_torchvisions_in_values_gradients_and_names(train):
    ours = build_model(ModelConfig("resnet18", stem="imagenet"), seed=1).encoder.train(train)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.to(memory_format=torch.channels_last).train(train)
    # Shifted down, so that whole windows of the first pooling are below zero.
    with torch.no_grad():
        for network in (ours, theirs):
            network.bn1.bias -= 1.5
    x = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    (a, da), (b, db) = gradients(ours, x), gradients(theirs, x)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for mine, other in zip(da, db):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_cnn4_is_convolution_relu_and_pooling_four_times():
    ours = build_model(ModelConfig("cnn4"), seed=1).encoder
    layers: list[nn.Module] = []
    for convolution in (m for m in ours.features if isinstance(m, nn.Conv2d)):
        layers += [convolution, nn.ReLU(), nn.MaxPool2d(2)]
    textbook = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    (a, da), (b, db) = gradients(ours, x), gradients(textbook, x)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for mine, other in zip(da, db):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
