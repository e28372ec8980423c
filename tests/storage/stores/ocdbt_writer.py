"""OCDBT databases made by hand, right or wrong in one field, by an encoder of its own."""

import functools
import struct

import google_crc32c
import zstandard

MANIFEST, NODE = 0x0CDB3A2A, 0x0CDB20DE


@functools.cache
def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def column(values):
    return b"".join(map(varint, values))


def framed(magic, body, *, packed=False, length=None, checksum=None, version=0, compression=None):
    data = zstandard.compress(body) if packed else body
    kind = int(packed) if compression is None else compression
    inner = varint(version) + varint(kind) + data
    whole = struct.pack(">I", magic) + struct.pack("<Q", length or 12 + len(inner) + 4) + inner
    return whole + struct.pack("<I", google_crc32c.value(whole) if checksum is None else checksum)


def file_table(names):
    """A table in which no name shares a prefix with the one before."""
    sizes = column([len(name) for name in names])
    return (
        column([len(names)])
        + column([0] * (len(names) - 1))
        + sizes
        + column([0] * len(names))
        + _join(names)
    )


def _join(names):
    return b"".join(name.encode() if isinstance(name, str) else name for name in names)


def keys(names):
    return column([0] * (len(names) - 1)) + column([len(name) for name in names])


def leaf(values, *, count=None, height=0, **options):
    """A node of values: bytes, or (file, start, size)."""
    names = sorted(values)
    places = [values[name] for name in names]
    outside = [place for place in places if isinstance(place, tuple)]
    files = sorted({place[0] for place in outside})
    body = bytes([height]) + file_table(files) if files else bytes([height, 0])
    body += varint(len(names) if count is None else count) + keys(names) + _join(names)
    body += column([place[2] if isinstance(place, tuple) else len(place) for place in places])
    body += bytes(isinstance(place, tuple) for place in places)
    body += column([files.index(place[0]) for place in outside]) + column([place[1] for place in outside])
    return framed(NODE, body + _join([place for place in places if isinstance(place, bytes)]), **options)


def interior(children, *, height, **options):
    """A node of nodes: first key and (file, start, size)."""
    names = sorted(children)
    places = [children[name] for name in names]
    files = sorted({place[0] for place in places})
    body = bytes([height]) + file_table(files) + varint(len(names)) + keys(names) + column([0] * len(names))
    body += _join(names) + _references(places, files)
    return framed(NODE, body, **options)


def _references(places, files):
    numbers = column([files.index(place[0]) for place in places])
    where = column([place[1] for place in places]) + column([place[2] for place in places])
    return numbers + where + column([1] * 3 * len(places))


def manifest(root, *, height=0, kind=0, **options):
    body = bytes(16) + bytes([kind]) + varint(100) + varint(8 << 20) + bytes([4]) + varint(0)
    body += file_table([root[0]]) + varint(1) + varint(1) + bytes([height])
    return framed(MANIFEST, body + _references([root], [root[0]]) + bytes(8) + varint(0), **options)


def write(folder, nodes, *, root=None, height=0, **options):
    """Writes a database of nodes, one after the other in one file `d/n`; the last is the root."""
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "n").write_bytes(b"".join(nodes))
    start = sum(map(len, nodes[:-1]))
    place = root or ("d/n", start, len(nodes[-1]))
    (folder / "manifest.ocdbt").write_bytes(manifest(place, height=height, **options))
    return folder
