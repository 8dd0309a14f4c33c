"""What the first bytes of a file say it is; pure, no Pillow, shared by the gateway and the decoder.

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
