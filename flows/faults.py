"""What goes wrong while tensors are folded, said with the tensor's name, and whose fault it is."""

from collections.abc import Iterator
from contextlib import contextmanager

from registry.files import shown
from registry.records import FoldinError, Refusal

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # how torch says it, by device


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """What cannot be folded is said with the tensor's name, and is the expert's fault; too little memory is not."""
    from merging import MergeError

    try:
        yield
    except MergeError as error:
        raise FoldinError(unfoldable(name, "the tensor cannot be folded", str(error))) from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY)):
            raise
        what, remedy = "there is too little memory for the tensor", "set workers to a smaller number, or use a machine"
        refusal = Refusal("E_MEMORY", what, "", "", name, "", shown(str(error)), f"{remedy} with more memory")
        raise FoldinError(refusal) from error


def unfoldable(name: str, what: str, found: str) -> Refusal:
    """The refusal of an expert whose change of a tensor cannot be merged."""
    remedy = "look at the expert's training; its change of this tensor is too large to be merged"
    return Refusal("E_FOLD", what, "", "", name, "finite values", found, remedy)
