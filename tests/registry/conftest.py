"""What the registry's tests share: a machine on which no more files can be opened."""

import os
import resource
from contextlib import contextmanager

import pytest


@pytest.fixture
def descriptors():
    """A function that leaves this process a number of descriptors to open, until the block ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    @contextmanager
    def left(free):
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return left
