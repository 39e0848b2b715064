"""Addresses, names and parts of stored objects."""

import subprocess
import sys

import pytest

from registry.records import FoldinError
from registry.stored import MOST_PARTS, SMALLEST_PART, Address, Span, bare, check_name, folder, spans, upload_spans


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://bucket/a/b.c", ("bucket", "a/b.c")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/what?#%20 line\nbreak", ("bucket", "what?#%20 line\nbreak")),
    ],
)
def test_an_address_has_a_bucket_and_a_key_and_nothing_else(uri, parts):
    assert Address.of(uri) == parts


@pytest.mark.parametrize(
    "uri", ["", "bucket/a", "file:///etc/passwd", "s3:///a", "s3://../a", "s3://user@host/a", "S3"]
)
def test_what_is_no_address_is_refused(uri):
    with pytest.raises(FoldinError, match="E_PATH") as caught:
        Address.of(uri)
    assert caught.value.refusal.expected == "s3://bucket/name"


@pytest.mark.parametrize("uri", ["s3://bucket/a", "s3://bucket/a/", "s3://bucket/a//"])
def test_a_folder_ends_with_one_slash(uri):
    assert folder(uri) == "s3://bucket/a/"


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "..a/b..", "été", "a b"])
def test_plain_names_pass(name):
    check_name(name, f"s3://bucket/{name}")


@pytest.mark.parametrize("name", ["..", "../a", "a/../b", "a/./b", "/a", "a//b", "a\\b", "a\nb", "a\0", "a\u202eb", ""])
def test_names_that_could_lead_elsewhere_are_refused_and_shown_escaped(name):
    with pytest.raises(FoldinError, match="E_PATH") as caught:
        check_name(name, f"s3://bucket/{name}")
    assert str(caught.value).isprintable()


def test_parts_cover_the_bytes_once_and_in_order():
    assert spans(10, 25, 10) == [Span(1, 10, 20), Span(2, 20, 25)]
    assert spans(0, 20, 10) == [Span(1, 0, 10), Span(2, 10, 20)]
    assert spans(5, 5, 10) == []


@pytest.mark.parametrize("size", [0, 1, SMALLEST_PART, 300 * 2**20, 2 * 2**40])
def test_an_upload_keeps_to_the_limits_of_s3(size):
    parts = upload_spans(size, 2**20)
    assert len(parts) <= MOST_PARTS
    assert all(part.end - part.begin >= SMALLEST_PART for part in parts[:-1])
    assert sum(part.end - part.begin for part in parts) == size


def test_an_etag_is_kept_without_quotes():
    assert bare('"abc-2"') == bare("abc-2") == "abc-2"


def test_the_values_do_not_cost_boto3():
    program = "import sys, registry.stored; sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
