"""Objects in an S3 store that is real, and fails as it is told to."""

import hashlib
import os
import random
import signal
import threading
import time
import traceback
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest

from registry import objects as verbs
from registry.multipart import THREADS
from registry.objects import Object, Objects, Upload
from registry.records import FoldinError
from tests.registry.faulty_s3 import ACCESS, AFTER, BEFORE, SECRET, Faults

pytestmark = pytest.mark.integration

KIB = 2**10
PART = 64 * KIB


@pytest.fixture
def small_parts(monkeypatch):
    """Uploads in parts of 64 KiB, which this server takes and S3 would not."""
    monkeypatch.setattr("registry.stored.SMALLEST_PART", PART)


@pytest.fixture
def objects(s3, small_parts):
    """The verbs, by way of the proxy, without waiting between tries."""
    return made(s3.url)


@pytest.fixture
def client(s3, s3_server):
    """boto3 as it comes, past the proxy."""
    client = boto3.client("s3", endpoint_url="http://{}:{}".format(*s3_server))
    yield client
    client.close()


@pytest.fixture
def put(s3, client):
    """A function that stores bytes under a name, past the proxy and past our own code."""

    def put(name, content):
        client.put_object(Bucket=s3.root[5:], Key=name, Body=content)
        return f"{s3.root}/{name}"

    return put


@pytest.fixture
def kept(s3, client):
    """A function that gets the bytes under a name, likewise; None where there are none."""

    def kept(name):
        try:
            with client.get_object(Bucket=s3.root[5:], Key=name)["Body"] as body:
                return body.read()
        except client.exceptions.NoSuchKey:
            return None

    return kept


@pytest.fixture
def uploads(s3, client):
    """A function that counts the uploads that are open, likewise."""
    return lambda: len(client.list_multipart_uploads(Bucket=s3.root[5:]).get("Uploads", ()))


def made(url, **settings):
    defaults = {"parts": 4, "part_bytes": PART, "tries": 4, "timeout": 20.0, "pause": lambda stop, seconds: None}
    return Objects(url, **{**defaults, **settings})


def written(folder, size, seed=0):
    path = folder / f"file-{size}-{seed}"
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def refused(code, call, *arguments):
    with pytest.raises(FoldinError) as caught:
        call(*arguments)
    assert caught.value.refusal.code == code, caught.value
    return caught.value


def ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def soon_none():
    """Whether no thread is left after some seconds: one that was interrupted while it started is not waited for."""
    deadline = time.monotonic() + 10
    while ours() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not ours()


