"""Objects in S3-compatible stores: lists, ranged reads, transfers that are whole or absent, create-only writes.

Import it where it is used: boto3 takes a quarter of a second.
"""

import base64
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from registry import multipart
from registry.files import Place, open_regular, replacing, shown
from registry.multipart import in_order, write_in_parts
from registry.s3 import Answer, Endpoint
from registry.stored import Address, Object, Span, Upload, bare, check_name, folder, spans, upload_spans

__all__ = ("Object", "Objects", "Upload")

MARK = "foldin-upload"  # metadata that tells an upload's object from every other one's, whatever the store's etags are
COPY_LIMIT = 5 * 2**30  # bytes that S3 copies in one request
COPY_PART = 2**29
MISSING = ("404", "NotFound", "NoSuchKey")
OWNED = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")
EXISTS = ("412", "PreconditionFailed")


class Objects:
    """The verbs on stored objects. Cheap to make, safe to use from several threads; a forked child needs its own.

    Every verb may raise FoldinError: E_S3 where the store cannot be reached or refuses, E_SOURCE where there is no such
    bucket or object, E_PATH where an address is malformed; what else it raises, it says.
    """

    def __init__(
        self,
        endpoint: str = "",  # "" for what AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL say, else Amazon's own
        *,
        parts: int = 8,  # transferred at a time by one call; it holds one more in memory at most
        part_bytes: int = 16 * 2**20,  # what is longer goes in parts of this size
        tries: int = 5,  # requests made at most for one answer
        timeout: float = 30.0,  # seconds of silence after which a connection is dead
        pause: Callable[[threading.Event, float], object] = threading.Event.wait,  # until the event, or for seconds
    ) -> None:
        """Asks nothing yet. Raises FoldinError E_CONFIG where `endpoint` is no plain URL."""
        self._parts, self._part_bytes = parts, part_bytes
        self._endpoint = Endpoint(endpoint, tries=tries, timeout=timeout, connections=4 * parts, pause=pause)

    def below(self, prefix_uri: str) -> dict[str, Object]:
        """Name below the prefix -> object, sorted; {} where there is none. Markers of empty folders are left out.

        Raises:
            FoldinError: E_PATH where a name could lead out of the folder it is written to.
        """
        bucket, prefix = Address.of(folder(prefix_uri))
        markers = {"NextContinuationToken": "ContinuationToken"}
        found = {}
        for answer in self._endpoint.pages("ListObjectsV2", folder(prefix_uri), markers):
            for each in answer.get("Contents", ()):
                name, uri = each["Key"].removeprefix(prefix), f"s3://{bucket}/{each['Key']}"
                if name and not name.endswith("/"):
                    check_name(name, uri)
                    found[name] = Object(uri, each["Size"], bare(each["ETag"]))
        return dict(sorted(found.items()))

    def head(self, uri: str) -> Object | None:
        """The object at an address as it is now; None when there is none."""
        answer = self._head(uri)
        return Object(uri, answer["ContentLength"], bare(answer["ETag"])) if answer else None

    def read(self, found: Object, begin: int, end: int) -> bytearray:
        """The bytes from `begin` up to `end` of exactly this object, its parts in parallel when they are many.

        Length and identity are promised, content is not: S3 sends no checksum with a part of an object, so a bit that
        flips on the way arrives flipped. Compare a SHA-256 of your own.

        Raises:
            FoldinError: E_DIGEST where the object was exchanged since it was listed, or comes too short or too long.
        """
        if not 0 <= begin <= end <= found.size:
            raise ValueError(f"bytes {begin} to {end} of an object of {found.size}")
        body, stop = bytearray(end - begin), threading.Event()
        view = memoryview(body)

        def fetch(span: Span) -> None:
            self._endpoint.fetch(found, span.begin, view[span.begin - begin : span.end - begin], stop)

        asked = spans(begin, end, self._part_bytes)
        if len(asked) == 1:
            fetch(asked[0])
        elif asked:
            list(in_order(fetch, asked, self._parts, stop))
        return body

    def stream(self, found: Object) -> Iterator[bytearray]:
        """The whole object in order, in pieces of at most `part_bytes`, a few fetched ahead; promises as `read`."""
        stop = threading.Event()

        def fetch(span: Span) -> bytearray:
            piece = bytearray(span.end - span.begin)
            self._endpoint.fetch(found, span.begin, memoryview(piece), stop)
            return piece

        yield from in_order(fetch, spans(0, found.size, self._part_bytes), self._parts, stop)

    def download(self, found: Object, path: Path) -> str:
        """The SHA-256 of what arrived under `path`, which is there whole or, after an error, not at all.

        Raises:
            FoldinError: as `read`; E_DISK.
        """
        digest = hashlib.sha256()
        with replacing(path) as file:
            for piece in self.stream(found):
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest()

    def upload(self, path: Path, uri: str) -> Object:
        """The object that a regular file became; each part carried its checksum, and an upload that fails is aborted.

        Raises:
            FoldinError: E_DIGEST where something else lies at `uri` afterwards, or the file changed meanwhile; or as
                `files.open_regular`.
        """
        mark = secrets.token_hex(16)
        marked = {"Metadata": {MARK: mark}}
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            parts = upload_spans(size, self._part_bytes)
            if len(parts) <= 1:
                etag = self._put(uri, _content(file.fileno(), Span(1, 0, size), path), marked)
            else:
                etag = self._put_parts(uri, file.fileno(), path, parts, marked)
        return self._proven(uri, size, etag, mark)

    def create(self, uri: str, content: bytes) -> None:
        """Put `content` where nothing is yet; done, too, where the same content is there already.

        Raises:
            FoldinError: E_EXISTS where other content is there.
        """
        if self._put(uri, content, {"IfNoneMatch": "*"}, EXISTS):
            return
        there = self.head(uri)
        if there is None or there.size != len(content) or self.read(there, 0, there.size) != content:
            place = Place(shown(uri), "", "run again; what is there was made by another run, and stays")
            raise place.refuse("E_EXISTS", "other content is there already")

    def copy(self, found: Object, uri: str) -> Object:
        """The copy that the store made of exactly this object; its bytes do not come here.

        Raises:
            FoldinError: E_DIGEST where the object was exchanged since it was listed, or the copy afterwards.
        """
        bucket, key = Address.of(found.uri)
        source = {"CopySource": {"Bucket": bucket, "Key": key}, "CopySourceIfMatch": f'"{found.etag}"'}
        if found.size <= COPY_LIMIT:
            answer = self._endpoint.ask("CopyObject", uri, source, needs=("CopyObjectResult",), about=found.uri)
            return self._proven(uri, found.size, bare(answer["CopyObjectResult"]["ETag"]), "")

        def send(upload_id: str, stop: threading.Event, span: Span) -> Answer:
            part = {"PartNumber": span.number, "CopySourceRange": f"bytes={span.begin}-{span.end - 1}"}
            request = {"UploadId": upload_id, **part, **source}
            needs = ("CopyPartResult",)
            answer = self._endpoint.ask("UploadPartCopy", uri, request, needs=needs, stop=stop, about=found.uri)
            kept = {name: value for name, value in answer["CopyPartResult"].items() if name != "LastModified"}
            return {"PartNumber": span.number, **kept}

        mark = secrets.token_hex(16)
        parts = upload_spans(found.size, COPY_PART)
        etag = write_in_parts(self._endpoint, uri, parts, send, {"Metadata": {MARK: mark}}, self._parts)
        return self._proven(uri, found.size, etag, mark)

    def unfinished(self, prefix_uri: str) -> list[Upload]:
        """The multipart uploads below a prefix that nobody finished or aborted; living writers' are among them."""
        return multipart.open_uploads(self._endpoint, folder(prefix_uri))[0]

    def abort(self, upload: Upload) -> None:
        """End an upload and free what it holds; one that is over already is well."""
        multipart.abort(self._endpoint, upload)

    def remove(self, uri: str) -> None:
        """Remove an object; one that is gone already is well. A versioned bucket keeps its old versions."""
        self._endpoint.ask("DeleteObject", uri, refusals=MISSING)

    def make_bucket(self, uri: str) -> None:
        """Make the bucket of an address; one that is there is well."""
        self._endpoint.ask("CreateBucket", uri, refusals=OWNED)

    def probe(self, prefix_uri: str) -> None:
        """See that the store keeps the promise that `create` rests on, with a scratch object that is removed again.

        Raises:
            FoldinError: E_S3 where a create-only write replaces what is there.
        """
        uri = f"{folder(prefix_uri)}.foldin-probe-{secrets.token_hex(8)}"
        try:
            self._put(uri, b"first", {"IfNoneMatch": "*"}, EXISTS)
            if self._put(uri, b"second", {"IfNoneMatch": "*"}, EXISTS):
                place = Place(shown(prefix_uri), "", "use a store that knows conditional writes (docs/s3.md)")
                raise place.refuse("E_S3", "the store ignores If-None-Match", "412 Precondition Failed", "200 OK")
        finally:
            self.remove(uri)

    def _head(self, uri: str) -> Answer:
        return self._endpoint.ask("HeadObject", uri, needs=("ContentLength", "ETag"), refusals=MISSING)

    def _put(self, uri: str, content: bytes, request: Mapping[str, object], refusals: tuple[str, ...] = ()) -> str:
        """The etag of what was put; "" where it was refused in one of the expected ways."""
        whole = {"Body": content, "ChecksumSHA256": _checksum(content), **request}
        return bare(self._endpoint.ask("PutObject", uri, whole, needs=("ETag",), refusals=refusals).get("ETag", ""))

    def _put_parts(self, uri: str, descriptor: int, path: Path, parts: list[Span], marked: Mapping[str, object]) -> str:
        def send(upload_id: str, stop: threading.Event, span: Span) -> Answer:
            content = _content(descriptor, span, path)
            part = {"PartNumber": span.number, "ChecksumSHA256": _checksum(content)}
            request = {"UploadId": upload_id, "Body": content, **part}
            answer = self._endpoint.ask("UploadPart", uri, request, needs=("ETag",), stop=stop)
            return {"ETag": answer["ETag"], **part}

        opening = {"ChecksumAlgorithm": "SHA256", **marked}
        return write_in_parts(self._endpoint, uri, parts, send, opening, self._parts)

    def _proven(self, uri: str, size: int, etag: str, mark: str) -> Object:
        """What lies at `uri`, of the right size, and with the etag of this write or its mark."""
        answer = self._head(uri)
        found = Object(uri, answer["ContentLength"], bare(answer["ETag"])) if answer else None
        ours = found and (found.etag == etag or (mark and answer.get("Metadata", {}).get(MARK) == mark))
        if found is None or found.size != size or not ours:
            place = Place(shown(uri), "", "see who else writes there, then run again")
            other = f"{found.size} bytes, etag {shown(found.etag)}" if found else "nothing"
            raise place.refuse("E_DIGEST", "what was written is not there", f"{size} bytes, etag {shown(etag)}", other)
        return found


def _checksum(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def _content(descriptor: int, span: Span, path: Path) -> bytes:
    content = os.pread(descriptor, span.end - span.begin, span.begin)
    if len(content) != span.end - span.begin:
        place = Place(str(path.parent), shown(path.name), "run again once nobody writes the file")
        raise place.refuse("E_DIGEST", "the file became shorter while it was uploaded")
    return content
