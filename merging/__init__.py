"""How: pure mathematics on tensors. torch and the standard library, nothing else."""

from merging import check, fold, measure
from merging.catalogue import METHODS, build
from merging.in_memory import merge
from merging.method import MergeError, Stats

__all__ = ["METHODS", "MergeError", "Stats", "build", "check", "fold", "measure", "merge"]
