"""How good: suites, metrics, the gate, the report and its pictures."""

from evaluation.suites import Examples, Suite, input_digests, load_suite, read_examples, write_suite

__all__ = ["Examples", "Suite", "input_digests", "load_suite", "read_examples", "write_suite"]
