"""Whole numbers in few bytes: small ones take few bits, runs of equal ones next to none.

Numbers are mapped to 0, 1, 2, ... in the order 0, -1, 1, -2, ..., cut into planes of bytes, and the planes deflated
(RFC 1951), with runs and Huffman codes but no search for repeats: weights repeat nothing else.

>>> stream = encoded(torch.tensor([0, -1, 300, 0]))
>>> decoded(stream, 4).tolist()
[0, -1, 300, 0]
"""

import zlib

import torch
from torch import Tensor

from merging.method import MergeError

LARGEST = 2**30  # of a number's size, so that 32 bits hold it and its sign
RAW = -15  # deflate without a header, with the largest window


def encoded(numbers: Tensor) -> Tensor:  # (n,), any integer dtype, each below LARGEST in size -> (bytes,), uint8
    """The numbers as bytes: how many planes there are, then the planes, lowest first."""
    folded = torch.where(numbers < 0, -2 * numbers - 1, 2 * numbers).to(torch.int32)
    planes = (int(folded.max()).bit_length() + 7) // 8 if len(folded) else 0
    deflate, stream = zlib.compressobj(9, zlib.DEFLATED, RAW, 9, zlib.Z_RLE), bytearray([planes])
    for plane in range(planes):
        stream += deflate.compress(((folded >> 8 * plane) & 255).to(torch.uint8).numpy().data)
    stream += deflate.flush()
    return torch.frombuffer(stream, dtype=torch.uint8)


def decoded(stream: Tensor, count: int) -> Tensor:  # (bytes,), uint8 -> (count,), int32
    """What `encoded` was given; never more memory than `count` numbers take.

    Raises:
        MergeError: the bytes are not those of `count` numbers.
    """
    planes = int(stream[0]) if stream.dtype == torch.uint8 and stream.ndim == 1 and len(stream) else -1
    content = _inflated(stream, planes * count) if 0 <= planes <= 4 else None
    if content is None:
        raise MergeError(f"the bytes are not those of {count} numbers; restore them from a copy")
    folded = torch.zeros(count, dtype=torch.int32)
    rows = torch.frombuffer(content, dtype=torch.uint8).reshape(planes, count) if content else ()
    for plane, row in enumerate(rows):
        folded |= row.to(torch.int32) << 8 * plane
    return (folded >> 1) ^ -(folded & 1)


def _inflated(stream: Tensor, size: int) -> bytearray | None:
    """The content after the first byte, if it has this size; None where it has another, or cannot be read."""
    inflate = zlib.decompressobj(RAW)
    try:
        content = inflate.decompress(stream[1:].numpy().tobytes(), size + 1)  # 0 would be no limit
    except zlib.error:
        return None
    return bytearray(content) if len(content) == size and inflate.eof and not inflate.unused_data else None
