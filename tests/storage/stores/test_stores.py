"""Paths that are URLs, and what stores say when they hand nothing out."""

import collections
import http.server
import logging
import os
import threading
import time

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from flax import nnx

from orbax_nnx_handler import NotACheckpointError, RestoreError, plan_restore, save
from orbax_nnx_handler.storage.saving import atomic
from orbax_nnx_handler.storage.stores import backends
from orbax_nnx_handler.storage.stores.backends import RemoteFiles
from orbax_nnx_handler.storage.stores.files import FolderEntry, List, ReadFile, Sizes
from orbax_nnx_handler.storage.stores.locations import (
    absolute,
    as_path,
    cannot_read,
    kvstore_spec,
    parents_of,
)
from tests.storage.stores.fake_store import files_of


@pytest.mark.parametrize("url", ["gs://bucket/run/1", "s3://bucket/x"])
def test_a_url_stays_one(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert os.fspath(absolute(url)) == os.fspath(as_path(url)) == url
    assert [os.fspath(parent) for parent in parents_of(epath.Path("gs://bucket/run/1/x"))] == [
        "gs://bucket/run/1",
        "gs://bucket/run",
        "gs://bucket",
    ]


def test_other_paths_are_those_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert absolute("x") == epath.Path(tmp_path / "x")
    assert as_path("~/x") == epath.Path("~/x").expanduser()
    assert as_path(f"file://{tmp_path}/x") == epath.Path(tmp_path / "x")


@pytest.mark.parametrize("url", ["http://host/x", "az://container/x", "hf://x/y", "ftp://x"])
def test_a_scheme_that_nobody_reads_is_one_clear_error(url):
    with pytest.raises(NotACheckpointError) as raised:
        plan_restore(url, nnx.State({"w": nnx.Param(jnp.ones(2))}))

    scheme = url.partition("://")[0]
    assert str(raised.value) == (
        f"{url} is neither read nor written: {scheme}:// is not supported.\n"
        "hint: pass a path of this machine or a gs:// URL; s3:// can be read, too."
    )


@pytest.mark.parametrize("url", ["gs://", "gs:///run", "s3:///run"])
def test_a_url_without_a_bucket_is_said_to_name_none(url):
    with pytest.raises(NotACheckpointError, match="names no bucket"):
        as_path(url)


def test_an_object_that_nobody_knows_who_asks_for_is_a_missing_login():
    error = ValueError("PERMISSION_DENIED: Error reading x [http_response_code='401']")

    assert "hint: the store does not know who asks" in str(cannot_read("gs://bucket/run/x", error))


def test_the_endpoint_and_the_region_of_the_environment_are_handed_on(monkeypatch):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    place = {"driver": "s3", "bucket": "bucket", "path": "run/1/"}

    assert kvstore_spec(epath.Path("s3://bucket/run/1")) == place
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert kvstore_spec(epath.Path("s3://bucket/run/1")) == {**place, "aws_region": "eu-west-1"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert kvstore_spec(epath.Path("s3://bucket/run/1")) == {
        **place,
        "endpoint": "http://minio:9000",
        "aws_region": "eu-west-1",
    }


@pytest.mark.parametrize("key", ["50%25/a%2Fb", "a b", "größe/步", "a?b=c", "a#b", "a|b"])
@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_key_is_what_the_path_says_whatever_its_characters_mean_in_a_url(scheme, key):
    store = ts.KvStore.Spec(kvstore_spec(as_path(f"{scheme}://bucket/{key}/")))

    assert store.path == f"{key}/"
    assert ts.KvStore.Spec(kvstore_spec(as_path(f"{scheme}://bucket/"))).path == ""


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("s3://bucket/x", "Orbax writes to gs:// and to directories"),
        ("/run[1]/x", "a directory with '\\[' in its name"),
        ("/run\\1/x", "takes a backslash in a path for a separator"),
        ("gs:/bucket/x", "pass 'gs://bucket/x', as a string"),
        ("gs://bucket/x?y", "would write a part of it elsewhere for '\\?'"),
        ("gs://bucket/x#1", "would write a part of it elsewhere for '#'"),
        ("gs://bucket/x*", "would write a part of it elsewhere for '\\*'"),
        ("gs://bucket/x\ty", "would write a part of it elsewhere for '\\\\t'"),
        ("gs://bucket/x/../y", "would write a part of it elsewhere for '\\.\\.'"),
        ("gs://bucket", "it is a whole bucket.\nhint: name a folder in it: 'gs://bucket/NAME'"),
        ("gs://bucket/", "it is a whole bucket.\nhint: name a folder in it: 'gs://bucket/NAME'"),
    ],
)
def test_where_orbax_cannot_write_nothing_is_begun(path, said):
    with pytest.raises(RestoreError, match=said):
        save(path, nnx.State({"w": nnx.Param(jnp.ones(2))}))


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        ("injected, 401", "the store does not know who asks"),
        ("Forbidden: upload, 403", "the account in use needs storage.objects.create"),
        ("injected, 503", "the store did not answer"),
        (FileNotFoundError("gs://bucket/item"), "another process deletes or writes there"),
    ],
)
def test_a_store_that_refuses_a_save_is_one_error_that_says_what_lies_there(
    monkeypatch, tmp_path, status, hint
):
    class Refuses(ocp.Checkpointer):
        def save(self, *_, **__):
            raise HttpError(status) if isinstance(status, str) else status

    monkeypatch.setattr(atomic, "files_at", lambda _: files_of(tmp_path)[0])
    monkeypatch.setattr(ocp, "Checkpointer", Refuses)

    with pytest.raises(RestoreError, match=f"gs://bucket/item cannot be written: .*\nhint: {hint}") as error:
        save("gs://bucket/item", nnx.State({"w": nnx.Param(jnp.ones(2))}))

    assert "no finished save" in str(error.value)


