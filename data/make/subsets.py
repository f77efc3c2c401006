"""Make the embedded image subsets again, from the full sets.

    python data/make/subsets.py [--cache DIR]

Writes the sheets and labels of every subset and SHA256SUMS into data/images/.
"""

import argparse
import hashlib
import io
import os
from pathlib import Path

from ngcore.data.images import sources
from ngcore.data.images import subsets as images


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded image subsets again, from the full sets.")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="directory for the full sets")
    cache = parser.parse_args().cache
    names = [
        name
        for image_set, sizes in images.SUBSET_SIZES.items()
        for split, size in sizes.items()
        for name in write_subset(image_set, split, size, cache)
    ]
    digests = {name: hashlib.sha256((images.SUBSETS / name).read_bytes()).hexdigest() for name in sorted(names)}
    write(images.CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode())


def write_subset(image_set: str, split: str, size: int, cache: Path) -> tuple[str, str]:
    """Write the first `size` images of a split and their labels; returns the names of the two files."""
    pixels, labels = sources.load(image_set, split, cache)
    sheet, digits = images.subset_files(image_set, split)
    png = io.BytesIO()
    images.to_sheet(pixels[:size]).save(png, format="PNG", optimize=True)
    write(sheet, png.getvalue())
    write(digits, "".join(map(str, labels[:size])).encode() + b"\n")
    print(f"{sheet}: {size:,} images, {len(png.getvalue()) / 1e6:.1f} MB")
    return sheet, digits


def write(name: str, content: bytes) -> None:
    """Write a file of the subsets whole or not at all."""
    unfinished = images.SUBSETS / f".{name}"
    unfinished.write_bytes(content)
    os.replace(unfinished, images.SUBSETS / name)


if __name__ == "__main__":
    main()
