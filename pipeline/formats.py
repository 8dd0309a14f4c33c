"""What the bytes of a file say it is and how large; pure, no Pillow, shared by the gateway and the decoder.

The name and the declared content type of an upload are claims; the first bytes are what a decoder acts on.
"""

#: Enough to tell every format below, brands of an AVIF or HEIC file included.
HEAD_BYTES = 64

#: What `imaging.decode` reads; anything else is refused, recognised or not. Not TIFF: most of what it can hold
#: is no picture for a model, and libtiff prints a line on stderr for every bad word of a broken file.
DECODABLE = frozenset({"image/jpeg", "image/png", "image/webp", "image/gif", "image/avif", "image/bmp"})

_PREFIXES = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"II+\x00", "image/tiff"),  # BigTIFF
    (b"MM\x00+", "image/tiff"),
    (b"\x00\x00\x01\x00", "image/vnd.microsoft.icon"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "image/jxl"),
    (b"\xff\x0a", "image/jxl"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "image/jp2"),
    (b"8BPS\x00\x01", "image/vnd.adobe.photoshop"),
    (b"%PDF-", "application/pdf"),
)
# ISO base media brands (ISO/IEC 14496-12, 23008-12); the generic mif1 and msf1 say nothing about the codec.
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"})
_GENERIC_BRANDS = frozenset({b"mif1", b"msf1"})
_BMP_HEADER_BYTES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})


def media_type(head: bytes) -> str | None:
    """Return the media type that the first `HEAD_BYTES` bytes show, or None for anything unknown."""
    for prefix, name in _PREFIXES:
        if head.startswith(prefix):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head[4:8] == b"ftyp":
        return _iso_media_type(head)
    # "BM" alone also begins many texts; the size of the second header tells.
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES:
        return "image/bmp"
    return None


def _iso_media_type(head: bytes) -> str | None:
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))]
    if not _AVIF_BRANDS.isdisjoint(brands):
        return "image/avif"
    if not _HEIC_BRANDS.isdisjoint(brands):
        return "image/heic"
    return "image/heif" if not _GENERIC_BRANDS.isdisjoint(brands) else None


def canvas_size(data: bytes, media: str) -> tuple[int, int] | None:
    """Return width and height of a GIF, WebP or PNG from its header.

    The decoders of the first two allocate pixels when they open a file; PNG is what bombs are made of. None for
    other formats, and where the header is cut off.
    """
    if media == "image/png" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if media == "image/gif":
        return _gif_canvas(data)
    return _webp_canvas(data) if media == "image/webp" else None


def _gif_canvas(data: bytes) -> tuple[int, int] | None:
    """Read the screen of a GIF, grown to hold its first frame, as decoders grow it (GIF89a, 18 to 24)."""
    if len(data) < 13:
        return None
    width, height = _u16(data, 6), _u16(data, 8)
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while at + 10 <= len(data) and data[at] != 0x2C:  # not the first image yet
        if data[at] != 0x21:
            at += 1
            continue
        at += 2  # an extension: skip its sub-blocks
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    if at + 10 > len(data):
        return width, height
    return (
        max(width, _u16(data, at + 1) + _u16(data, at + 5)),
        max(height, _u16(data, at + 3) + _u16(data, at + 7)),
    )


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Read the canvas of a WebP (RFC 9649, sections 2.5 to 2.7)."""
    chunk = data[12:16]
    if chunk == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and len(data) >= 30:
        return _u16(data, 26) & 0x3FFF, _u16(data, 28) & 0x3FFF
    return None


def _u16(data: bytes, at: int) -> int:
    return data[at] | data[at + 1] << 8
