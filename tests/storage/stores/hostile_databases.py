"""OCDBT databases that a stranger may have made: each with what its error says."""

from tests.storage.stores import ocdbt_writer as made

GOOD = {"a/zarr.json": b"{}", "b": b"x"}


def deep(height):
    """Nodes of which each has the one before as its sixteen children."""
    nodes = [made.leaf(GOOD)]
    for level in range(1, height + 1):
        start, size = sum(map(len, nodes[:-1])), len(nodes[-1])
        nodes.append(made.interior({chr(97 + at): ("d/n", start, size) for at in range(16)}, height=level))
    return nodes


def of_itself(height):
    first = made.interior({"a": ("d/n", 0, 1)}, height=height)
    return [made.interior({"a": ("d/n", 0, len(first))}, height=height)]


LEAF = made.leaf(GOOD)
HOSTILE = {
    "a node that names itself": ((of_itself(1),), {"height": 1}, "comes twice"),
    "a node that names itself under a great height": (
        (of_itself(255),),
        {"height": 255},
        "height|comes twice",
    ),
    "a node named sixteen times, on six levels": ((deep(6),), {"height": 6}, "comes twice"),
    "a height that is not the node's": (([LEAF],), {"height": 3}, "height: 0 where the node above it says 3"),
    "a root far behind the end": (([LEAF],), {"root": ("d/n", 1 << 62, 10)}, "ends at byte"),
    "a root larger than the file": (([LEAF],), {"root": ("d/n", 0, 1 << 62)}, "ends at byte"),
    "a root in a file above": (([LEAF],), {"root": ("../n", 0, 10)}, r"'\.\./n' is no path below"),
    "a root in an absolute file": (([LEAF],), {"root": ("/etc/passwd", 0, 10)}, "is no path below"),
    "a root in a file with a newline": (([LEAF],), {"root": ("d/n\nx", 0, 10)}, "is no path below"),
    "values in a file above": (([made.leaf({"a": ("../../secret", 0, 4)})],), {}, "is no path below"),
    "values in the directory's own file": (([made.leaf({"a": ("d/./n", 0, 4)})],), {}, "is no path below"),
    "a great number of entries": (([made.leaf(GOOD, count=1 << 40)],), {}, "num_entries"),
    "no entries": (([made.leaf(GOOD, count=0)],), {}, "num_entries"),
    "a wrong checksum": (([made.leaf(GOOD, checksum=7)],), {}, "crc32c_checksum"),
    "a wrong length": (([made.leaf(GOOD, length=1 << 50)],), {}, "length"),
    "another version": (([made.leaf(GOOD, version=9)],), {}, "version"),
    "another compression": (([made.leaf(GOOD, compression=9)],), {}, "compression_format"),
    "a frame that is none": (([made.leaf(GOOD, compression=1)],), {}, "body"),
    "a bomb": (([made.framed(made.NODE, bytes(1 << 28), packed=True)],), {}, "body: more than"),
    "keys in the wrong order": (
        ([made.framed(made.NODE, bytes([0, 0, 2]) + made.keys("ba") + b"ba" + bytes([1, 1, 0, 0]) + b"xy")],),
        {},
        "rising order",
    ),
    "keys that unfold to gigabytes": (
        (
            [
                made.framed(
                    made.NODE,
                    bytes([0, 0])
                    + made.varint(900_000)
                    + made.column([60_000] * 899_999)
                    + made.column([60_000] + [1] * 899_999)
                    + bytes(960_000),
                )
            ],
        ),
        {},
        "bytes of names",
    ),
    "lengths whose sum overflows to a small one": (
        (
            [
                made.framed(
                    made.NODE,
                    bytes([0, 0, 2]) + made.column([1, 1, (1 << 64) - 1]) + b"abb" + bytes([1, 1, 0, 0]),
                )
            ],
        ),
        {},
        "1 of 1, 18446744073709551615 more",
    ),
    "a numbered manifest": (([LEAF],), {"kind": 1}, "manifest_kind"),
    "a key that is no text": (([made.leaf({"a": b""}).replace(b"a", b"\xff")],), {}, "crc32c"),
}
