"""The upper rows of a JPEG, without the work of decoding those below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Segments = Sequence[tuple[int, int, int]]
SOS = 0xDA  # the segment after which the pixels begin
_SOF0, _DRI = 0xC0, 0xDD  # baseline frame, restart interval
# What libjpeg says of a scan that goes on below the last row: the rows above are whole, and so is the file to its end.
_STOPPED = "extraneous bytes before marker 0xd9"


def decode_upper(data: bytes, found: Segments, rows: int, out: NDArray[np.uint8], *, factor: int = 1) -> bool:
    """Decode rows 0..rows of a JPEG, scaled down by `factor`, into RGB `out` [ceil(H / factor), ceil(W / factor), 3].

    With libjpeg's fast transform and chroma. found: the file's `segments`; rows: of the file as stored, at full size.
    Returns False, with anything in `out`, when this JPEG cannot be decoded so: it is not baseline in a single scan, has
    restart markers, is damaged down to there, has no end, or ends close below.
    Where it returns True the rows are, bit for bit, those of decoding all of it so; what lies below in `out` is undefined.

    Bits that were damaged below `rows` are not found.
    """
    upper = _cut_off(data, found, rows + factor)  # chroma may be made smooth all the same, and then looks one row ahead
    if upper is None:
        return False
    shorter, height = upper
    least = -(-height // factor)
    try:
        # Strict, so that the first complaint ends it: the one about the rows left out, if nothing came before.
        simplejpeg.decode_jpeg(
            shorter, "RGB", fastdct=True, fastupsample=True, min_height=least, min_width=out.shape[1], buffer=out[:least]
        )
    except ValueError as error:
        return _STOPPED in str(error)
    return False


def segments(data: bytes) -> Segments:
    """Marker, first byte and end of each segment of a JPEG's header, the last of them SOS.

    Ends before that where something else lies between them, such as padding, which is allowed or at least common.
    """
    at, marker, found = 2, 0, []
    while marker != SOS and at + 4 <= len(data) and data[at] == 0xFF != data[at + 1]:
        start, marker = at, data[at + 1]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((marker, start, at))
    return found


def frame(data: bytes, found: Segments) -> tuple[int, int, int] | None:
    """Width, height and number of components of a baseline JPEG; None when its header is not as simple as that."""
    if not found or found[-1][0] != SOS:
        return None
    for marker, at, end in found:
        if marker == _SOF0 and end - at >= 10:
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            return (width, height, data[at + 9]) if width and height else None
    return None


def _cut_off(data: bytes, found: Segments, rows: int) -> tuple[bytes, int] | None:
    """The file with a header that says it ends at the first whole block after `rows`, and that height.

    None when that leaves nothing out, or unless it is baseline, in one scan and without restart markers.
    """
    height_at, height, components = 0, 0, 0
    for marker, at, end in found:
        if marker == _DRI and data[at + 4 : end] != b"\0\0":
            return None
        if marker == _SOF0:
            height_at, components = at + 5, data[at + 9]
            block = 8 * max(sampling & 15 for sampling in data[at + 11 : end : 3])
            height = -(-rows // block) * block
            if height >= int.from_bytes(data[height_at : height_at + 2], "big"):
                return None
        if marker == SOS and height_at and data[at + 4] == components:
            return b"".join((data[:height_at], height.to_bytes(2, "big"), data[height_at + 2 :])), height
    return None
