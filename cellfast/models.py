"""Encoder and projection head: crops to features h (what is profiled) and projections z (what the loss sees)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from cellfast.errors import CellfastError

ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101", "cnn4")
# Name → (kernel, stride, max pooling after it). A ResNet's cost is that of its body, which sees size/4 (imagenet, small),
# size/2 (dense)
# or the full size (full): relative cost 1 : 1 : 4 : 16. ResNet-18, 3 channels, 96 px: 0.33, 0.32, 1.25 and 5.00 GMAC per view.
STEMS: dict[str, tuple[int, int, bool]] = {
    "imagenet": (7, 2, True),
    "small": (3, 2, True),
    "dense": (3, 2, False),
    "full": (3, 1, False),
}
CNN4_WIDTHS = (16, 32, 64, 64)
# perakis2021: what the public implementation of Perakis et al. makes of a crop in [0, 1] before its encoder, see
# `WrappedInverse`.
INPUT_TRANSFORMS = ("none", "perakis2021")
_PERAKIS2021_MEAN, _PERAKIS2021_STD = (0.7469, 0.7403, 0.7307), (0.1548, 0.1594, 0.1706)


@dataclass(frozen=True)
class ModelConfig:
    """What determines a model's architecture.

    Args:
        encoder: one of `ENCODERS`.
        num_channels: channels of a crop.
        stem: first layers of a ResNet, one of `STEMS`: ``imagenet`` (7×7 stride 2, max pooling; takes ImageNet weights),
            ``small`` (3×3 stride 2,
            max pooling; finer first filters at the same cost, for 64–112 px crops), ``dense`` (3×3 stride 2, no pooling; 4 ×
            the cost), ``full`` (3×3
            stride 1, no pooling; 16 × the cost, for crops of 32–48 px). ``cnn4`` has one architecture and does not look at it.
        projection_dim: columns D of z.
        projection_layers: linear layers of the projection head, with ReLU between them.
        projection_hidden: width of the head's hidden layers; None: as wide as h.
        projection_batch_norm: BatchNorm before each ReLU of the head, as in SimCLR; the reference implementation of Perakis et
            al. has none.
        input_transform: ``none``, or ``perakis2021``: inverted and normalised as by that implementation (`WrappedInverse`).

    Raises:
        CellfastError: a value outside its range, with the values there are.
    """

    encoder: str = "resnet18"
    num_channels: int = 3
    stem: str = "small"
    projection_dim: int = 128
    projection_layers: int = 2
    projection_hidden: int | None = None
    projection_batch_norm: bool = False
    input_transform: str = "none"

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            raise CellfastError(f"encoder {self.encoder!r} is not known: choose one of {', '.join(ENCODERS)}")
        if self.stem not in STEMS:
            raise CellfastError(f"stem {self.stem!r} is not known: choose one of {', '.join(STEMS)}")
        if self.input_transform not in INPUT_TRANSFORMS:
            raise CellfastError(
                f"input_transform {self.input_transform!r} is not known: choose one of {', '.join(INPUT_TRANSFORMS)}"
            )
        for name in ("num_channels", "projection_dim", "projection_layers", "projection_hidden"):
            value = getattr(self, name)
            if value is None and name == "projection_hidden":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CellfastError(f"{name} must be a whole number of at least 1, got {value!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The configuration written by `to_dict`; unknown keys raise `CellfastError` (a file of a newer version)."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CellfastError(
                f"the model configuration has keys this version does not know: {', '.join(unknown)}; upgrade cellfast"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values; an input transform of none is left out, so that files without one stay as they
        were."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("input_transform", "none")}


class WrappedInverse(nn.Module):
    """x in [0, 1] → (inverse of x − mean) / std per channel, as the reference implementation of Perakis et al. sees crops.

    Equivalent, for 8-bit pixels v and x = v / 255, to ``(((256 − v) % 256) / 255 − mean) / std``: that code multiplies pixels
    that are already 0 to 255 by 255 and casts to 8 bits, so that they wrap around: images are inverted, and black stays black.
    Between 8-bit steps x below half a step is black. Its constants are for three channels; other numbers of channels take their
    average.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        for name, values in (("mean", _PERAKIS2021_MEAN), ("std", _PERAKIS2021_STD)):
            tensor = torch.tensor(values) if num_channels == 3 else torch.full((num_channels,), sum(values) / 3)
            # Not in the state_dict: constants, and weights from elsewhere do not have them.
            self.register_buffer(name, tensor[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        inverse = torch.where(x < 0.5 / 255, torch.zeros((), dtype=x.dtype, device=x.device), 256 / 255 - x)
        return inverse.sub_(self.mean).div_(self.std)


class CNN4(nn.Module):
    """Four times 3×3 convolution, 2×2 max pooling and ReLU, then the mean over positions: [B, C, s, s] → [B, 64].

    Source: the 4-layer CNN baseline of Perakis et al. (arXiv 2103.16670). The paper gives no widths; 16, 32, 64 and 64 without
        BatchNorm are ours.
    It has no BatchNorm, so every cell's features depend on that cell alone, in training too.
    """

    def __init__(self, num_channels: int, widths: tuple[int, ...] = CNN4_WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = num_channels
        for width in widths:
            convolution = nn.Conv2d(previous, width, kernel_size=3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
            # ReLU after pooling: the same values and gradients from a quarter of the pixels.
            layers += [convolution, nn.MaxPool2d(2), nn.ReLU(inplace=True)]
            previous = width
        self.features = nn.Sequential(*layers)
        self.num_features = previous

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean(dim=(2, 3))


def _resnet(config: ModelConfig) -> tuple[nn.Module, int]:
    """A torchvision ResNet with ``config``'s input channels and stem and without its classifier, and its number of features."""
    # torchvision takes longer to import than torch, and a model without a ResNet does not need it.
    import torchvision

    network = getattr(torchvision.models, config.encoder)(weights=None)
    kernel, stride, pooled = STEMS[config.stem]
    if (config.num_channels, kernel, stride) != (3, 7, 2):
        network.conv1 = nn.Conv2d(config.num_channels, 64, kernel, stride=stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if pooled:
        # ReLU after pooling: the same values and gradients (a maximum below zero becomes zero either way) from a quarter of the
        # pixels.
        network.maxpool = nn.Sequential(network.maxpool, network.relu)
        network.relu = nn.Identity()
    else:
        network.maxpool = nn.Identity()
    num_features = network.fc.in_features
    network.fc = nn.Identity()
    return network, num_features


class SimCLR(nn.Module):
    """An encoder f and a projection head g: h = f(x), z = g(h).

    Args:
        config: the architecture. Weights are drawn from torch's global generator: use `build_model` for a seeded draw.

    Source: Chen et al. 2020 (SimCLR) as used by Perakis et al., arXiv 2103.16670; h is what is profiled, z feeds the loss only.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.input_transform = WrappedInverse(config.num_channels) if config.input_transform == "perakis2021" else nn.Identity()
        if config.encoder == "cnn4":
            self.encoder: nn.Module = CNN4(config.num_channels)
            self.num_features: int = CNN4_WIDTHS[-1]
        else:
            self.encoder, self.num_features = _resnet(config)
        hidden = config.projection_hidden or self.num_features
        layers: list[nn.Module] = []
        previous = self.num_features
        for _ in range(config.projection_layers - 1):
            layers.append(nn.Linear(previous, hidden))
            if config.projection_batch_norm:
                layers.append(nn.BatchNorm1d(hidden))
            layers.append(nn.ReLU(inplace=True))
            previous = hidden
        layers.append(nn.Linear(previous, config.projection_dim))
        self.projection = nn.Sequential(*layers)

    def encode(self, x: Tensor) -> Tensor:
        """Features h, [B, F] float32 (bfloat16 under autocast), of views x, [B, C, s, s] float32 in [0, 1]."""
        return self.encoder(self.input_transform(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features h, [B, F], and projections z, [B, D], of views x, [B, C, s, s] float32 in [0, 1]."""
        h = self.encode(x)
        return h, self.projection(h)


def build_model(config: ModelConfig, seed: int) -> SimCLR:
    """A randomly initialised model in channels_last; the same seed gives the same weights and the global generator stays as it
    was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SimCLR(config)
    return model.to(memory_format=torch.channels_last)


def num_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def multiply_accumulates(config: ModelConfig, size: int) -> int:
    """Multiply-accumulate operations of one view of ``size`` px through encoder and head (convolutions and linear layers),
    forward only.

    A training step costs about 3 × this per view, 6 × per cell. Nothing is computed: the shapes are followed on the meta device.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features

    with torch.device("meta"), torch.no_grad():
        model = SimCLR(config).eval()
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        model(torch.empty(1, config.num_channels, size, size))
    return total


def adapt_input_channels(weight: Tensor, num_channels: int) -> Tensor:
    """The first convolution's weight [O, K, k, k] for another number of input channels: [O, C, k, k].

    Equivalent to ``weight.mean(1, keepdim=True).repeat(1, C, 1, 1) * K / C``: every channel gets the mean filter, scaled so
    that an image whose
    channels are all equal gives the same response as before. With K = C the weight is returned unchanged.
    """
    if weight.shape[1] == num_channels:
        return weight
    mean = weight.mean(dim=1, keepdim=True)
    return mean.repeat(1, num_channels, 1, 1) * (weight.shape[1] / num_channels)
