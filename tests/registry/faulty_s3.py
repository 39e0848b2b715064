"""A real S3 server (moto) in a process of its own, and a proxy before it that counts, and fails as it is told.

The proxy also keeps three promises of S3 that moto does not: a body that does not match its checksum is refused, a copy
may depend on the source's etag, and of several conditional writes at a time one wins.
"""

import base64
import hashlib
import http.client
import os
import random
import re
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

ACCESS, SECRET = "AKIACANARYCANARY0001", "canary/secret/canary/secret/canary/0001"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}
ELSEWHERE = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE")
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

# Faults. The first four need no answer of the server, the others spoil one.
BEFORE = ("slow-down", "internal", "hang-up", "late")
AFTER = (
    "lost",
    "cut",
    "short",
    "long",
    "error-body",
)  # cut: fewer bytes than announced; short, long: announced as such
# "flip" changes one bit of what is put or got; "shifted" and "unranged" spoil the range that is asked for.
CODES = {"slow-down": (503, "SlowDown"), "internal": (500, "InternalError"), "lost": (500, "InternalError")}


@contextmanager
def moto(folder, **environment):
    """(host, port) of a moto server that lists ten objects a page and takes parts of any size."""
    settings = {"MOTO_S3_DEFAULT_MAX_KEYS": "10", "S3_UPLOAD_PART_MIN_SIZE": "1", **environment}
    with open(folder / "moto.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        with process:
            port = process.stdout.readline()
            assert port, (folder / "moto.log").read_text()
            yield "127.0.0.1", int(port)
            process.stdin.close()


def verb_of(method, path, headers):
    """What S3's reference calls a request."""
    parts = urlsplit(path)
    query, key = parse_qs(parts.query, keep_blank_values=True), parts.path.strip("/").partition("/")[2]
    copies = "x-amz-copy-source" in headers
    part, write = ("UploadPartCopy", "CopyObject") if copies else ("UploadPart", "PutObject")
    return {
        "GET": ("ListParts" if "uploadId" in query else "GetObject")
        if key
        else ("ListMultipartUploads" if "uploads" in query else "ListObjectsV2"),
        "HEAD": "HeadObject",
        "POST": "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload",
        "PUT": (part if "partNumber" in query else write) if key else "CreateBucket",
        "DELETE": "AbortMultipartUpload" if "uploadId" in query else "DeleteObject",
    }[method]


def error(status, code, message="as the test wants it"):
    """(status, headers, body) of a refusal in S3's words."""
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return status, {"Content-Type": "application/xml"}, text.encode()


def flipped(body, place):
    """`body` with one bit changed."""
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :] if body else body


class Faults:
    """A seeded script: a share of all requests fails, each in a way drawn from `kinds`. Counts what it did."""

    def __init__(self, seed, share, kinds=(*BEFORE, *AFTER)):
        self._random, self._share, self._kinds = random.Random(seed), share, kinds
        self._lock = threading.Lock()
        self.done = Counter()

    def __call__(self, verb):
        """The fault of the next request; "" for none."""
        with self._lock:
            kind = self._random.choice(self._kinds) if self._random.random() < self._share else ""
            self.done[kind] += 1
        return kind


