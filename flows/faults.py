"""What goes wrong while an expert is read and folded, and whose fault it is: its own, the base's, or the machine's."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from registry.files import shown
from registry.records import FoldinError, Refusal

T = TypeVar("T")

# How torch says it in a RuntimeError: on processors, of a mapped file, on GPUs, and where a GPU's library has none.
NO_MEMORY = (
    *("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or its device has too little memory, which is no expert's fault."""
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        return any(sign in str(error) for sign in NO_MEMORY)
    return isinstance(error, MemoryError)


def refused_by_system(error: Exception) -> Refusal:
    """What to say when the operating system or the network refused something."""
    what, remedy = "the system refused something", "free space, or repair what it names, and run this again"
    return Refusal("E_SYSTEM", what, found=shown(str(error)), remedy=remedy)


def with_room(device: str, work: Callable[[], T]) -> T:
    """What `work` returns; tried once more, after all that torch keeps for later was given back, when a GPU is full."""
    import torch

    try:
        return work()
    except RuntimeError as error:
        if device == "cpu" or not is_out_of_memory(error):
            raise
    # Outside of the handler: the error holds the frames, and with them the tensors of the first try.
    gc.collect()
    torch.cuda.empty_cache()
    return work()


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """What cannot be folded is said with the tensor's name, and is the expert's fault; too little memory is not."""
    from merging import MergeError

    try:
        yield
    except MergeError as error:
        raise FoldinError(unfoldable(name, "the tensor cannot be folded", str(error))) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what, remedy = "there is too little memory for the tensor", "set workers to a smaller number, or use a machine"
        refusal = Refusal("E_MEMORY", what, "", "", name, "", shown(str(error)), f"{remedy} with more memory")
        raise FoldinError(refusal) from error


@contextmanager
def said_of(where: str) -> Iterator[None]:
    """Whatever is refused in the block is said of `where`, whoever found it and under whatever name."""
    try:
        yield
    except FoldinError as error:
        raise FoldinError(replace(error.refusal, where=where)) from error


def unfoldable(name: str, what: str, found: str) -> Refusal:
    """The refusal of an expert whose change of a tensor cannot be merged."""
    remedy = "look at the expert's training; its change of this tensor is too large to be merged"
    return Refusal("E_FOLD", what, "", "", name, "finite values", found, remedy)
