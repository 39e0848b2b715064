"""What lies in S3-compatible stores, as values; importing them does not import boto3."""

import re
from typing import NamedTuple

from registry.files import Place, shown

ADDRESS = re.compile(r"s3://([a-zA-Z0-9][\w.-]{1,254})(?:/(.*))?", re.ASCII | re.DOTALL)
SMALLEST_PART = 5 * 2**20  # bytes of any part but the last, and the number of parts: S3's limits for uploads
MOST_PARTS = 10_000


class Object(NamedTuple):
    """One stored object, as it was when it was listed."""

    uri: str  # s3://bucket/key
    size: int  # bytes
    etag: str  # of this content, without quotes: what was listed cannot be exchanged unseen


class Upload(NamedTuple):
    """A multipart upload that nobody finished yet."""

    uri: str
    upload_id: str
    begun: float  # seconds since the epoch, the store's clock


class Span(NamedTuple):
    """One part of an object: the bytes from `begin` up to `end`."""

    number: int  # from 1 on
    begin: int
    end: int


class Address(NamedTuple):
    """The parts of s3://bucket/key; the key may be empty."""

    bucket: str
    key: str

    @classmethod
    def of(cls, uri: str) -> "Address":
        """Raises FoldinError E_PATH where `uri` names no bucket."""
        if match := ADDRESS.fullmatch(uri):
            return cls(match[1], match[2] or "")
        place = Place(shown(uri), "", "correct the address")
        raise place.refuse("E_PATH", "this is no address in S3", "s3://bucket/name")


def folder(uri: str) -> str:
    """The address with one slash at its end, so that what lies below a/b does not include a/bc."""
    return f"{uri.rstrip('/')}/"


def check_name(name: str, uri: str) -> None:
    """Raises FoldinError E_PATH where a name below a folder could lead out of it, or cannot be printed."""
    if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
        place = Place(shown(uri), "", "remove the object, or give it a plain name")
        raise place.refuse("E_PATH", "the object's name is no plain path", found=shown(name))


def bare(etag: str) -> str:
    """An etag without the quotes that some stores write around it, and others do not."""
    return etag.strip('"')


def spans(begin: int, end: int, part_bytes: int) -> list[Span]:
    """The bytes from `begin` up to `end` in parts of `part_bytes`; the last may be shorter."""
    starts = range(begin, end, part_bytes)
    return [Span(number, start, min(start + part_bytes, end)) for number, start in enumerate(starts, 1)]


def upload_spans(size: int, part_bytes: int) -> list[Span]:
    """`size` bytes in parts that S3 accepts: not below SMALLEST_PART, not more than MOST_PARTS."""
    return spans(0, size, max(part_bytes, SMALLEST_PART, -(-size // MOST_PARTS)))
