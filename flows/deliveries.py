"""Which deliveries of MLflow's webhooks are genuine: signed with a secret we know, fresh, and not seen before.

The scheme is MLflow's (`mlflow/webhooks/delivery.py`), which follows https://www.standardwebhooks.com.
"""

import base64
import hmac
import re
import time
from collections.abc import Callable, Mapping, Sequence

from cachetools import TTLCache

ID, STAMP, SIGNATURE = "X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature"
WINDOW = 300.0  # seconds; MLflow's retries carry the first time stamp, and come within about 130
MOST_SEEN = 100_000  # only genuine ones are remembered; a forgotten one wakes a line once more


def sign(secret: bytes, identity: str, stamp: str, body: bytes) -> str:
    """What MLflow writes into the signature's header."""
    digest = hmac.digest(secret, f"{identity}.{stamp}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(digest).decode()}"


class Deliveries:
    """Those that came lately. Not safe for several threads."""

    def __init__(self, secrets: Sequence[bytes], clock: Callable[[], float] = time.time) -> None:
        """Believe what is signed with any of the secrets; `clock` gives seconds since 1970."""
        if not all(secrets) or not secrets:
            raise ValueError("a secret is needed, and none may be empty")
        self._secrets, self._clock = secrets, clock
        self._seen: TTLCache[str, None] = TTLCache(MOST_SEEN, 2 * WINDOW, timer=clock)  # a stamp may be ahead as well

    def identity(self, headers: Mapping[str, str], body: bytes) -> str | None:
        """The id of a genuine delivery; None for any other, whatever is wrong with it."""
        identity, stamp = headers.get(ID, ""), headers.get(STAMP, "")
        if not re.fullmatch(r"[\x21-\x7e]{1,200}", identity) or not re.fullmatch(r"[0-9]{1,12}", stamp):
            return None
        given = headers.get(SIGNATURE, "").encode("latin-1", "replace")
        # All are compared: how long it takes must not tell which secret was nearest.
        signed = [hmac.compare_digest(given, sign(each, identity, stamp, body).encode()) for each in self._secrets]
        fresh = abs(self._clock() - int(stamp)) <= WINDOW
        return identity if any(signed) and fresh else None

    def is_new(self, identity: str) -> bool:
        """Whether a genuine delivery was not noted yet."""
        return identity not in self._seen

    def note(self, identity: str) -> None:
        """Remember a genuine delivery that was acted on; one that failed may come again."""
        self._seen[identity] = None
