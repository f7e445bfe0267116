"""Two views of each cell, on the device: ``AugmentConfig`` says what may happen, ``TwoViews`` does it."""

from cellfast.augment.config import PRESETS, AugmentConfig, rotation_margin_px
from cellfast.augment.views import TwoViews, center_crop

__all__ = ["PRESETS", "AugmentConfig", "TwoViews", "center_crop", "rotation_margin_px"]
