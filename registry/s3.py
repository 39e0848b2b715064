"""One request to an S3-compatible store: when it is made again, what a refusal means. Only this file knows boto3."""

import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from io import RawIOBase
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore import exceptions, xform_name
from botocore.config import Config
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from registry.files import NOTHING, Place, shown
from registry.records import FoldinError
from registry.stored import Address, Object, bare

Answer = dict[str, Any]  # the fields of S3's answer by the names of its reference
SHORTEST, LONGEST = 0.5, 5.0  # seconds; the upper limit of a pause doubles from the one to the other
PIECE = 2**18  # bytes taken from a connection at once

# 4xx answers that say nothing against the request: it came too slowly, or damaged, or while somebody else wrote.
PASSING = frozenset(
    {
        *("RequestTimeout", "ConditionalRequestConflict", "OperationAborted", "SlowDown", "TooManyRequests", "429"),
        *("BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),
    }
)
FAILURES = (exceptions.ClientError, exceptions.BotoCoreError, ResponseParserError, HTTPError)
BROKEN = (
    *(exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError),
    *(exceptions.FlexibleChecksumError, ResponseParserError, HTTPError),
)

GONE = ("E_SOURCE", "there is no such object", "correct the address, or put the object there")
BUCKET = ("E_SOURCE", "there is no such bucket", "correct the address, or create the bucket")
EXCHANGED = ("E_DIGEST", "the object is no longer the one that was listed", "find out who writes there, then run again")
TORN = ("E_DIGEST", "the answer is shorter or longer than promised", "run again; if it recurs, ask who runs the store")
FORBIDDEN = ("E_S3", "the store does not allow it", "give these credentials the permissions of docs/s3.md")
UNKNOWN = ("E_S3", "the store cannot be used", "check the endpoint, the region and the credentials, then run again")
MEANINGS = {  # by S3's code; HEAD is answered with a bare status
    **{"NoSuchBucket": BUCKET, "NoSuchKey": GONE, "404": GONE, "AccessDenied": FORBIDDEN, "403": FORBIDDEN},
    **dict.fromkeys(("PreconditionFailed", "412", "InvalidRange", "416"), EXCHANGED),
    **dict.fromkeys(("Torn", "IncompleteReadError", "FlexibleChecksumError"), TORN),
}


class Torn(Exception):
    """An answer that lacks a field, or whose body has another length than asked for."""


class Halted(Exception):
    """Nobody waits any more for what this thread does."""


class Endpoint:
    """A store, and how patiently it is asked. Several threads may share one; a forked child needs its own."""

    def __init__(
        self,
        url: str = "",  # "" for what AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL say, else Amazon's own
        *,
        tries: int = 5,  # requests made at most for one answer
        timeout: float = 30.0,  # seconds of silence after which a connection is dead
        connections: int = 10,  # kept open
        pause: Callable[[threading.Event, float], object] = threading.Event.wait,  # until the event, or for seconds
    ) -> None:
        """Asks nothing yet. Raises FoldinError E_CONFIG where `url` is no plain URL."""
        parts = urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in url or parts.query):
            place = Place("the store's endpoint", "", "give credentials by AWS_* variables or a profile")
            raise place.refuse("E_CONFIG", "this is no plain URL", "https://HOST[:PORT]")
        self._url, self._tries, self._pause = url or None, tries, pause
        self._config = Config(
            connect_timeout=min(timeout, 10.0),
            read_timeout=timeout,
            max_pool_connections=connections,
            retries={"total_max_attempts": 1},  # else botocore's tries would multiply with ours, which cover bodies too
        )
        self._opening = threading.Lock()
        self._client: Any = None
        self._secrets: tuple[str, ...] = ()

    def ask(
        self,
        verb: str,  # as in S3's reference: "HeadObject"
        uri: str,
        request: Mapping[str, object] = NOTHING,  # what it takes beside Bucket and Key
        *,
        needs: Collection[str] = (),  # fields without which an answer counts as torn
        refusals: Collection[str] = (),  # codes of S3 for which {} comes back
        stop: threading.Event | None = None,
        patience: int = 1,  # times as many tries as usual
        about: str = "",  # what messages are to name, `uri` by default
    ) -> Answer:
        """S3's answer; RetryAttempts in its ResponseMetadata says how many requests before it failed.

        Raises:
            FoldinError: E_S3, E_SOURCE; E_DIGEST where a condition on what is stored does not hold.
            Halted: `stop` is set.
        """

        def attempt() -> Answer:
            answer = self._request(verb, uri, request)
            if lacking := [name for name in needs if name not in answer]:
                raise Torn(f"an answer without {' and '.join(lacking)}")
            return answer

        return self._patiently(verb, about or uri, attempt, refusals, stop or threading.Event(), self._tries * patience)

    def pages(
        self,
        verb: str,
        prefix_uri: str,
        markers: Mapping[str, str],  # field of an answer -> field of the next request
        patience: int = 1,
    ) -> Iterator[Answer]:
        """The pages of a list of what begins with an address; raises as `ask`."""
        bucket, prefix = Address.of(prefix_uri)
        marker: dict[str, object] = {}
        while True:
            request = {"Prefix": prefix, **marker}
            answer = self.ask(verb, f"s3://{bucket}", request, needs=("IsTruncated",), patience=patience)
            yield answer
            if not answer["IsTruncated"]:
                return
            following = {asked: answer.get(told) for told, asked in markers.items()}
            if following == marker or None in following.values():
                raise Place(shown(prefix_uri), "", UNKNOWN[2]).refuse("E_S3", "the store's list does not go on")
            marker = following

    def fetch(self, found: Object, begin: int, body: memoryview, stop: threading.Event) -> None:
        """Fill `body` with the bytes from `begin` on of exactly this object.

        Raises:
            FoldinError: as `ask`; E_DIGEST where it was exchanged, or came too short or too long each time.
            Halted: `stop` is set.
        """
        asked = f"bytes={begin}-{begin + len(body) - 1}"
        request = {"Range": asked, "IfMatch": f'"{found.etag}"'}

        def attempt() -> Answer:
            answer = self._request("GetObject", found.uri, request)
            with closing(answer["Body"]) as arriving:
                if bare(answer.get("ETag", "")) != found.etag:  # a store may ignore If-Match
                    refused = {"Error": {"Code": "PreconditionFailed", "Message": "another etag"}}
                    raise exceptions.ClientError(refused, "GetObject")
                came = answer.get("ContentRange", f"bytes 0-{found.size - 1}/")  # none with a whole object
                if not came.startswith(f"{asked.replace('=', ' ')}/"):
                    raise Torn(f"{came} instead of {asked}")
                fill(body, arriving, stop)
            return answer

        self._patiently("GetObject", found.uri, attempt, (), stop, self._tries)

    def _patiently(
        self,
        verb: str,
        where: str,
        attempt: Callable[[], Answer],
        refusals: Collection[str],
        stop: threading.Event,
        tries: int,
    ) -> Answer:
        # Pauses are drawn from 0 on, so that clients that failed together do not return together ("full jitter",
        # https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
        for failures in range(tries):
            if stop.is_set():
                raise Halted
            try:
                answer = attempt()
            except (*FAILURES, Torn) as error:
                if code_of(error) in refusals:
                    return {}
                if failures + 1 == tries or not passes(error):
                    raise self._refusal(verb, where, error, failures + 1) from self._shareable(error)
            else:
                answer["ResponseMetadata"]["RetryAttempts"] = failures
                return answer
            self._pause(stop, random.uniform(0, min(LONGEST, SHORTEST * 2**failures)))
        raise ValueError("tries must be 1 or more")

    def _request(self, verb: str, uri: str, request: Mapping[str, object]) -> Answer:
        with self._opening:
            if self._client is None:
                self._open()
        bucket, key = Address.of(uri)
        place = {"Bucket": bucket, "Key": key} if key else {"Bucket": bucket}
        answer: Answer = getattr(self._client, xform_name(verb))(**place, **request)
        return answer

    def _open(self) -> None:
        session = boto3.Session()
        try:
            self._client = session.client("s3", endpoint_url=self._url, config=self._config)
        except ValueError as error:  # an AWS_ENDPOINT_URL without https://, a region with a space
            place = Place("the S3 client", "", "correct the AWS_* variables or the profile")
            raise place.refuse("E_CONFIG", "its settings are not valid", found=shown(str(error))) from error
        if credentials := session.get_credentials():
            known = (credentials.access_key, credentials.secret_key, credentials.token)
            self._secrets = tuple(secret for secret in known if secret)

    def _refusal(self, verb: str, where: str, error: Exception, requests: int) -> FoldinError:
        said = error.response["Error"].get("Message", "") if isinstance(error, exceptions.ClientError) else str(error)
        for secret in self._secrets:  # a store may repeat what it was sent
            said = said.replace(secret, "***")
        code, what, remedy = MEANINGS.get(code_of(error), UNKNOWN)
        if isinstance(error, Torn) and verb != "GetObject":
            code, what, remedy = UNKNOWN
        times = "" if requests == 1 else f", {requests} times"
        found = f"{shown(code_of(error))} for {verb}{times}: {shown(said)}"
        return Place(shown(where), "", remedy).refuse(code, what, found=found.removesuffix("."))

    def _shareable(self, error: Exception) -> Exception | None:
        """The error, as the cause to be shown in tracebacks; None where a secret stands in it."""
        return None if any(secret in str(error) for secret in self._secrets) else error


def fill(body: memoryview, arriving: RawIOBase, stop: threading.Event) -> None:
    """Read exactly as many bytes as fit; raises Torn where there are fewer or more, Halted once `stop` is set."""
    done = 0
    while done < len(body):
        if stop.is_set():
            raise Halted
        count = arriving.readinto(body[done : done + PIECE])
        if not count:
            raise Torn(f"the body ended after {done} of {len(body)} bytes")
        done += count
    if arriving.readinto(bytearray(1)):  # the end; botocore compares a checksum, where there is one, only there
        raise Torn(f"the body goes on after {len(body)} bytes")


def code_of(error: Exception) -> str:
    """What S3 calls the error; where S3 said nothing, the name of its type."""
    return (
        str(error.response["Error"].get("Code", ""))
        if isinstance(error, exceptions.ClientError)
        else type(error).__name__
    )


def passes(error: Exception) -> bool:
    """Whether the same request may succeed later: it never reached the store, or the store itself is in trouble."""
    if isinstance(error, exceptions.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return code_of(error) in PASSING or (status >= 500 and status != 501)
    return isinstance(error, (*BROKEN, Torn))