class HttpError(Exception):
    """As the errors of gcsfs and botocore: of no family but Exception."""


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError("Forbidden: b/bucket/o"), "the account in use needs storage.objects.list"),
        (
            ValueError("PERMISSION_DENIED: Forbidden [http_response_code='403'] [source locations='x.cc:1']"),
            "the account",
        ),
        (
            HttpError("Anonymous caller does not have storage.objects.list access, 401"),
            "the store does not know who asks",
        ),
        (HttpError("Unable to locate credentials"), "the store does not know who asks"),
        (HttpError("injected, 503"), "the store did not answer"),
        (
            ValueError("ABORTED: All 6 retry attempts failed [http_response_code='503']"),
            "the store did not answer",
        ),
        (TimeoutError("no answer within 60 s"), "the store did not answer"),
        (ImportError("Please install gcsfs"), "pip install gcsfs"),
        (ValueError("Transferred a partial file: 4030 bytes missing"), "the store's answer is not whole"),
        (
            ValueError("OUT_OF_RANGE: byte range [0, 4010) was not satisfied"),
            "the store's answer is not whole",
        ),
        (
            ValueError("OUT_OF_RANGE: byte range [0, 502) was not satisfied by response of size 403"),
            "the store's answer is not whole",
        ),
        (HttpError("what nobody expects"), "check the URL"),
    ],
    ids=range(12),
)
def test_a_store_s_refusal_is_one_sentence_with_a_hint_that_fits(error, hint):
    message = str(cannot_read("gs://bucket/run/503/_METADATA", error))

    assert message.startswith("gs://bucket/run/503/_METADATA cannot be read: ")
    assert f"\nhint: {hint}" in message
    assert "source locations" not in message
    assert "copy it again" not in message


@pytest.mark.parametrize(
    "error", [RecursionError("maximum recursion depth"), HttpError("PermanentRedirect: 301")]
)
def test_a_bucket_of_another_region_is_told_by_its_redirects(error):
    assert "\nhint: the bucket may be of another region, or store: set AWS_REGION" in str(
        cannot_read("s3://bucket/x", error)
    )


def test_a_reason_whose_first_line_only_announces_it_is_said_whole():
    error = HttpError("Parameter validation failed:\nInvalid bucket name 'a:80'")

    assert "failed: Invalid bucket name 'a:80'.\n" in str(cannot_read("s3://a:80/x", error))


def test_a_step_called_403_is_no_refusal():
    error = HttpError("cannot parse the answer for bucket/run/403/x")

    assert "the account in use" not in str(cannot_read("gs://bucket/run/403/x", error))


class Silent:
    """An answer that never comes."""

    cancelled = False

    def result(self, **_):
        raise TimeoutError

    def cancel(self):
        self.cancelled = True