class FaultyS3:
    """The proxy. `next("GetObject", "cut", "")` plans faults of single requests; `script` decides all the others."""

    def __init__(self, server):
        self.server = server
        self.script = lambda verb: ""
        self.delay = 1.0  # seconds that a late answer takes
        self.asked, self.sent, self.received = Counter(), Counter(), Counter()  # requests; bytes of bodies; by verb
        self.conditional = True  # whether If-Match and If-None-Match are passed on
        self.before = lambda verb: None  # called before a request is passed on
        self._planned, self._begun = {}, {}
        self._lock, self._writing = threading.Lock(), threading.Lock()

    def next(self, verb, *faults):
        """What becomes of the next requests of this kind, one after the other.

        A tuple (status, code, message) is a refusal to be sent, bytes are the body of an answer to be sent.
        """
        with self._lock:
            self._planned.setdefault(verb, []).extend(faults)

    def bucket(self):
        """s3://NAME of a new bucket."""
        name = f"bucket-{secrets.token_hex(6)}"
        assert self._pass("PUT", f"/{name}", {}, b"")[0] == 200
        return f"s3://{name}"

    def count(self):
        """Count from 0 again."""
        for counter in (self.asked, self.sent, self.received):
            counter.clear()

    def answer(self, method, path, headers, body):
        """(status, headers, body, bytes to be sent or None for all, None to hang up)"""
        verb = verb_of(method, path, headers)
        with self._lock:
            planned = self._planned.get(verb)
            fault = planned.pop(0) if planned else self.script(verb)
            self.asked[verb] += 1
            self.received[verb] += len(body)
        if isinstance(fault, tuple):
            return *error(*fault), None
        if isinstance(fault, bytes):
            return 200, {"Content-Type": "application/xml"}, fault, None
        if fault == "late":
            time.sleep(self.delay)
        if fault in ("slow-down", "internal"):
            return *error(*CODES[fault]), None
        if fault in ("hang-up", "late"):
            return 0, {}, b"", None
        if fault in ("shifted", "unranged"):
            first, last = re.findall(r"\d+", headers.pop("Range"))
            headers |= {"Range": f"bytes={int(first) + 1}-{int(last) + 1}"} if fault == "shifted" else {}
        if fault == "flip" and body:
            body = flipped(body, len(body) // 2)
        self.before(verb)
        return self._spoilt(verb, fault, *self._promised(verb, method, path, headers, body))

    def _spoilt(self, verb, fault, status, headers, body):
        if fault == "lost":
            return *error(*CODES[fault]), None
        if fault == "error-body" and verb in ("CompleteMultipartUpload", "CopyObject", "UploadPartCopy"):
            return *error(200, "InternalError"), None
        if fault == "cut":
            return status, headers, body, len(body) // 2
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "long" and verb == "GetObject":
            body += b"more"
        if fault == "flip" and verb == "GetObject":
            body = flipped(body, len(body) // 2)
        return status, headers, body, None

    def _promised(self, verb, method, path, headers, body):
        """What S3 answers, which in some points is not what moto does."""
        declared = headers.get("x-amz-checksum-sha256")
        if declared and declared != base64.b64encode(hashlib.sha256(body).digest()).decode():
            return error(400, "BadDigest", "The SHA256 you specified did not match the calculated checksum.")
        if wanted := headers.get("x-amz-copy-source-if-match"):
            status, there, _ = self._pass("HEAD", f"/{headers['x-amz-copy-source'].lstrip('/')}", headers, b"")
            if status == 200 and there.get("ETag") != wanted:
                return error(412, "PreconditionFailed")
        conditions = {"If-Match", "If-None-Match"} & set(headers)
        if not self.conditional:
            headers = {name: value for name, value in headers.items() if name not in conditions}
        elif conditions and method == "PUT":
            with self._writing:
                return self._pass(method, path, headers, body)
        answer = self._pass(method, path, headers, body)
        if verb == "CreateMultipartUpload":
            self._begun[re.search(rb"<UploadId>(.*?)<", answer[2])[1].decode()] = time.time()
        return self._dated(answer) if verb == "ListMultipartUploads" else answer

    def _dated(self, answer):
        """moto says of every upload that it began in 2010."""
        status, headers, body = answer
        pieces = body.decode().split("<Upload>")
        for number, piece in enumerate(pieces[1:], 1):
            begun = self._begun.get(re.search("<UploadId>(.*?)<", piece)[1], 0.0)
            said = datetime.fromtimestamp(begun, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            pieces[number] = re.sub("<Initiated>.*?<", f"<Initiated>{said}<", piece)
        return status, headers, "<Upload>".join(pieces).encode()

    def _pass(self, method, path, headers, body):
        with closing(http.client.HTTPConnection(*self.server, timeout=60)) as connection:
            connection.request(method, path, body, {**headers, "Connection": "close", "Content-Length": str(len(body))})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for its header to be acknowledged

    def serve(self):
        """Answer, or hang up."""
        with suppress(ConnectionError):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            proxy = self.server.proxy
            status, headers, answer, limit = proxy.answer(self.command, self.path, dict(self.headers), body)
            if not status:
                self.close_connection = True
                return
            # The answer to HEAD announces a body that does not follow.
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(answer))
            sent = answer if limit is None else answer[:limit]
            proxy.sent[verb_of(self.command, self.path, self.headers)] += len(sent)  # before anybody can ask
            self.send_response_only(status)
            skipped = ("content-length", "connection", "transfer-encoding")
            for name, value in headers.items():
                if name.lower() not in skipped:
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else sent)
            self.close_connection = self.close_connection or limit is not None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def log_message(self, *arguments):
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Takes many connections at once."""

    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients hang up, too; everything else is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class S3(NamedTuple):
    """A store for one test."""

    url: str
    proxy: FaultyS3
    root: str  # s3://BUCKET


@contextmanager
def faulty(server):
    """A proxy before a server at (host, port), with a bucket of its own."""
    with Server(("127.0.0.1", 0), Handler) as listening:
        listening.proxy = FaultyS3(server)
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,), name="faulty-s3")
        thread.start()
        try:
            yield S3(f"http://127.0.0.1:{listening.server_port}", listening.proxy, listening.proxy.bucket())
        finally:
            listening.shutdown()
            thread.join()
