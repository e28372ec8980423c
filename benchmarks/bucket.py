"""A bucket on this machine: serves directories as Google Cloud Storage does, slow on purpose.

`python -m benchmarks.bucket PORT` answers what TensorStore, gcsfs and Orbax ask to read (the JSON API's
listing, metadata and media of objects), each response after a delay and at no more than a stream's bandwidth,
and keeps a log. It is for measuring and knows no writing, no accounts and no faults.
"""

import asyncio
import dataclasses
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

BUCKET = "bench"
_STEP = 256 << 10


@dataclasses.dataclass
class Bucket:
    """What is served, how slowly, and what was asked.

    Attributes:
        mounts: Local directories by the prefix under which their files are objects.
        delay: Seconds before each response.
        bandwidth: Bytes a second of one stream.
        log: Start, end and bytes of each request.
    """

    mounts: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    delay: float = 0.03
    bandwidth: float = 50e6
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    objects: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)

    def mount(self, prefix: str, directory: str) -> None:
        """Serves the files of a directory."""
        root = pathlib.Path(directory)
        for file in root.rglob("*"):
            if file.is_file():
                self.objects[f"{prefix}/{file.relative_to(root)}"] = file

    def listed(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Returns one page of a listing."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        low, high = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        names: list[str] = []
        folders: set[str] = set()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or not low <= name < high:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                names.append(name)
        first, most = int(query.get("pageToken") or 0), int(query.get("maxResults", 1000))
        page = {"kind": "storage#objects", "items": [self.described(n) for n in names[first : first + most]]}
        if folders and not first:
            page["prefixes"] = sorted(folders)
        if len(names) > first + most:
            page["nextPageToken"] = str(first + most)
        return page

    def described(self, name: str) -> dict[str, str]:
        """Returns the metadata of an object."""
        status = self.objects[name].stat()
        when = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "size": str(status.st_size),
            "generation": "1",
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "timeCreated": when,
            "updated": when,
        }


async def _answer(bucket: Bucket, request: Any) -> Any:
    from aiohttp import web

    path = request.raw_path.partition("?")[0]
    if path.startswith("/_/"):
        return web.json_response(_controlled(bucket, path[3:], await request.json()))
    entry: dict[str, Any] = {"start": time.monotonic(), "path": path, "bytes": 0}
    bucket.log.append(entry)
    await asyncio.sleep(bucket.delay)
    try:
        return await _served(bucket, request, path, entry)
    finally:
        entry["end"] = time.monotonic()


def _controlled(bucket: Bucket, what: str, body: Any) -> Any:
    if what == "mount":
        bucket.mount(body["prefix"], body["directory"])
    elif what == "reset":
        bucket.log.clear()
        bucket.delay, bucket.bandwidth = body["delay"], body["bandwidth"]
    return bucket.log if what == "log" else {}


async def _served(bucket: Bucket, request: Any, path: str, entry: dict[str, Any]) -> Any:
    from aiohttp import web

    if re.fullmatch(r"/storage/v1/b/[^/]+/o/?", path):
        return web.json_response(bucket.listed(request.query))
    found = re.fullmatch(r"/(?:download/)?storage/v1/b/[^/]+/o/([^/]+)", path)
    if found is None:
        return web.json_response({"name": BUCKET, "kind": "storage#bucket", "id": BUCKET})
    name = urllib.request.unquote(found[1])
    if name not in bucket.objects:
        return web.json_response({"error": {"code": 404, "message": "No such object"}}, status=404)
    if request.query.get("alt") != "media" and not path.startswith("/download"):
        return web.json_response(bucket.described(name))
    return await _sent(bucket, request, bucket.objects[name], entry)


async def _sent(bucket: Bucket, request: Any, file: pathlib.Path, entry: dict[str, Any]) -> Any:
    from aiohttp import web

    size = file.stat().st_size
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    first, last = 0, size
    if asked and asked[1]:
        first, last = int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size)
    elif asked:
        first = max(0, size - int(asked[2]))
    if asked and first >= size:
        return web.Response(status=416)
    headers = {"x-goog-generation": "1", "ETag": '"1"', "Accept-Ranges": "bytes"}
    if asked:
        headers["Content-Range"] = f"bytes {first}-{last - 1}/{size}"
    response = web.StreamResponse(status=206 if asked else 200, headers=headers)
    response.content_length = last - first
    await response.prepare(request)
    entry["bytes"] = last - first
    began, descriptor = time.monotonic(), os.open(file, os.O_RDONLY)
    try:
        for at in range(first, last, _STEP):
            await response.write(os.pread(descriptor, min(_STEP, last - at), at))
            ahead = (at + _STEP - first) / bucket.bandwidth - (time.monotonic() - began)
            if ahead > 0.005:
                await asyncio.sleep(ahead)
    finally:
        os.close(descriptor)
    await response.write_eof()
    return response


def serve(port: int) -> None:
    """Serves until the process is ended."""
    from aiohttp import web

    bucket = Bucket()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", lambda request: _answer(bucket, request))
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


class Served:
    """A bucket in a process of its own, for the time of a `with` block."""

    def __init__(self, mounts: Mapping[str, pathlib.Path]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self._mounts = mounts
        command = [sys.executable, "-m", "benchmarks.bucket", self.address.rpartition(":")[2]]
        self._process = subprocess.Popen(command, cwd=pathlib.Path(__file__).parents[1])

    @property
    def environment(self) -> dict[str, str]:
        """What leads TensorStore, gcsfs and Orbax to the bucket."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "STORAGE_EMULATOR_HOST": self.address,
            # Otherwise gcsfs asks another service for the kind of bucket.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "none",
            "NO_GCE_CHECK": "true",
        }

    def __enter__(self) -> "Served":
        for _ in range(200):
            try:
                for prefix, directory in self._mounts.items():
                    ask(self.address, "mount", {"prefix": prefix, "directory": str(directory)})
                return self
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("the bucket does not answer")

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()


def ask(address: str, what: str, body: Any = None) -> Any:
    """Controls a bucket: `mount`, `reset` or `log`."""
    request = urllib.request.Request(
        f"{address}/_/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def chain(log: Sequence[Mapping[str, Any]]) -> int:
    """Returns the most requests of which each began after the one before had ended: round trips in a row."""
    count, end = 0, 0.0
    for entry in _by_end(log):
        if entry["start"] >= end:
            count, end = count + 1, entry["end"]
    return count


def _by_end(log: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    yield from sorted((entry for entry in log if "end" in entry), key=lambda entry: entry["end"])


if __name__ == "__main__":
    serve(int(sys.argv[1]))