def test_a_store_that_never_answers_is_given_up_with_words_on_the_way(monkeypatch, caplog):
    monkeypatch.setattr(backends, "TIME_LIMIT_S", 0.0)
    monkeypatch.setattr(backends, "_SAY_SO_AFTER_S", -1.0)
    silent, files = Silent(), RemoteFiles("gs://bucket/x")
    clock = iter([0.0, -2.0, -1.5, 5.0])
    monkeypatch.setattr(backends.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(RemoteFiles, "_start", lambda *_: silent)

    with caplog.at_level(logging.WARNING):
        (answer,) = files.answer([ReadFile("gs://bucket/x/_METADATA")])

    assert isinstance(answer, NotACheckpointError)
    assert str(answer).startswith("gs://bucket/x/_METADATA cannot be read: TimeoutError: no answer within")
    assert "still waiting for gs://bucket/x/_METADATA" in caplog.text
    assert silent.cancelled


@pytest.fixture
def busy(monkeypatch):
    """A store on this machine that refuses the first requests of each object and asks to come back later."""

    class Busy(http.server.BaseHTTPRequestHandler):
        status, refusals, asked = 429, 0, collections.Counter()

        def do_GET(self):
            self.asked[self.path] += 1
            refused = self.asked[self.path] <= self.refusals
            self.send_response(self.status if refused else 200)
            if refused:
                self.send_header("Retry-After", "600")
            self.send_header("ETag", '"1"')
            content = b"SlowDown" if refused else b"content"
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "1")
    retries = {"max_retries": 3, "initial_delay": "10ms", "max_delay": "20ms"}
    monkeypatch.setattr(backends, "CONTEXT_SPEC", {"s3_request_retries": retries})
    yield Busy
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("refusals", "requests"), [(0, 1), (2, 3), (10**6, 4)])
def test_a_store_that_is_busy_is_asked_a_bounded_number_of_times(busy, status, refusals, requests):
    busy.status, busy.refusals = status, refusals
    began = time.monotonic()

    answers = RemoteFiles("s3://bucket/x").answer([ReadFile(f"s3://bucket/x/{name}") for name in ("a", "b")])

    assert busy.asked == {"/bucket/x/a": requests, "/bucket/x/b": requests}
    assert time.monotonic() - began < 60
    if refusals < 3:
        assert answers == [b"content", b"content"]
        return
    for answer, name in zip(answers, ("a", "b"), strict=True):
        assert isinstance(answer, NotACheckpointError)
        assert str(answer).startswith(f"s3://bucket/x/{name} cannot be read: ")
        assert f"(HTTP {status})" in str(answer)
        assert "hint: the store did not answer, several retries included" in str(answer)


class Filesystem:
    """A listing as fsspec gives it, from a cache that is never refreshed."""

    def __init__(self):
        self.names, self.cached = ["1"], None
        self.loop = None

    def invalidate_cache(self):
        self.cached = None

    def _ls(self, _, **__):
        self.cached = self.cached or [
            {"name": f"bucket/run/{name}", "type": "directory"} for name in self.names
        ]
        return self.cached


def run_of(content, version):
    return Done(ts.KvStore.ReadResult("value", content, ts.KvStore.TimestampedStorageGeneration(version)))


def test_runs_of_two_versions_of_one_object_are_an_error(monkeypatch):
    answers = {0: (b"old", b"1"), 3: (b"new", b"2")}
    monkeypatch.setattr(RemoteFiles, "_start", lambda _, asked: run_of(*answers[asked.start]))
    files = RemoteFiles("gs://bucket/x")

    first, second = files.answer([ReadFile("gs://bucket/x", 0, 3), ReadFile("gs://bucket/x", 3, 3)])

    assert first == b"old"
    assert str(second) == (
        "gs://bucket/x was written to while it was read.\n"
        "hint: restore again once nothing is written there, or restore another step."
    )
    assert files.versions == {"gs://bucket/x": b"1"}


