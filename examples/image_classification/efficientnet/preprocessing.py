"""From a picture's file to what EfficientNet-Lite takes."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

SIDE = 224
# Training cut out the middle: 224 of 256 pixels, if the picture is as small.
MARGIN = 32
MEAN, SCALE = 127.0, 128.0


def pixels(picture):
    """A PNG or JPEG file → float32 [3, 224, 224], from about -1 to 1. What is raised is the answer to its instance."""
    try:
        image = Image.open(io.BytesIO(picture), formats=("PNG", "JPEG"))
    except UnidentifiedImageError:
        raise ValueError("neither a PNG nor a JPEG file") from None
    rgb = image.convert("RGB")
    side = min(rgb.size) * SIDE / (SIDE + MARGIN)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    square = rgb.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return ((np.asarray(square, np.float32) - MEAN) / SCALE).transpose(2, 0, 1).copy()
