"""Objects written in parts, whole or not at all: whatever ends it, no upload stays open and no thread goes on."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from threading import Event
from typing import TypeVar

from registry.records import FoldinError
from registry.s3 import Answer, Endpoint, Halted
from registry.stored import Address, Span, Upload, bare

Item = TypeVar("Item")
Result = TypeVar("Result")
THREADS = "foldin-s3"
PATIENCE = 2  # times the usual tries, for what cleans up
SLACK = 2.0  # seconds by which a store may round when an upload began


def in_order(work: Callable[[Item], Result], items: Iterable[Item], ahead: int, stop: Event) -> Iterator[Result]:
    """What `work` returns for each item, in order; at most `ahead` of them are worked on, or wait, at a time.

    The first failure, of whichever item, ends it. When it ends, so have its threads, and `stop` is set unless it ended
    well. (A thread that Ctrl-C hits while it starts is not waited for: it sees `stop` and ends by itself.)
    """
    waiting: deque[Future[Result]] = deque()
    failures: list[BaseException] = []

    def watched(item: Item) -> Result:
        try:
            return work(item)
        except BaseException as error:
            failures.append(error)
            stop.set()
            raise

    pool = ThreadPoolExecutor(ahead, THREADS)
    try:
        for item in items:
            if len(waiting) == ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(watched, item))
        while waiting:
            yield waiting.popleft().result()
    except Halted:  # because another item failed
        raise failures[0]  # noqa: B904 -- that one has a cause of its own
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def uninterrupted(work: Callable[[Event], Result]) -> Result:
    """What `work` returns; once its event is set, it is to clean up and raise.

    Ctrl-C reaches the main thread only. That one sets the event and waits, so that no request is cut in half and no
    cleaning up is cut short.
    """
    stop, begun, over = Event(), Event(), Event()

    def run() -> Result:
        begun.set()
        try:
            return work(stop)
        finally:
            over.set()

    pool = ThreadPoolExecutor(1, THREADS)
    try:
        return pool.submit(run).result()
    except BaseException:
        stop.set()
        if begun.is_set():  # the pool does not know a thread whose start was interrupted
            over.wait()
        raise
    finally:
        pool.shutdown()


def write_in_parts(
    endpoint: Endpoint,
    uri: str,
    parts: Sequence[Span],
    send: Callable[[str, Event, Span], Answer],  # upload id, when to stop, what -> the part, as S3 wants it listed
    opening: Mapping[str, object],  # what CreateMultipartUpload takes
    ahead: int,
) -> str:
    """The etag of the object made of `parts`; "" where S3 forgot the upload before it was asked again to finish it.

    Raises:
        FoldinError: as `Endpoint.ask`, or from `send`.
    """
    return uninterrupted(partial(_write, endpoint, uri, parts, send, opening, ahead))


def _write(
    endpoint: Endpoint,
    uri: str,
    parts: Sequence[Span],
    send: Callable[[str, Event, Span], Answer],
    opening: Mapping[str, object],
    ahead: int,
    stop: Event,
) -> str:
    begun, upload_id, doubtful = time.monotonic(), "", True
    try:
        answer = endpoint.ask("CreateMultipartUpload", uri, opening, needs=("UploadId",), stop=stop)
        upload_id, doubtful = answer["UploadId"], answer["ResponseMetadata"]["RetryAttempts"] > 0
        sent = list(in_order(partial(send, upload_id, stop), parts, ahead, stop))
        whole = {"UploadId": upload_id, "MultipartUpload": {"Parts": sent}}
        refusals = ("NoSuchUpload",)  # finished already, and the answer was lost
        answer = endpoint.ask("CompleteMultipartUpload", uri, whole, needs=("ETag",), refusals=refusals, stop=stop)
        upload_id = ""
        return bare(answer.get("ETag", ""))
    finally:
        # What cannot be aborted now is found later by its age; the error that brought us here says more.
        with suppress(FoldinError):
            if upload_id:
                abort(endpoint, Upload(uri, upload_id, 0.0))
        with suppress(FoldinError):
            if doubtful:
                _abort_unknown(endpoint, uri, time.monotonic() - begun)


def _abort_unknown(endpoint: Endpoint, uri: str, seconds: float) -> None:
    """Abort what a request opened whose answer was lost: at this key, within these last seconds, without a part."""
    uploads, now = open_uploads(endpoint, uri, PATIENCE)
    for upload in uploads:
        if upload.uri == uri and upload.begun >= now - seconds - SLACK:
            request = {"UploadId": upload.upload_id, "MaxParts": 1}
            listed = endpoint.ask("ListParts", uri, request, refusals=("NoSuchUpload",), patience=PATIENCE)
            if listed and not listed.get("Parts"):
                abort(endpoint, upload)


def abort(endpoint: Endpoint, upload: Upload) -> None:
    """End an upload and free what it holds; one that is over already is well. Raises FoldinError E_S3."""
    refusals = ("NoSuchUpload", "404")
    request = {"UploadId": upload.upload_id}
    endpoint.ask("AbortMultipartUpload", upload.uri, request, refusals=refusals, patience=PATIENCE)


def open_uploads(endpoint: Endpoint, prefix_uri: str, patience: int = 1) -> tuple[list[Upload], float]:
    """The uploads under keys that begin so, and the time on the store's clock. Raises FoldinError E_S3, E_SOURCE."""
    bucket, _ = Address.of(prefix_uri)
    markers = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
    uploads, now = [], 0.0
    for answer in endpoint.pages("ListMultipartUploads", prefix_uri, markers, patience):
        for each in answer.get("Uploads", ()):
            uploads.append(Upload(f"s3://{bucket}/{each['Key']}", each["UploadId"], each["Initiated"].timestamp()))
        now = _clock(answer)
    return uploads, now


def _clock(answer: Answer) -> float:
    said = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    return parsedate_to_datetime(said).timestamp() if said else time.time()
