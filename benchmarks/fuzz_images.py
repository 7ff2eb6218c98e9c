"""Mutate image files and decode them: each input must end soon, as an upright RGB image or as an `ImageError`.

An input follows from --seed and its number, so a finding can be repeated. Inputs whose decoding raised anything else,
took longer than --seconds or killed the process are kept in --keep; the exit code is then 1.

    python benchmarks/fuzz_images.py --count 20000
    python benchmarks/fuzz_images.py --count 500000 --workers 16 --seed 7 --keep /tmp/findings
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, features

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_processes

from llava.image_files.decode import ImageError, decode_image, find_traits

IMAGES_PER_PROCESS = 2_000
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def seed_files() -> dict[str, bytes]:
    """Return small files of every format and of odd kinds, by name."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (24, 20), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    plans: list[tuple[str, Image.Image, str, dict]] = [
        ("jpeg", rgb, "JPEG", {"exif": exif}),
        ("progressive", rgb, "JPEG", {"progressive": True}),
        ("mpo", rgb, "MPO", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("cmyk", rgb.convert("CMYK"), "JPEG", {}),
        ("png", rgb, "PNG", {"exif": exif}),
        ("palette", rgb.quantize(16), "PNG", {"transparency": 3}),
        ("rgba", rgb.convert("RGBA"), "PNG", {}),
        ("deep", deep, "PNG", {}),
        ("animated", rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("gif", rgb.quantize(16), "GIF", {"save_all": True, "append_images": [rgb.rotate(90).quantize(16)]}),
        ("bmp", rgb, "BMP", {}),
        ("tiff", rgb, "TIFF", {}),
        ("deep-tiff", deep, "TIFF", {}),
        ("float-tiff", rgb.convert("F"), "TIFF", {}),
        ("packed-tiff", rgb, "TIFF", {"compression": "tiff_lzw"}),
        ("jpeg-tiff", rgb, "TIFF", {"compression": "jpeg"}),
        ("pages", rgb, "TIFF", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("ppm", rgb, "PPM", {}),
        ("deep-pgm", deep, "PPM", {}),
        ("pbm", rgb.convert("1"), "PPM", {}),
    ]
    if features.check("webp"):
        plans += [
            ("webp", rgb, "WEBP", {"exif": exif}),
            ("lossless", rgb.convert("RGBA"), "WEBP", {"lossless": True}),
            ("animated-webp", rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ]
    if features.check("avif"):
        plans.append(("avif", rgb, "AVIF", {}))
    if features.check("jpg_2000"):
        plans += [("jpeg2000", rgb, "JPEG2000", {}), ("deep-jpeg2000", deep, "JPEG2000", {})]
    files = {}
    for name, image, kind, options in plans:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        files[name] = stream.getvalue()
    return files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return data with a few random changes, more of them near the start, where the headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8, 30))):
        end = len(changed) if rng.random() < 0.5 else min(len(changed), 200)
        at = rng.randrange(end) if end else 0
        kind = rng.randrange(8)
        if kind == 0 and changed:
            changed[at] = rng.randrange(256)
        elif kind == 1 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            size = rng.choice((1, 2, 4))
            number = rng.choice(NUMBERS) & (256**size - 1)
            changed[at : at + size] = number.to_bytes(size, rng.choice(("big", "little")))
        elif kind == 3:
            del changed[at : at + rng.choice((1, 2, 4, 16, 100))]
        elif kind == 4:
            changed[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16)))
        elif kind == 5:
            other = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[other : other + rng.choice((4, 12, 50))]
        elif kind == 6 and rng.random() < 0.3:
            del changed[at:]
        elif kind == 7:
            changed[at : at + 4] = rng.randbytes(4)
    return bytes(changed)


def make_input(seed: int, number: int, files: dict[str, bytes]) -> bytes:
    """Return the input of a number."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(sorted(files))
    return mutate(files[name], rng)


def try_one(data: bytes, place: Path) -> tuple[str, bool]:
    """Decode an input as batch inference and as the doctor do; return the result and whether it is a finding."""
    try:
        image = decode_image(data, "fuzzed")
        place.write_bytes(data)
        find_traits(place)
    except ImageError as error:
        return error.code, " at 0x" in str(error) or not str(error).isprintable()
    except BaseException as error:
        return f"{type(error).__name__}: {error}", True
    is_whole = image.mode == "RGB" and image.getexif().get(0x0112) is None and len(image.tobytes()) > 0
    return ("image", False) if is_whole else (f"image of mode {image.mode}", True)


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fuzz_processes.add_arguments(parser, count=20_000, seconds=5, keep="fuzz_findings")
    options = parser.parse_args(argv)
    files = seed_files()
    if options.first is not None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, "image")
            return fuzz_processes.run_worker(
                options, lambda number: (*try_one(make_input(options.seed, number, files), place), "")
            )

    def keep(number: int) -> Path:
        options.keep.mkdir(parents=True, exist_ok=True)
        path = options.keep / f"{options.seed}-{number}"
        path.write_bytes(make_input(options.seed, number, files))
        return path

    return fuzz_processes.report(options, fuzz_processes.run_workers(options, [__file__], IMAGES_PER_PROCESS), keep)


if __name__ == "__main__":
    sys.exit(main())
