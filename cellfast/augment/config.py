"""What may happen to a view: the values of an augmentation, their presets and their limits.

``default``: what a microscope can do to a cell, and cheap; no elastic displacement. ``none``: the central crop twice.

``perakis2021``: the augmentation of the paper's public implementation at its last commit, which is a random resized crop of the
96 px crop (area 0.08 to 1, ratio 3/4 to 4/3), horizontal flip, elastic transform (p 0.5), brightness and contrast jitter of 0.2
(p 0.8) and Gaussian blur of 9 px with sigma 0.1 to 2 (p 0.5). Its elastic transform runs with its library's defaults
(albumentations before 1.4), and what acts there is a random affine: three anchors around the centre, each moved by up to 50 px
along each axis. Deviations, all of them:

* saturation and hue jitter are left out: they mix channels as if they were RGB and have no meaning for stains;
* contrast turns about each channel's mean, not about the grey level of an RGB image, and brightness and contrast need no order:
  values are clamped once, at the end, not after every step;
* the displacement of its elastic transform (alpha 1, sigma 50) moves pixels by hundredths of a pixel and is left out;
* crop, flip and affine are one bilinear interpolation, not three; the crop is taken from the central output window of the stored
  crop, so that an affine that reaches across the crop's edge meets real pixels first and reflected ones after;
* its crops are inverted (a pixel conversion wraps around) and normalised with constants for that: ``inverted`` lets the
  operations act on the inverted image as they do there, and the model's ``input_transform`` does the rest; the recipe
  ``perakis2021`` sets both.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from cellfast.errors import CellfastError

Range = tuple[float, float]
_PADDING = ("reflection", "border", "zeros")


@dataclass(frozen=True)
class AugmentConfig:
    """What may happen to a view. Lengths are pixels of the stored crop, intensities are in units of the scaled range [0, 1].

    The defaults are the ``default`` preset: what a fluorescence microscope can do to a cell (lie at any angle, be mirrored, be a
    little off centre, be stained or exposed differently per channel, be noisier or slightly out of focus), and no more.
    :meth:`preset` makes the others.

    Args:
        crop_area: (low, high) area of a random resized crop as a fraction of the central output window, or None for no resized
            crop.
        crop_ratio: (low, high) width / height of that crop, drawn log-uniformly.
        zoom: (low, high) magnification about the crop's centre; above 1 shows less of the surroundings.
        rotation_deg: the angle is uniform in [−rotation_deg, rotation_deg]; 180 is any angle, 0 none.
        translation_px: shift along each axis, uniform in [−translation_px, translation_px].
        flip_horizontal, flip_vertical: probabilities.
        padding: where a warp reaches outside the stored crop: ``reflection``, ``border`` or ``zeros``. See
            :func:`rotation_margin_px`.
        anchors_p: probability of a random affine: three points, at a third of the view's edge from its centre along both axes,
            are moved independently, and the view with them.
        anchors_px: each coordinate of a point moves by a uniform draw in [−anchors_px, anchors_px].
        elastic_p: probability of an elastic displacement (Gaussian-smoothed white noise, Simard et al. 2003).
        elastic_rms_px: root-mean-square displacement along each axis.
        elastic_sigma_px: standard deviation of the smoothing Gaussian (the length over which displacements agree).
        jitter_p: probability of the brightness and contrast jitter.
        brightness: the view is multiplied by a factor uniform in [1 − brightness, 1 + brightness].
        contrast: each channel is stretched about its own mean by a factor uniform in [1 − contrast, 1 + contrast].
        channel_p: probability, per channel, of the gain and shift below, drawn independently per channel.
        channel_gain: the gain is uniform in [1 − channel_gain, 1 + channel_gain].
        channel_shift: the offset is uniform in [−channel_shift, channel_shift].
        noise_p: probability of additive Gaussian noise, independent per pixel and channel.
        noise_std: its standard deviation is uniform in [0, noise_std].
        blur_p: probability of a Gaussian blur.
        blur_sigma_px: (low, high) of its standard deviation, uniform.
        blur_kernel_px: width of its kernel, odd; borders are reflected.
        inverted: jitter, noise and clamping act on the inverted image, 256/255 − x and 0 for x below half an 8-bit step; the
            views are turned back, so that they lie in [1/255, 256/255].

    Raises:
        CellfastError: a value out of its range.
    """

    crop_area: Range | None = None
    crop_ratio: Range = (3 / 4, 4 / 3)
    zoom: Range = (0.9, 1.15)
    rotation_deg: float = 180.0
    translation_px: float = 4.0
    flip_horizontal: float = 0.5
    flip_vertical: float = 0.5
    padding: str = "reflection"
    anchors_p: float = 0.0
    anchors_px: float = 10.0
    elastic_p: float = 0.0
    elastic_rms_px: float = 1.5
    elastic_sigma_px: float = 10.0
    jitter_p: float = 0.8
    brightness: float = 0.2
    contrast: float = 0.2
    channel_p: float = 0.8
    channel_gain: float = 0.25
    channel_shift: float = 0.02
    noise_p: float = 0.5
    noise_std: float = 0.03
    blur_p: float = 0.2
    blur_sigma_px: Range = (0.1, 1.0)
    blur_kernel_px: int = 5
    inverted: bool = False

    def __post_init__(self) -> None:
        for name in ("crop_area", "crop_ratio", "zoom", "blur_sigma_px"):
            value = getattr(self, name)
            if name == "crop_area" and value is None:
                continue
            upper = 1.0 if name == "crop_area" else math.inf
            pair = _numbers(name, value)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= upper:
                limit = " <= 1" if upper == 1 else ""
                raise CellfastError(f"augment.{name} must be two numbers with 0 < low <= high{limit}, got {value!r}")
            object.__setattr__(self, name, pair)  # a list from YAML becomes the tuple it stands for
        limits = {
            "rotation_deg": 180.0,
            "brightness": 1.0,
            "contrast": 1.0,
            "channel_gain": 1.0,
            "channel_shift": 1.0,
            "noise_std": 1.0,
        }
        limits |= dict.fromkeys(
            ("flip_horizontal", "flip_vertical", "anchors_p", "elastic_p", "jitter_p", "channel_p", "noise_p", "blur_p"), 1.0
        )
        limits |= dict.fromkeys(("translation_px", "anchors_px", "elastic_rms_px", "elastic_sigma_px"), math.inf)
        for name, upper in limits.items():
            (value,) = _numbers(name, (getattr(self, name),))
            if not 0 <= value <= upper or math.isinf(value):
                most = f" and at most {upper:g}" if upper < math.inf else ""
                raise CellfastError(f"augment.{name} must be a number of at least 0{most}, got {value:g}")
        if self.elastic_p > 0 and self.elastic_sigma_px < 1:
            raise CellfastError(
                f"augment.elastic_sigma_px must be at least 1 px where elastic_p > 0, got {self.elastic_sigma_px:g}"
            )
        if not isinstance(self.blur_kernel_px, int) or self.blur_kernel_px < 1 or self.blur_kernel_px % 2 == 0:
            raise CellfastError(f"augment.blur_kernel_px must be an odd number of pixels, got {self.blur_kernel_px!r}")
        if not isinstance(self.inverted, bool):
            raise CellfastError(f"augment.inverted must be true or false, got {self.inverted!r}")
        if self.padding not in _PADDING:
            raise CellfastError(f"augment.padding must be one of {', '.join(_PADDING)}, got {self.padding!r}")

    @classmethod
    def preset(cls, name: str = "default", **overrides: Any) -> AugmentConfig:
        """The named preset with some values replaced; the names are those of :data:`PRESETS`, described at the top of this file.

        Raises:
            CellfastError: an unknown preset or an unknown value name (the known ones are listed).
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise CellfastError(f"unknown augmentation preset {name!r}: choose one of {', '.join(PRESETS)}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise CellfastError(f"unknown augmentation value {', '.join(unknown)}: the values are {', '.join(known)}")
        return cls(**{**PRESETS[name], **overrides})


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "perakis2021": dict(
        crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), zoom=(1.0, 1.0), rotation_deg=0.0, translation_px=0.0,
        flip_horizontal=0.5, flip_vertical=0.0, anchors_p=0.5, anchors_px=50.0, elastic_p=0.0, jitter_p=0.8,
        brightness=0.2, contrast=0.2, channel_p=0.0, noise_p=0.0, blur_p=0.5, blur_sigma_px=(0.1, 2.0), blur_kernel_px=9,
    ),
    "none": dict(
        crop_area=None, zoom=(1.0, 1.0), rotation_deg=0.0, translation_px=0.0, flip_horizontal=0.0, flip_vertical=0.0,
        anchors_p=0.0, elastic_p=0.0, jitter_p=0.0, channel_p=0.0, noise_p=0.0, blur_p=0.0,
    ),
}  # fmt: skip


def rotation_margin_px(output_size: int, rotation_deg: float = 180.0) -> int:
    """Pixels a crop needs beyond ``output_size`` so that a pure rotation by up to ``rotation_deg`` samples stored pixels only.

    Equals ``ceil(s · (cos a + sin a − 1)) + 1`` at the worst angle a ≤ 45°: 41 px for any angle at 96 px. With less, e.g. the
    usual crops of 112 px for views of 96 px (enough for 10°), the corners of a rotated view are filled as
    ``AugmentConfig.padding`` says.
    """
    worst = math.radians(min(abs(rotation_deg), 45.0))
    return math.ceil(output_size * (math.cos(worst) + math.sin(worst) - 1.0)) + (1 if worst > 0 else 0)


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise CellfastError(f"augment.{name} must be made of numbers, got {values!r}") from None
    if any(math.isnan(number) for number in numbers):
        raise CellfastError(f"augment.{name} is NaN")
    return numbers