# what is there


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 10 * PART + 17])
def test_what_goes_up_comes_back(objects, s3, tmp_path, kept, uploads, size):
    path, uri = written(tmp_path, size), f"{s3.root}/a/file"
    found = objects.upload(path, uri)
    assert kept("a/file") == path.read_bytes()
    assert found == objects.head(uri) == objects.below(s3.root)["a/file"]
    assert (found.uri, found.size) == (uri, size)
    assert objects.read(found, 0, size) == b"".join(objects.stream(found)) == path.read_bytes()
    digest = objects.download(found, tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == path.read_bytes()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert s3.proxy.asked["UploadPart"] == (-(-size // PART) if size > PART else 0)
    assert not uploads()
    assert not ours()


def test_below_lists_every_page_of_one_folder_and_nothing_beside_it(objects, s3, put):
    names = [f"{number:02}" for number in range(23)]
    for name in [*(f"models/a/{name}" for name in reversed(names)), "models/ab", "models/a", "other"]:
        put(name, name.encode())
    put("models/a/", b"")  # what consoles make for a folder
    found = objects.below(f"{s3.root}/models/a")
    assert list(found) == names
    assert found["07"] == objects.head(f"{s3.root}/models/a/07")
    assert s3.proxy.asked["ListObjectsV2"] == 3
    assert list(objects.below(s3.root)) == ["models/a", *(f"models/a/{name}" for name in names), "models/ab", "other"]
    assert objects.below(f"{s3.root}/nothing") == {}


def test_below_refuses_names_that_lead_elsewhere(objects, s3, put):
    put("models/a/../../x", b"x")
    assert "../../x" in str(refused("E_PATH", objects.below, f"{s3.root}/models/a"))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<ListBucketResult></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>fal",
        b"<html>try later</html>",
    ],
)
def test_a_list_that_did_not_come_whole_is_asked_for_again_and_never_taken_for_an_empty_one(objects, s3, put, answer):
    put("a", b"a")
    s3.proxy.next("ListObjectsV2", answer)
    assert list(objects.below(s3.root)) == ["a"]
    s3.proxy.next("ListObjectsV2", *[answer] * 4)
    refused("E_S3", objects.below, s3.root)


def test_a_list_that_does_not_go_on_is_an_error(objects, s3):
    s3.proxy.next("ListObjectsV2", b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>")
    assert "does not go on" in str(refused("E_S3", objects.below, s3.root))


def test_what_is_not_there_is_none_or_an_error(objects, s3):
    assert objects.head(f"{s3.root}/nothing") is None
    gone = Object(f"{s3.root}/nothing", 10, "etag")
    assert "there is no such object" in str(refused("E_SOURCE", objects.read, gone, 0, 10))
    assert "there is no such object" in str(refused("E_SOURCE", objects.copy, gone, f"{s3.root}/copy"))
    assert "there is no such bucket" in str(refused("E_SOURCE", objects.below, "s3://no-such-bucket/a"))
    assert "there is no such bucket" in str(refused("E_SOURCE", objects.create, "s3://no-such-bucket/a", b"a"))
    assert s3.proxy.asked["GetObject"] == 1  # 404 is final


def test_a_range_outside_the_object_is_a_mistake_of_the_caller(objects, s3, put):
    put("a", bytes(10))
    found = objects.below(s3.root)["a"]
    for begin, end in ((0, 11), (-1, 3), (5, 4)):
        with pytest.raises(ValueError, match="of an object of 10"):
            objects.read(found, begin, end)


# how much is transferred


def test_a_ranged_read_transfers_what_was_asked_and_no_more(objects, s3, put):
    content = random.Random(1).randbytes(4_000_000)
    put("weights", content)
    found = objects.below(s3.root)["weights"]
    s3.proxy.count()
    for begin, end in ((8, 1_000), (70_000, 72_000), (1_000_000, 1_200_000), (3_999_999, 4_000_000)):
        assert objects.read(found, begin, end) == content[begin:end]
    assert s3.proxy.sent["GetObject"] == 992 + 2_000 + 200_000 + 1
    assert s3.proxy.asked["GetObject"] == 1 + 1 + 4 + 1
    assert objects.read(found, 100, 100) == b""
    assert s3.proxy.asked["GetObject"] == 7


def test_a_copy_passes_the_store_only(objects, s3, put, kept, monkeypatch):
    monkeypatch.setattr(verbs, "COPY_PART", PART)
    content = random.Random(2).randbytes(5 * PART + 1)
    put("a", content)
    found = objects.below(s3.root)["a"]
    s3.proxy.count()
    assert objects.copy(found, f"{s3.root}/b") == objects.head(f"{s3.root}/b")
    monkeypatch.setattr(verbs, "COPY_LIMIT", 2 * PART)
    assert objects.copy(found, f"{s3.root}/c").size == found.size
    assert kept("b") == kept("c") == content
    assert s3.proxy.asked["UploadPartCopy"] == 6
    assert sum(s3.proxy.received.values()) < 3_000  # the list of the parts


@pytest.mark.chaos
def test_streaming_a_large_file_needs_the_memory_of_a_few_parts(s3, s3_server, tmp_path):
    path, size, part = tmp_path / "large", 300_000_000, 16 * 2**20
    path.touch()
    os.truncate(path, size)
    url = "http://{}:{}".format(*s3_server)
    found = made(url, part_bytes=size).upload(path, f"{s3.root}/large")
    objects = made(url, parts=2, part_bytes=part)
    objects.read(found, 0, 1)
    tracemalloc.start()
    try:
        assert sum(len(piece) for piece in objects.stream(found)) == size
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    objects.remove(found.uri)
    assert peak < 3 * part + 4_000_000


# identity


@pytest.mark.parametrize("conditional", [True, False])
def test_an_object_that_was_exchanged_since_it_was_listed_is_not_read(objects, s3, put, tmp_path, conditional):
    put("a", bytes(3 * PART))
    found = objects.below(s3.root)["a"]
    put("a", bytes([1]) * 3 * PART)
    s3.proxy.conditional = conditional  # some stores know no If-Match
    s3.proxy.count()
    refused("E_DIGEST", objects.read, found, 0, 1_000)
    assert s3.proxy.asked["GetObject"] == 1
    assert (s3.proxy.sent["GetObject"] < 500) == conditional
    refused("E_DIGEST", objects.read, found, 0, found.size)
    refused("E_DIGEST", lambda: list(objects.stream(found)))
    refused("E_DIGEST", objects.download, found, tmp_path / "copy")
    assert not list(tmp_path.iterdir())
    assert not ours()


def test_an_object_that_was_exchanged_is_not_copied(objects, s3, put, kept, uploads, monkeypatch):
    put("a", bytes(3 * PART))
    found = objects.below(s3.root)["a"]
    put("a", bytes(10))
    refused("E_DIGEST", objects.copy, found, f"{s3.root}/b")
    monkeypatch.setattr(verbs, "COPY_LIMIT", PART)
    monkeypatch.setattr(verbs, "COPY_PART", PART)
    refused("E_DIGEST", objects.copy, found, f"{s3.root}/b")
    assert kept("b") is None
    assert not uploads()


def test_a_flipped_bit_passes_a_ranged_read_and_only_a_digest_tells(objects, s3, put, tmp_path):
    content = random.Random(3).randbytes(2 * PART)
    put("a", content)
    found = objects.below(s3.root)["a"]
    s3.proxy.next("GetObject", "flip", "flip")
    body = objects.read(found, 100, 900)
    assert len(body) == 800
    assert body != content[100:900]
    assert objects.download(found, tmp_path / "a") != hashlib.sha256(content).hexdigest()
    assert objects.download(found, tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_flipped_bit_of_an_object_that_comes_whole_is_noticed_by_the_checksum_of_the_store(objects, s3, put):
    content = random.Random(3).randbytes(1_000)
    put("a", content)
    found = objects.below(s3.root)["a"]
    s3.proxy.next("GetObject", "flip")
    assert objects.read(found, 0, 1_000) == content
    s3.proxy.next("GetObject", *["flip"] * 4)
    assert "FlexibleChecksumError" in str(refused("E_DIGEST", objects.read, found, 0, 1_000))


@pytest.mark.parametrize("fault", ["shifted", "unranged"])
def test_another_range_than_the_one_asked_for_is_not_taken(objects, s3, put, fault):
    content = random.Random(3).randbytes(2_000)
    put("a", content)
    found = objects.below(s3.root)["a"]
    s3.proxy.next("GetObject", fault)
    assert objects.read(found, 500, 1_500) == content[500:1_500]
    s3.proxy.next("GetObject", "unranged")
    assert objects.read(found, 0, 2_000) == content  # the whole object needs no range
    assert s3.proxy.asked["GetObject"] == 3
    s3.proxy.next("GetObject", *[fault] * 4)
    refused("E_DIGEST", objects.read, found, 500, 1_500)


@pytest.mark.parametrize(("size", "verb"), [(1_000, "PutObject"), (3 * PART, "UploadPart")])
def test_a_bit_flipped_on_the_way_up_is_refused_by_its_checksum_and_sent_again(objects, s3, tmp_path, kept, size, verb):
    path = written(tmp_path, size)
    s3.proxy.next(verb, "flip")
    objects.upload(path, f"{s3.root}/a")
    assert kept("a") == path.read_bytes()
    assert s3.proxy.asked[verb] == -(-size // PART) + 1


@pytest.mark.parametrize("size", [1_000, 3 * PART])
def test_what_another_writer_put_there_meanwhile_is_not_taken_for_ours(objects, s3, put, tmp_path, size):
    path = written(tmp_path, size)
    s3.proxy.before = lambda verb: verb == "HeadObject" and put("a", bytes(size))
    assert "what was written is not there" in str(refused("E_DIGEST", objects.upload, path, f"{s3.root}/a"))


def test_an_object_that_lost_a_part_in_the_store_is_not_taken_for_ours(objects, s3, client, tmp_path):
    bucket = s3.root[5:]

    def shorten(verb):
        if verb == "HeadObject":
            marked = client.head_object(Bucket=bucket, Key="a")["Metadata"]
            client.put_object(Bucket=bucket, Key="a", Body=bytes(2 * PART), Metadata=marked)

    s3.proxy.before = shorten
    assert f"{3 * PART} bytes" in str(refused("E_DIGEST", objects.upload, written(tmp_path, 3 * PART), f"{s3.root}/a"))


def test_a_file_that_shrinks_while_it_is_uploaded_is_refused(objects, s3, tmp_path, kept, uploads):
    path = written(tmp_path, 12 * PART)
    s3.proxy.before = lambda verb: verb == "CreateMultipartUpload" and os.truncate(path, 5 * PART)
    refused("E_DIGEST", objects.upload, path, f"{s3.root}/a")
    assert kept("a") is None
    assert not uploads()


# faults, one at a time

READS = (*BEFORE, *AFTER)


@pytest.mark.parametrize("fault", READS)
def test_a_read_survives_a_fault_and_names_it_when_it_stays(s3, put, fault):
    content = random.Random(4).randbytes(3 * PART)
    put("a", content)
    objects = made(s3.url, timeout=0.5 if fault == "late" else 20.0)
    found = objects.below(s3.root)["a"]
    s3.proxy.next("GetObject", fault, fault)
    assert objects.read(found, 10, 3 * PART) == content[10:]
    if fault == "error-body":  # of writes only
        return
    s3.proxy.script = lambda verb: fault
    code = "E_DIGEST" if fault in ("cut", "short", "long") else "E_S3"
    error = refused(code, objects.read, found, 10, 20)
    assert "4 times" in str(error)
    assert found.uri in str(error)


@pytest.mark.parametrize("fault", READS)
@pytest.mark.parametrize("verb", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "HeadObject"])
def test_an_upload_survives_a_fault_of_any_of_its_requests(s3, small_parts, tmp_path, kept, uploads, verb, fault):
    path = written(tmp_path, 3 * PART)
    objects = made(s3.url, timeout=0.7 if fault == "late" else 20.0)
    s3.proxy.next(verb, fault, fault)
    objects.upload(path, f"{s3.root}/a")
    assert kept("a") == path.read_bytes()
    assert not uploads()


@pytest.mark.parametrize("fault", READS)
@pytest.mark.parametrize("verb", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
def test_an_upload_that_fails_leaves_nothing_open(s3, small_parts, tmp_path, kept, uploads, verb, fault):
    path = written(tmp_path, 3 * PART)
    objects = made(s3.url, timeout=0.3 if fault == "late" else 20.0)
    s3.proxy.script = lambda asked: fault if asked == verb else ""
    harmless = ("long", "error-body") if verb != "CompleteMultipartUpload" else ("long",)
    if verb == "UploadPart":
        harmless += ("cut", "short")  # its answer has no body
    if fault in harmless:
        objects.upload(path, f"{s3.root}/a")
    else:
        refused("E_S3", objects.upload, path, f"{s3.root}/a")
    assert kept("a") in (None, path.read_bytes())
    assert not uploads()
    assert not ours()


def test_an_upload_whose_end_was_told_to_nobody_is_known_by_its_mark(objects, s3, tmp_path, kept):
    path = written(tmp_path, 3 * PART)
    s3.proxy.next("CompleteMultipartUpload", "lost", (404, "NoSuchUpload"))
    found = objects.upload(path, f"{s3.root}/a")
    assert kept("a") == path.read_bytes()
    assert found.size == 3 * PART


def test_the_search_for_a_lost_upload_spares_those_of_others(objects, s3, client, tmp_path, uploads):
    bucket = s3.root[5:]
    direct = boto3.client("s3", endpoint_url=s3.url)

    def begin(verb):
        if verb == "UploadPart" and once.acquire(blocking=False):
            others.append(direct.create_multipart_upload(Bucket=bucket, Key="a")["UploadId"])  # same key, has a part
            client.upload_part(Bucket=bucket, Key="a", PartNumber=1, UploadId=others[0], Body=b"x")
            others.append(direct.create_multipart_upload(Bucket=bucket, Key="ab")["UploadId"])  # another key

    others, once = [], threading.Lock()
    s3.proxy.before = begin
    s3.proxy.next("CreateMultipartUpload", "lost", "lost")
    objects.upload(written(tmp_path, 3 * PART), f"{s3.root}/a")
    left = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert {each["UploadId"] for each in left} == set(others)
    direct.close()


@pytest.mark.parametrize(
    ("verb", "code"), [("AccessDenied", 403), ("NotImplemented", 501), ("InvalidArgument", 400), ("InternalError", 500)]
)
def test_what_will_not_pass_is_asked_once(objects, s3, verb, code):
    s3.proxy.script = lambda asked: (code, verb)
    error = refused("E_S3", objects.create, f"{s3.root}/a", b"a")
    assert f"{verb} for PutObject" in str(error)
    assert s3.proxy.asked["PutObject"] == (4 if code == 500 else 1)
    assert ("docs/s3.md" in str(error)) == (code == 403)


def test_pauses_are_drawn_up_to_a_limit_that_doubles(s3, put):
    put("a", b"a")
    pauses = []
    objects = made(s3.url, tries=9, pause=lambda stop, seconds: pauses.append(seconds))
    s3.proxy.script = lambda verb: "slow-down"
    refused("E_S3", objects.below, s3.root)
    assert s3.proxy.asked["ListObjectsV2"] == 9
    assert all(0 <= pause <= min(5.0, 0.5 * 2**number) for number, pause in enumerate(pauses))
    assert len(set(pauses)) == len(pauses) == 8


def test_nobody_at_the_endpoint_is_an_error_that_names_it(s3):
    error = refused("E_S3", made("http://127.0.0.1:9", timeout=1.0).head, "s3://bucket/a")
    assert "127.0.0.1:9" in str(error)
    assert "s3://bucket/a" in str(error)


# faults, five hundred


class Rounds:
    """Calls of every verb in a drawn order; each either does what it promises or raises a typed error."""

    def __init__(self, objects, s3, folder, kept, seed):
        self.objects, self.root, self.kept = objects, s3.root, kept
        self.random = random.Random(seed)
        self.files = [written(folder, size, 7) for size in (10, PART, 4 * PART + 5)]
        self.path = folder / "fetched"
        self.known = {}
        self.number = 0

    def upload(self):
        file = self.random.choice(self.files)
        found = self.objects.upload(file, f"{self.root}/{self.number}")
        assert found.size == file.stat().st_size
        assert self.kept(f"{self.number}") == file.read_bytes()
        self.known[found] = file.read_bytes()

    def create(self):
        self.objects.create(f"{self.root}/{self.number}", b"manifest")
        assert self.kept(f"{self.number}") == b"manifest"

    def copy(self):
        found = self._one()
        self.objects.copy(found, f"{self.root}/{self.number}")
        assert self.kept(f"{self.number}") == self.known[found]

    def read(self):
        found = self._one()
        begin = self.random.randrange(found.size)
        end = self.random.randrange(begin, found.size + 1)
        assert self.objects.read(found, begin, end) == self.known[found][begin:end]

    def stream(self):
        found = self._one()
        assert b"".join(self.objects.stream(found)) == self.known[found]

    def download(self):
        found = self._one()
        assert self.objects.download(found, self.path) == hashlib.sha256(self.known[found]).hexdigest()
        assert self.path.read_bytes() == self.known[found]

    def below(self):
        assert {found.uri for found in self.known} <= {found.uri for found in self.objects.below(self.root).values()}

    def head(self):
        found = self._one()
        assert self.objects.head(found.uri) == found

    def unfinished(self):
        assert self.objects.unfinished(self.root) == []

    def _one(self):
        return self.random.choice([*self.known])


@pytest.mark.parametrize("wanted", [100, pytest.param(500, marks=pytest.mark.chaos)])
def test_hundreds_of_faults_give_right_bytes_or_typed_errors_and_leave_nothing(
    s3, small_parts, tmp_path, kept, uploads, monkeypatch, wanted
):
    monkeypatch.setattr(verbs, "COPY_LIMIT", 2 * PART)
    monkeypatch.setattr(verbs, "COPY_PART", PART)
    objects = made(s3.url, timeout=0.5)
    rounds = Rounds(objects, s3, tmp_path, kept, seed=5)
    rounds.upload()
    s3.proxy.delay = 0.6
    s3.proxy.script = faults = Faults(5, 0.5, (*(BEFORE[:3] * 3), *(AFTER * 3), "late"))
    whole = (None, b"manifest", *(file.read_bytes() for file in rounds.files))
    calls = ("upload", "upload", "create", "copy", "read", "stream", "download", "below", "head", "unfinished")
    outcome = Counter()
    while sum(faults.done.values()) - faults.done[""] < wanted:
        rounds.number += 1
        call = rounds.random.choice(calls)
        try:
            getattr(rounds, call)()
            outcome["done"] += 1
        except FoldinError as error:
            outcome[error.refusal.code] += 1
            there = kept(f"{rounds.number}")
        else:
            there = None
        assert there in whole
        assert not uploads(), call
        assert not ours()
    assert set(outcome) <= {"done", "E_S3", "E_DIGEST"}
    assert outcome["done"] > wanted / 5, outcome
    assert len(outcome) > 1, outcome
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


# Ctrl-C


@pytest.mark.parametrize("moment", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
def test_an_interrupted_upload_leaves_nothing_open(objects, s3, tmp_path, kept, uploads, moment):
    path = written(tmp_path, 12 * PART)
    told = []

    def interrupt(verb):
        if verb == moment and not told:
            told.append(verb)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)

    s3.proxy.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        objects.upload(path, f"{s3.root}/a")
    assert told
    assert kept("a") == (path.read_bytes() if moment == "CompleteMultipartUpload" else None)
    assert s3.proxy.asked["UploadPart"] < 12 or moment == "CompleteMultipartUpload"
    assert not uploads()
    assert soon_none()


def test_an_interrupted_download_leaves_nothing(objects, s3, put, tmp_path):
    put("a", bytes(12 * PART))
    found = objects.below(s3.root)["a"]
    interrupted = threading.Event()

    def interrupt(verb):
        if not interrupted.is_set():
            interrupted.set()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    s3.proxy.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        objects.download(found, tmp_path / "copy")
    assert not list(tmp_path.iterdir())
    assert soon_none()


@pytest.mark.parametrize("last", [True, False])
def test_one_part_that_fails_ends_the_others_and_their_pauses(s3, put, last):
    put("a", bytes(4 * PART))
    objects = made(s3.url, pause=lambda stop, seconds: stop.wait(60))
    found = objects.below(s3.root)["a"]
    once = threading.Lock()

    def script(verb):
        if last and s3.proxy.asked["GetObject"] < 3:
            return "slow-down"
        return (403, "AccessDenied") if once.acquire(blocking=False) else "slow-down"

    s3.proxy.script = script
    begun = time.monotonic()
    assert "AccessDenied" in str(refused("E_S3", objects.read, found, 0, found.size))
    assert time.monotonic() - begun < 30
    assert not ours()


def test_a_stream_that_is_left_half_way_stops_its_threads(s3, put):
    put("a", bytes(40 * PART))
    pausing = threading.Event()
    objects = made(s3.url, pause=lambda stop, seconds: pausing.set() or stop.wait(60))
    stream = objects.stream(objects.below(s3.root)["a"])
    assert len(next(stream)) == PART
    while s3.proxy.sent["GetObject"] < 4 * PART:
        time.sleep(0.01)
    s3.proxy.script = lambda verb: "slow-down"
    assert len(next(stream)) == PART  # and the fifth part is asked for
    assert pausing.wait(60)
    assert ours()
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 30
    assert not ours()
    assert s3.proxy.asked["GetObject"] <= 5


# create-only


def test_what_is_created_is_never_replaced(objects, s3, kept):
    objects.create(f"{s3.root}/manifest", b"one")
    objects.create(f"{s3.root}/manifest", b"one")
    for other in (b"two", b"longer", b""):
        error = refused("E_EXISTS", objects.create, f"{s3.root}/manifest", other)
        assert f"{s3.root}/manifest" in str(error)
    assert kept("manifest") == b"one"


@pytest.mark.parametrize("fault", ["lost", "hang-up", (409, "ConditionalRequestConflict"), (503, "SlowDown")])
def test_a_create_whose_answer_was_lost_is_done(objects, s3, kept, fault):
    s3.proxy.next("PutObject", fault)
    objects.create(f"{s3.root}/manifest", b"one")
    assert kept("manifest") == b"one"
    assert s3.proxy.asked["PutObject"] == 2


@pytest.mark.parametrize("same", [True, False])
def test_of_eight_that_create_at_once_one_wins(objects, s3, kept, same):
    start = threading.Barrier(8)

    def create(number):
        start.wait()
        try:
            objects.create(f"{s3.root}/manifest", b"same" if same else f"content {number}".encode())
        except FoldinError as error:
            return error.refusal.code
        return kept("manifest").decode()

    with ThreadPoolExecutor(8) as pool:
        outcome = Counter(pool.map(create, range(8)))
    if same:
        assert outcome == {"same": 8}
    else:
        assert outcome == {"E_EXISTS": 7, kept("manifest").decode(): 1}


def test_the_probe_passes_where_the_store_keeps_its_promise(objects, s3):
    objects.probe(f"{s3.root}/versions")
    s3.proxy.next("PutObject", "lost", "", "lost")
    objects.probe(f"{s3.root}/versions")
    assert objects.below(s3.root) == {}


def test_the_probe_tells_where_the_store_does_not(objects, s3):
    s3.proxy.conditional = False
    assert "ignores If-None-Match" in str(refused("E_S3", objects.probe, f"{s3.root}/versions"))
    assert objects.below(s3.root) == {}


# clearing up


def test_unfinished_uploads_are_found_with_their_age_and_ended(objects, s3, client, uploads):
    direct = boto3.client("s3", endpoint_url=s3.url)
    for key in ("a/one", "a/two", "ab"):
        direct.create_multipart_upload(Bucket=s3.root[5:], Key=key)
    direct.close()
    found = objects.unfinished(f"{s3.root}/a")
    assert [upload.uri for upload in found] == [f"{s3.root}/a/one", f"{s3.root}/a/two"]
    assert all(time.time() - 60 < upload.begun <= time.time() + 1 for upload in found)
    for upload in [*found, *found, Upload(f"{s3.root}/a/three", "unknown", 0.0)]:
        objects.abort(upload)
    assert uploads() == 1
    assert objects.unfinished(f"{s3.root}/a") == []


def test_unfinished_uploads_are_listed_page_by_page(objects, s3):
    page = (
        "<ListMultipartUploadsResult><IsTruncated>{}</IsTruncated><NextKeyMarker>a/{}</NextKeyMarker>"
        "<NextUploadIdMarker>u</NextUploadIdMarker><Upload><Key>a/{}</Key><UploadId>u</UploadId>"
        "<Initiated>2026-01-02T03:04:05.000Z</Initiated></Upload></ListMultipartUploadsResult>"
    )
    s3.proxy.next("ListMultipartUploads", page.format("true", 1, 1).encode(), page.format("false", 2, 2).encode())
    found = objects.unfinished(f"{s3.root}/a")
    assert [upload.uri for upload in found] == [f"{s3.root}/a/1", f"{s3.root}/a/2"]
    assert found[0].begun == 1767323045.0


def test_what_is_removed_is_gone_and_may_be_removed_again(objects, s3, put, kept):
    uri = put("a", b"a")
    objects.remove(uri)
    objects.remove(uri)
    assert kept("a") is None


# secrets


def test_no_error_shows_a_secret(objects, s3, tmp_path, monkeypatch):
    said = [refused("E_CONFIG", Objects, f"https://{ACCESS}:{SECRET}@store.example")]
    objects.below(s3.root)
    echo = (400, "InvalidRequest", f"what is Credential={ACCESS}/x and {SECRET}")
    for verb, call in (
        ("ListObjectsV2", lambda: objects.below(s3.root)),
        ("PutObject", lambda: objects.create(f"{s3.root}/a", b"a")),
        ("CreateMultipartUpload", lambda: objects.upload(written(tmp_path, 3 * PART), f"{s3.root}/a")),
    ):
        s3.proxy.next(verb, echo)
        said.append(refused("E_S3", call))
        assert "***" in str(said[-1])
    s3.proxy.script = lambda verb: "hang-up"
    said.append(refused("E_S3", objects.below, s3.root))
    said.append(refused("E_S3", made("http://127.0.0.1:9").below, s3.root))
    for error in said:
        text = "".join(traceback.format_exception(error)) + repr(error.refusal)
        assert ACCESS not in text
        assert SECRET not in text


def test_without_credentials_the_error_says_so(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    error = refused("E_S3", made(s3.url).below, s3.root)
    assert "NoCredentialsError" in str(error)
    assert not s3.proxy.asked


def test_an_endpoint_of_the_environment_that_is_no_url_is_an_error(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "store.example:9000")
    assert "store.example:9000" in str(refused("E_CONFIG", made("").below, s3.root))


def test_an_endpoint_of_the_environment_is_used(s3, put, monkeypatch):
    put("a", b"a")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url)
    assert list(made("").below(s3.root)) == ["a"]
    assert s3.proxy.asked["ListObjectsV2"] == 1


@pytest.mark.parametrize("endpoint", ["store.example", "ftp://store.example", "http://", "http://store.example/?x=1"])
def test_an_endpoint_is_a_plain_url(endpoint):
    assert "plain URL" in str(refused("E_CONFIG", Objects, endpoint))
