"""What the receiver believes, what it wakes, and what it answers to those who mean no good."""

import asyncio
import json
import random
import re
import uuid
from collections import Counter

import httpx
import pytest

from flows import waking
from flows.config import parse
from flows.deliveries import ID, SIGNATURE, STAMP, WINDOW, Deliveries, sign
from flows.hints import lines_for
from flows.receiver import MOST_BYTES, PATH, Receiver, application
from flows.waking import Waker
from registry.records import FoldinError, Refusal

NOW = 1_800_000_000
SECRET, OLDER, STRANGERS = b"the newest secret of all", b"the one that was before", b"somebody else's secret"
LINES = """
[lines.support]
base = "base"
experts = ["support-experts", "shared-experts"]
[lines.sales]
base = "base"
experts = ["sales-experts", "shared-experts"]
[lines.sleeper]
base = "base"
experts = ["sleeper-experts", "shared-experts"]
trigger = "nightly"
"""


@pytest.fixture
def config(tmp_path):
    return parse(LINES, tmp_path / "foldin.toml")


def event(name="support-experts", version="7", kind="model_version", **more):
    facts = {"name": name, "version": version, "source": "models:/m-1", "run_id": None, **more}
    return json.dumps({"entity": kind, "action": "created", "timestamp": "2027-01-15", "data": facts}).encode()


def delivery(body, secret=SECRET, stamp=NOW, identity=None):
    identity = identity or str(uuid.uuid4())
    signed = sign(secret, identity, str(stamp), body)
    return {ID: identity, STAMP: str(stamp), SIGNATURE: signed, "Content-Type": "application/json"}


class Runs:
    """What was made, in order; it fails while it is told to."""

    def __init__(self):
        self.made, self.broken = [], False

    async def make(self, line, event):
        await asyncio.sleep(0)
        if self.broken:
            raise FoldinError(Refusal("E_SERVER", "Prefect does not answer", "a test"))
        self.made.append((line, event))


@pytest.fixture
def runs():
    return Runs()


@pytest.fixture
def send(config, runs):
    """A function: send deliveries one after the other to the real application; the answers."""
    deliveries = Deliveries((SECRET, OLDER), clock=lambda: NOW)
    app = application(config, deliveries, None)
    waker = Waker(runs.make, quiet=0.0)
    app.state.receiver = Receiver(config, deliveries, waker, {"support": 5}.get)

    def sending(*several):
        async def speak():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
                return [await client.post(PATH, content=body, headers=headers) for headers, body in several]

        return asyncio.run(speak())

    return sending


def statuses(answers):
    assert all(answer.content == b"" for answer in answers), "no detail for anybody"
    return [answer.status_code for answer in answers]


# what is believed


def test_the_signature_is_that_of_mlflow():
    from mlflow.webhooks.delivery import _generate_hmac_signature

    body = event(name="ümläut")
    assert sign(SECRET, "an-id", str(NOW), body) == _generate_hmac_signature(
        SECRET.decode(), "an-id", str(NOW), body.decode()
    )


def test_a_genuine_delivery_wakes_the_lines_that_watch_the_model(send, runs):
    body = event("shared-experts", "3")
    assert statuses(send((delivery(body), body))) == [200]
    assert sorted(runs.made) == [("sales", "shared-experts v3"), ("support", "shared-experts v3")]


def test_an_older_secret_is_believed_while_it_is_listed(send, runs):
    body = event()
    assert statuses(send((delivery(body, OLDER), body), (delivery(body, STRANGERS), body))) == [200, 401]
    assert len(runs.made) == 1


@pytest.mark.parametrize(("age", "status"), [(-WINDOW, 200), (WINDOW, 200), (-WINDOW - 1, 401), (WINDOW + 1, 401)])
def test_a_delivery_is_believed_within_five_minutes_either_way(send, age, status):
    body = event()
    assert statuses(send((delivery(body, stamp=int(NOW - age)), body))) == [status]


def test_a_replay_changes_nothing_and_a_retry_after_a_failure_does(send, runs):
    body = event()
    headers = delivery(body)
    runs.broken = True
    assert statuses(send((headers, body))) == [503]
    runs.broken = False
    assert statuses(send((headers, body), (headers, body))) == [200, 200]
    assert runs.made == [("support", "support-experts v7")]


@pytest.mark.parametrize(
    "change",
    [
        {SIGNATURE: ""},
        {SIGNATURE: "v1,"},
        {SIGNATURE: "v1,ÿþ"},
        {ID: ""},
        {ID: "a b"},
        {ID: "x" * 201},
        {STAMP: ""},
        {STAMP: "nan"},
        {STAMP: "1e9"},
        {STAMP: f"-{NOW}"},
        {STAMP: "٣" * 10},
        {STAMP: "9" * 400},
    ],
)
def test_headers_that_no_mlflow_sends_are_not_believed(send, runs, change):
    body = event()
    headers = {key: value.encode("utf-8") for key, value in {**delivery(body), **change}.items()}
    assert statuses(send((headers, body))) == [401]
    assert runs.made == []


def test_a_receiver_needs_a_secret():
    for none in ((), (b"",), (SECRET, b"")):
        with pytest.raises(ValueError, match="a secret is needed"):
            Deliveries(none)


# what it is about


