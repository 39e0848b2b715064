"""Waiting for what comes sooner or later."""

import time


def wait_until(true, seconds=20):
    """Until `true()` is; what it was last when that takes longer."""
    patience = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < patience, f"not after {seconds} s: {found!r}"
        time.sleep(0.05)
    return found