def test_runs_that_come_one_after_the_other_are_waited_for(monkeypatch):
    clock = [0.0]

    class Slow(Done):
        def result(self, timeout):
            clock[0] += 50
            assert timeout > 0, "given up before"
            return self.value

    monkeypatch.setattr(backends.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(RemoteFiles, "_start", lambda *_: Slow(run_of(b"x", b"1").value))

    assert (
        RemoteFiles("gs://bucket/x").answer([ReadFile("gs://bucket/x", at, 1) for at in range(9)])
        == [b"x"] * 9
    )


class Done:
    def __init__(self, value):
        self.value = value

    def result(self, **_):
        return self.value

    def cancel(self):
        pass


def test_an_empty_object_that_marks_a_folder_is_no_file(monkeypatch):
    infos = [
        {"name": "bucket/run/", "type": "file", "size": 0},
        {"name": "bucket/run/1", "type": "directory", "size": 0},
        {"name": "bucket/run/_METADATA", "type": "file", "size": 7},
    ]
    found = {"bucket/run/d/": infos[0], "bucket/run/d/x": {"type": "file", "size": 5}}
    filesystem = Filesystem()
    monkeypatch.setattr(filesystem, "_ls", lambda *_, **__: infos)
    monkeypatch.setattr(filesystem, "_find", lambda *_, **__: found, raising=False)
    monkeypatch.setattr(RemoteFiles, "_files", lambda _: filesystem)
    monkeypatch.setattr(backends.asyncio, "run_coroutine_threadsafe", lambda asked, _: Done(asked))

    listing, sizes = RemoteFiles("gs://bucket/run").answer(
        [List("gs://bucket/run"), Sizes("gs://bucket/run", "d/")]
    )

    assert listing.kind == "folder"
    assert listing.entries == {"1": FolderEntry("folder"), "_METADATA": FolderEntry("file", 7)}
    assert sizes == {"d/x": 5}


def test_a_step_that_was_written_since_is_seen(monkeypatch):
    filesystem = Filesystem()
    monkeypatch.setattr(RemoteFiles, "_files", lambda _: filesystem)
    monkeypatch.setattr(backends.asyncio, "run_coroutine_threadsafe", lambda asked, _: Done(asked))

    def steps():
        (answer,) = RemoteFiles("gs://bucket/run").answer([List("gs://bucket/run")])
        return list(answer.entries)

    assert steps() == ["1"]
    filesystem.names.append("2")
    assert steps() == ["1", "2"]


def test_an_interrupt_does_not_reach_the_import_of_a_stores_library(monkeypatch):
    monkeypatch.setattr(backends, "file_system", lambda _: threading.current_thread())

    assert RemoteFiles("gs://bucket/run")._files() is not threading.current_thread()


@pytest.mark.parametrize(
    "words",
    [
        'Connection was closed before we received a valid response: "http://store/exp-401?list-type=2"',
        "Unterminated string starting at: line 1 column 403 (char 401)",
        "cannot list exp-401",
    ],
)
def test_a_number_in_a_url_a_name_or_a_position_is_no_status(words):
    message = str(cannot_read("s3://exp-401/x", OSError(words)))

    assert "who asks" not in message
    assert "the account in use" not in message


def test_what_lists_a_bucket_and_what_reads_it_ask_the_same_store(monkeypatch, tmp_path):
    monkeypatch.delenv("TENSORSTORE_GCS_HTTP_URL", raising=False)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:4443")
    (answer,) = RemoteFiles("gs://bucket/x").answer([ReadFile("gs://bucket/x/_METADATA")])
    assert "would be listed in one store and read from another" in str(answer)
    assert str(answer).endswith("hint: export TENSORSTORE_GCS_HTTP_URL=http://localhost:4443")

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "default")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    (answer,) = RemoteFiles("gs://bucket/x").answer([ReadFile("gs://bucket/x/_METADATA")])
    assert f"GOOGLE_APPLICATION_CREDENTIALS is the directory {tmp_path}" in str(answer)

    settings = "region = north\ns3 =\n  max_queue_size = 9\nendpoint_url = http://localhost:1\n"
    services = "[profile lab]\nservices = s\n[services s]\ns3 =\n  endpoint_url = http://localhost:3\n"
    (tmp_path / "config").write_text(f"[default]\n{settings}[profile far]\nregion = south\n{services}")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    spec = kvstore_spec(epath.Path("s3://bucket/x"))
    assert (spec["endpoint"], spec["aws_region"]) == ("http://localhost:1", "north")
    monkeypatch.setenv("AWS_DEFAULT_PROFILE", "lab")
    assert kvstore_spec(epath.Path("s3://bucket/x"))["endpoint"] == "http://localhost:3"
    monkeypatch.delenv("AWS_DEFAULT_PROFILE")
    monkeypatch.setenv("AWS_PROFILE", "far")
    assert kvstore_spec(epath.Path("s3://bucket/x"))["aws_region"] == "south"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:2")
    assert kvstore_spec(epath.Path("s3://bucket/x"))["endpoint"] == "http://localhost:2"


def test_a_file_of_credentials_that_is_not_there_is_no_absent_checkpoint(monkeypatch):
    class Lost(Done):
        def result(self, **_):
            raise FileNotFoundError(2, "No such file or directory", "/secrets/token")

    monkeypatch.setattr(RemoteFiles, "_start", lambda *_: Lost(None))

    (answer,) = RemoteFiles("s3://bucket/x").answer([List("s3://bucket/x")])

    assert "No such file or directory: '/secrets/token'" in str(answer)
    assert "hint: that file of this machine, which the store's settings name, cannot be read" in str(answer)
