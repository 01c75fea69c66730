"""What an image of any mode looks like to a model."""

import numpy as np
import pytest
from PIL import Image

from efficientllava.data.records import Record, open_image, rgb
from efficientllava.runtime.errors import UserError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = np.repeat(RAMP[..., None], 3, -1)


def seen(path):
    image = open_image(Record("r7", path, (), True, "test"))
    assert image is not None and image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2", "a.pgm"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    wide = Image.fromarray(RAMP.astype(np.uint16) * 257)
    wide.save(tmp_path / name, **({"irreversible": False} if name.endswith("jp2") else {}))
    assert Image.open(tmp_path / name).mode in ("I", "I;16", "I;16B")
    assert np.abs(seen(tmp_path / name) - GREY).max() <= 0


@pytest.mark.parametrize(("order", "tags"), [("<u2", {}), (">u2", {}), ("<u2", {262: 0})])
def test_a_tiff_is_read_as_its_tags_say(tmp_path, order, tags):
    Image.fromarray((RAMP.astype(np.uint16) * 257).astype(order)).save(tmp_path / "a.tif", tiffinfo=tags)
    assert np.array_equal(seen(tmp_path / "a.tif"), 255 - GREY.astype(int) if tags else GREY)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_an_image_in_memory_is_scaled_too(mode):
    wide = Image.frombytes(
        mode, (16, 16), (RAMP.astype(np.uint16) * 257).astype(">u2" if mode[-1] == "B" else "<u2").tobytes()
    )
    assert np.array_equal(np.asarray(rgb(wide)), GREY)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
@pytest.mark.parametrize("scale", [1, 1000])
def test_numbers_without_a_known_range_are_refused_by_record(tmp_path, kind, scale):
    Image.fromarray(RAMP.astype(kind) * scale).save(tmp_path / "a.tif")
    with pytest.raises(
        UserError, match=r"record 'r7': image '.*a\.tif' cannot be read \(32-bit .* convert it to 8 bits"
    ):
        seen(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "RGBa", "La", "YCbCr", "HSV", "CMYK", "LAB"]
)
def test_every_mode_keeps_its_colours(mode):
    colours = [(255, 255, 255), (0, 0, 0)] + ([] if mode in ("1", "L", "LA", "La") else [(200, 30, 60), (20, 90, 220)])
    plain = Image.new("RGB", (4, len(colours)))
    for row, colour in enumerate(colours):
        plain.paste(colour, (0, row, 4, row + 1))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        made = ImageCms.profileToProfile(plain, *profiles, outputMode="LAB")
    elif mode in ("RGBa", "La"):
        made = plain.convert(f"{mode[:-1]}A").convert(mode)
    elif mode in ("P", "PA"):
        made = plain.quantize(8, dither=Image.Dither.NONE).convert(mode)
    else:
        made = plain.convert(mode)
    assert made is not None and made.mode == mode
    assert np.abs(np.asarray(rgb(made)).astype(int) - np.asarray(plain)).max() <= (
        8 if mode in ("YCbCr", "HSV", "LAB") else 0
    )


def test_a_palette_with_transparency_keeps_its_colours(tmp_path):
    made = Image.new("P", (2, 1))
    made.putpalette([200, 30, 60, 20, 90, 220])
    made.putpixel((1, 0), 1)
    made.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert seen(tmp_path / "a.png").tolist() == [[[200, 30, 60], [20, 90, 220]]]


@pytest.mark.parametrize("raised", [RuntimeError("no such codec"), KeyError(3), SyntaxError("broken"), IndexError()])
def test_whatever_a_decoder_raises_is_told_by_record(tmp_path, monkeypatch, raised):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")

    def fail(*_):
        raise raised

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(UserError, match=r"record 'r7': image '.*a\.png' cannot be read \(.+\); repair it or drop"):
        seen(tmp_path / "a.png")


def test_a_tiff_of_signed_bytes_is_refused(tmp_path):
    Image.new("L", (2, 1)).save(tmp_path / "a.tif", tiffinfo={339: 2})
    with pytest.raises(UserError, match="its values have a sign"):
        seen(tmp_path / "a.tif")
