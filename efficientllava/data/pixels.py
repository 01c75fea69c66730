"""Images of every mode in RGB of 8 bits, the form that all processors take."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms

# Formats whose values of 16 bits, which Pillow may give as 32, span the whole range. None: an image in memory.
FULL_RANGE = ("PNG", "PPM", "TIFF", "JPEG2000", None)
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 8
SAMPLES, SIGNED = 339, 2  # section 19


def rgb(image: Image.Image) -> Image.Image:
    """Bring an image to 8 bits per channel of red, green and blue; transparency is dropped.

    More than 8 bits are scaled, where the format says what is white.

    Args:
        image: Of any mode.

    Returns:
        An image in memory, of mode ``RGB``.

    Raises:
        ValueError: The range of the values is not known, or Pillow knows no conversion.
    """
    mode, kind = image.mode, image.format
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM")):
        if kind not in FULL_RANGE:
            raise ValueError(f"{kind} of mode {mode} does not say which value is white; convert it to 8 bits")
        return _scaled(image).convert("RGB")
    if mode in ("I", "F"):
        numbers = "integers" if mode == "I" else "floating-point numbers"
        raise ValueError(f"32-bit {numbers} do not say which value is white; convert it to 8 bits")
    if mode == "L" and int(np.ravel(getattr(image, "tag_v2", {}).get(SAMPLES, 1))[0]) == SIGNED:
        raise ValueError("its values have a sign, which Pillow does not see; convert it to 8 bits without")
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image  # None only in place
    if mode in ("La", "RGBa"):  # multiplied by their transparency, which Pillow takes back one step at a time
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way, which gives the same
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits, or of as many as a TIFF says, in 8."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = int(np.ravel(tags.get(BITS, 16))[0])
    largest = 2 ** (bits if 8 < bits <= 16 else 16) - 1
    if values.min() < 0 or values.max() > largest:
        raise ValueError(f"its values span {values.min()} to {values.max()}, not 0 to {largest}; convert it to 8 bits")
    grey = (values.astype(np.uint32) * 255 + largest // 2) // largest
    return Image.fromarray((255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey).astype(np.uint8))
