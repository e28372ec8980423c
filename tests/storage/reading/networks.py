"""A store as if behind a network: counts requests, and how often they wait for each other."""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import threading
import time

from orbax_nnx_handler.storage.reading import fetch
from orbax_nnx_handler.storage.reading.base_store import RemoteData

# No new request for so long: whoever asks waits for answers.
QUIET_SECONDS = 0.03
# Whoever computes for longer meanwhile, may still ask.
BUSY_SECONDS = 0.005


@dataclasses.dataclass
class Stamp:
    """As TensorStore's `TimestampedStorageGeneration`."""

    generation: bytes


@dataclasses.dataclass
class Result:
    """As TensorStore's `ReadResult`."""

    state: str
    value: bytes
    error: OSError | None = None
    stamp: Stamp = dataclasses.field(default_factory=lambda: Stamp(b"1"))


class Answer(concurrent.futures.Future):
    """As TensorStore's `Future`."""


class CountingStore:
    """Answers all requests of a trip together, once no more come."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.asked: list[tuple[str, int, int]] = []
        self.trips = 0
        self.silent = False
        self.most_requests = self.most_bytes = 0
        self.change = lambda _key, _start, content: content
        self.version = lambda _key, _start: b"1"
        self._waiting: list[tuple[Answer, Result]] = []
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._answer)

    def read(self, key, *, byte_range=None):
        file = self.directory / key
        content = file.read_bytes() if file.is_file() else None
        start = byte_range.start if byte_range is not None else 0
        result = Result("missing", b"")
        if content is not None:
            piece = content[start : byte_range.stop] if byte_range is not None else content
            try:
                changed = self.change(key, start, piece)
            except OSError as error:
                result.error = error
            else:
                stamp = Stamp(self.version(key, start))
                result = Result("value", changed, stamp=stamp) if changed is not None else result
        answer = Answer()
        with self._changed:
            self.asked.append((key, start, len(result.value)))
            self._waiting.append((answer, result))
            self._changed.notify_all()
        return answer

    @property
    def nbytes(self):
        return sum(size for _, _, size in self.asked)

    def _is_asked_more(self) -> bool:
        """Waits for a request; tells whether one came, or may still come: not every machine is fast."""
        before = time.process_time()
        return self._changed.wait(QUIET_SECONDS) or time.process_time() - before > BUSY_SECONDS

    def _answer(self) -> None:
        while self._open:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                while self._is_asked_more():
                    pass
                answered, self._waiting = ([] if self.silent else self._waiting), []
            if answered:
                self.trips += 1
                self.most_requests = max(self.most_requests, len(answered))
                self.most_bytes = max(self.most_bytes, sum(len(result.value) for _, result in answered))
            for answer, result in answered:
                if result.error is not None:
                    answer.set_exception(result.error)
                else:
                    answer.set_result(result)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._open = False
        with self._changed:
            self._changed.notify_all()
        self._thread.join()


@contextlib.contextmanager
def behind_a_network(monkeypatch, directory):
    """Has the readers find a directory's files behind a network."""
    with CountingStore(pathlib.Path(directory)) as store:
        monkeypatch.setattr(fetch, "open_data", lambda _: RemoteData(store))
        yield store
