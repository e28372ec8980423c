"""A bucket that lies in a local directory and counts what it is asked."""

import math
import os

from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from orbax_nnx_handler.storage.stores.backends import LocalFiles
from orbax_nnx_handler.storage.stores.files import Files, List, Listing, ReadFile, Sizes

# What one request of a listing returns at most, of GCS as of S3.
PAGE = 1000


class FakeBucket:
    """Answers for URLs of one bucket; a call is one trip, and each question one request.

    As in a bucket, an empty directory is not there, and a listing comes page after page.
    """

    remote = True

    def __init__(self, directory, bucket="gs://bucket", forbidden=()):
        self.directory, self.bucket, self.forbidden = os.fspath(directory), bucket, forbidden
        self.trips, self.requests, self.asked, self.versions = 0, 0, [], {}

    def answer(self, questions):
        self.trips += 1
        self.requests += len(questions)
        self.asked += questions
        assert all(question.path.startswith(self.bucket) for question in questions)
        answers = [self._answer(question) for question in questions]
        further = [_pages(answer) - 1 for answer in answers]
        self.trips += max(further, default=0)
        self.requests += sum(further)
        return answers

    def _answer(self, question):
        if any(part in question.path for part in self.forbidden):
            return NotACheckpointError(f"{question.path} cannot be read: 403")
        local = question._replace(path=question.path.replace(self.bucket, self.directory))
        if isinstance(local, ReadFile):
            local = local._replace(below="")
        if isinstance(question, Sizes | List) or os.path.isfile(local.path):  # noqa: PTH113
            (answer,) = LocalFiles().answer([local])
            return None if isinstance(answer, Listing) and answer == Listing(kind="folder") else answer
        return None


def _pages(answer):
    names = answer.entries if isinstance(answer, Listing) else answer if isinstance(answer, dict) else ()
    return max(1, math.ceil(len(names) / PAGE))


def files_of(directory, **options):
    """Returns files that ask a fake bucket, and the bucket."""
    bucket = FakeBucket(directory, **options)
    return Files(bucket), bucket