@pytest.mark.parametrize(
    ("body", "woken"),
    [
        (event(), {"support": "support-experts v7"}),
        (event("unknown"), {}),
        (event("sleeper-experts"), {}),
        (
            event("support", "2", "model_version_alias", alias="champion"),
            {"support": "support@champion on v2 2027-01-15"},
        ),
        (event("support", "5", "model_version_alias", alias="champion"), {}),
        (event("support", "2", "model_version_alias", alias="best"), {}),
        (event("sales", "2", "model_version_alias", alias="champion"), {"sales": "sales@champion on v2 2027-01-15"}),
        (event("sleeper", "2", "model_version_alias", alias="champion"), {}),
        (event("support-experts", "2", "model_version_alias", alias="best"), {}),
        (event(kind="prompt"), {}),
        (event(version="8; DROP"), {"support": "support-experts v8; DROP"}),
    ],
)
def test_what_an_event_may_be_about(config, body, woken):
    assert lines_for(body, config.lines, {"support": 5}.get) == woken


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"null", b'{"data": []}', b"\xff", b"[" * 10_000])
def test_what_is_signed_and_no_event_is_refused(send, runs, body):
    assert statuses(send((delivery(body), body))) == [400]
    assert runs.made == []


# waking


def test_a_burst_is_one_run_at_once_and_one_after_it():
    async def burst():
        runs = Runs()
        waker = Waker(runs.make, quiet=0.2)
        begun = asyncio.get_running_loop().time()
        await waker.wake("support", "v0")
        first = asyncio.get_running_loop().time() - begun
        await asyncio.gather(
            *(waker.wake("support", f"v{number}") for number in range(1, 1000)), waker.wake("sales", "v1")
        )
        return runs.made, first, asyncio.get_running_loop().time() - begun

    made, first, last = asyncio.run(burst())
    assert sorted(made) == [("sales", "v1"), ("support", "v0"), ("support", "v1")]
    assert first < 0.1
    assert last >= 0.2


def test_who_hangs_up_does_not_take_the_others_run_along():
    async def hang_up():
        runs = Runs()
        waker = Waker(runs.make, quiet=0.1)
        await waker.wake("support", "v0")
        impatient = asyncio.create_task(waker.wake("support", "v1"))
        patient = asyncio.create_task(waker.wake("support", "v2"))
        await asyncio.sleep(0)
        impatient.cancel()
        await patient
        return runs.made

    assert asyncio.run(hang_up()) == [("support", "v0"), ("support", "v1")]


def test_after_a_failure_the_next_hint_tries_again():
    async def fail_once():
        runs = Runs()
        waker = Waker(runs.make, quiet=0.0)
        runs.broken = True
        with pytest.raises(FoldinError, match="Prefect does not answer"):
            await waker.wake("support", "v1")
        runs.broken = False
        await waker.wake("support", "v2")
        return runs.made

    assert asyncio.run(fail_once()) == [("support", "v2")]


def test_after_failures_the_line_is_woken_though_nobody_tells_again(monkeypatch):
    monkeypatch.setattr(waking, "AFTER", 0.02)

    async def fail_for_a_while():
        runs = Runs()
        waker = Waker(runs.make, quiet=0.0)
        runs.broken = True
        with pytest.raises(FoldinError, match="Prefect does not answer"):
            await waker.wake("support", "v1")
        await asyncio.sleep(0.2)
        runs.broken = False
        await asyncio.sleep(0.2)
        return runs.made

    assert asyncio.run(fail_for_a_while()) == [("support", "v1")]


# ten thousand


def flipped(text, draw):
    place = draw.randrange(len(text) * 8)
    found = bytearray(text)
    found[place // 8] ^= 1 << place % 8
    return bytes(found)


def forged(draw, genuine):
    """(headers, body, the status it must have) of one delivery that must wake nobody."""
    body = event(draw.choice(["support-experts", "sales-experts", "shared-experts"]), f"evil {draw.random()}")
    headers, kind = delivery(body), draw.randrange(9)
    if kind == 0:
        return delivery(body, STRANGERS), body, 401
    if kind == 1:
        return headers, flipped(body, draw), 401
    if kind == 2:  # still a header that HTTP can carry
        place = draw.randrange(3, len(headers[SIGNATURE]))
        other = "A" if headers[SIGNATURE][place] != "A" else "B"
        return {**headers, SIGNATURE: headers[SIGNATURE][:place] + other + headers[SIGNATURE][place + 1 :]}, body, 401
    if kind == 3:
        return delivery(body, stamp=NOW + draw.choice([-1, 1]) * draw.randrange(301, 10**6)), body, 401
    if kind == 4:
        return headers, body[: draw.randrange(len(body))], 401
    if kind == 5:
        large = body + b" " * (MOST_BYTES + draw.randrange(MOST_BYTES))
        return delivery(large), large, 413
    if kind == 6:
        headers.pop(draw.choice([ID, STAMP, SIGNATURE]))
        return headers, body, 401
    if kind == 7:
        return {**headers, draw.choice([ID, STAMP]): str(draw.randrange(10**9))}, body, 401
    old, body = draw.choice(genuine)
    return old, body, 200  # a replay


def test_ten_thousand_deliveries_of_which_few_are_genuine(send, runs):
    draw = random.Random(20261122)
    genuine, sent, expected = [], [], []
    for number in range(10_000):
        if number == 0 or draw.random() < 0.02:
            body = event("support-experts", str(len(genuine) + 1))
            genuine.append((delivery(body), body))
            sent.append(genuine[-1])
            expected.append(200)
        else:
            headers, body, status = forged(draw, genuine)
            sent.append((headers, body))
            expected.append(status)
    assert statuses(send(*sent)) == expected
    assert runs.made == [("support", f"support-experts v{number + 1}") for number in range(len(genuine))]
    assert Counter(expected)[200] > len(genuine) > 100
    assert not re.search("evil", str(runs.made))
