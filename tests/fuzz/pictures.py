"""Pictures that are rare, damaged, or built to do harm, and whether they are to be accepted."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def encoded(mode: str = "RGB", size: tuple[int, int] = (40, 30), format: str = "PNG", **options: Any) -> bytes:
    """A gradient."""
    out = io.BytesIO()
    image = Image.linear_gradient("L").resize(size)
    deep = image.convert("I").point(lambda grey: grey * 257, "I").convert("I;16") if mode == "I;16" else None
    (deep or image.convert(mode)).save(out, format, **options)
    return out.getvalue()


def frames(format: str, count: int) -> bytes:
    """An animation."""
    more = [Image.new("RGB", (40, 30), (i % 256, i // 256, 9)) for i in range(count)]
    return encoded(format=format, save_all=True, append_images=more)


def png_with(kind: bytes, content: bytes, count: int = 1) -> bytes:
    """A PNG with chunks in front of its pixels."""
    sound = encoded()
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return sound[:33] + chunk * count + sound[33:]


def sized(width: int, height: int) -> bytes:
    """A PNG whose head tells another size than it has."""
    head = b"IHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    return encoded()[:12] + head + struct.pack(">I", zlib.crc32(head)) + encoded()[33:]


def jpeg_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    sound = encoded(size=(400, 300), format="JPEG", progressive=True)
    last = sound[sound.rindex(b"\xff\xda") : -2]
    return sound[:-2] + last * count + sound[-2:]


def jpeg_with(segment: bytes, count: int = 1) -> bytes:
    """A JPEG with APP1 segments."""
    sound = encoded(format="JPEG")
    return sound[:2] + (b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment) * count + sound[2:]


def turned(orientation: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(format="JPEG", exif=exif)


def claiming(format: str) -> bytes:
    """A small file whose head says that it is enormous."""
    if format == "GIF":
        return b"GIF89a\xff\xff\xff\xff" + encoded(format="GIF")[10:]
    if format == "BMP":
        return encoded(format="BMP")[:18] + b"\xff\xff\xff\x7f" * 2 + encoded(format="BMP")[26:]
    if format == "WEBP":
        return b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")
    return out.getvalue()


def bmp_runs(width: int, height: int, runs: bytes) -> bytes:
    """A run-length encoded BMP."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    palette = bytes(range(256)) * 4
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + len(palette)) + head + palette + runs


OTHERS = ("TIFF", "PPM", "ICO", "TGA", "EPS", "PDF", "PCX", "SGI", "DIB", "JPEG2000")

GOOD: dict[str, Callable[[], bytes]] = {
    **{f"PNG {mode}": functools.partial(encoded, mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    **{f"JPEG {mode}": functools.partial(encoded, mode, format="JPEG") for mode in ("L", "RGB", "CMYK")},
    **{f"{format}": functools.partial(encoded, format=format) for format in FORMATS},
    **{f"turned {n}": functools.partial(turned, n) for n in range(10)},
    "two pictures (MPO)": lambda: encoded(format="MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "1 x 1": lambda: encoded(size=(1, 1)),
    "200 x 1": lambda: encoded(size=(200, 1)),
    "progressive": lambda: encoded(format="JPEG", progressive=True),
    "few scans": lambda: jpeg_scans(50),
    "broken EXIF": lambda: jpeg_with(b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "EXIF of nothing": lambda: jpeg_with(b"Exif\0\0"),
    "EXIF that leads in circles": lambda: jpeg_with(
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0"
    ),
    "many texts": lambda: png_with(b"tEXt", b"a\0b", 1000),
    "unknown chunks": lambda: png_with(b"teSt", b"", 10_000),
    "a picture behind the picture": lambda: encoded() + encoded("L", format="GIF"),
    **{f"frames {format}": functools.partial(frames, format, 300) for format in ("GIF", "PNG", "WEBP")},
}  # fmt: skip

BAD: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"no picture",
    "0 x 0": lambda: sized(0, 0),
    "0 x 5": lambda: sized(0, 5),
    "201 x 1": lambda: encoded(size=(201, 1)),
    "1 x 3000": lambda: encoded(size=(1, 3000)),
    "text bomb": lambda: png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24))),
    "profile bomb": lambda: png_with(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**24))),
    "too many scans": lambda: jpeg_scans(200),
    "too much EXIF": lambda: jpeg_with(b"Exif\0\0" + bytes(8), 2000),
    "runs without end": lambda: bmp_runs(60_000, 60_000, b"\0\2\xff\xff" * 100),
    **{f"half a {format}": functools.partial(lambda f: encoded(format=f)[: len(encoded(format=f)) // 2], format)
       for format in FORMATS},
    **{f"claiming {format}": functools.partial(claiming, format) for format in ("GIF", "BMP", "WEBP", "PNG")},
    **{f"other {format}": functools.partial(encoded, format=format) for format in OTHERS},
    **{f"other behind {magic!r}": functools.partial(lambda m: m + encoded(format="EPS"), magic)
       for magic in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"BM")},
}  # fmt: skip


@functools.cache
def made(name: str) -> bytes:
    """The picture of this name, of `GOOD` or `BAD`."""
    return (GOOD.get(name) or BAD[name])()


def odd(random: random.Random) -> tuple[bytes, bool]:
    """A picture, and whether it is to be accepted."""
    name = random.choice([*GOOD, *BAD])
    return made(name), name in GOOD
