"""Whether a line's settings can be used, asked before any work."""

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from flows.options import LineConfig
from flows.signing import check_signing
from registry.records import FoldinError, Refusal

CORRECT = "correct it in foldin.toml"


def check_settings(settings: LineConfig, line: str) -> None:
    """Nothing, when a line's settings can be used. Asked before any work: a typing error must not cost an expert.

    Raises:
        FoldinError: E_CONFIG for a method, parameter, gate rule, schedule or device that cannot be used,
            E_SUITE for a suite of the line's own that cannot be read; with the table, what was expected and found.
    """
    from evaluation.rules import rules_from
    from evaluation.suites import load_suite
    from merging import MergeError, build

    where = f"[lines.{line}] of foldin.toml"
    try:
        build(settings.method, settings.parameters)
    except MergeError as error:
        what, _, remedy = str(error).rpartition("; ")
        raise _unusable(f"[lines.{line}] method", what or remedy, remedy=remedy.rstrip("?") if what else "") from error
    try:
        rules_from(settings.gate, f"[lines.{line}.gate] of foldin.toml")
        for table, folders in (("suites", settings.suites), ("guards", settings.guards)):
            for task, folder in folders.items():
                suite = load_suite(
                    Path(folder), task=task, where=f"suite of task {task} in [lines.{line}.{table}]", trusted=True
                )
                if table == "guards" and suite.kind.endswith("-classification"):
                    what, expected = "a guard needs a head, which no expert brings", "a suite of another kind"
                    raise _unusable(f"[lines.{line}.guards] {task}", what, expected, suite.kind)
        for method in settings.search.methods:
            _check_fallback(settings.method, method, f"[lines.{line}.search]")
    except FoldinError as error:
        raise FoldinError(replace(error.refusal, remedy=error.refusal.remedy or CORRECT)) from error
    check_signing(settings, line)
    check_schedule(settings, line)
    if not settings.runner.pool:  # else it is another machine's
        _check_device(settings.device, where)
    _check_workers(settings.workers, where)


def _check_fallback(own: str, method: str, where: str) -> None:
    from merging import METHODS, build

    sums = [name for name in METHODS if name != own and build(name, {}).additive]
    if method not in sums or not build(own, {}).additive:
        expected = f"one of {', '.join(sums)}" if build(own, {}).additive else f"none beside {own}"
        raise _unusable(where, "a method cannot go on from the line's state", expected, method)


def _check_workers(workers: str, where: str) -> None:
    if not re.fullmatch(r"|[1-9]\d*|(tcp|tls)://[^\s/]+:\d+", workers):
        expected = "a number of cores such as '2', or a Dask scheduler, 'tcp://HOST:PORT'"
        raise _unusable(where, "workers is neither a number nor an address", expected, workers)
    if "://" in workers and find_spec("prefect_dask") is None:
        remedy = "install foldin[dask], or give a number of cores"
        raise _unusable(where, "workers names a Dask scheduler, and prefect-dask is not installed", "", workers, remedy)


def check_schedule(settings: LineConfig, line: str) -> None:
    """Nothing, when the cron is one by the words of who will read it, Prefect; raises as `check_settings`."""
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=settings.schedule, timezone=settings.timezone)
    except ValueError as error:
        where, expected = f"[lines.{line}] of foldin.toml", "minute, hour, day, month, weekday, such as '0 2 * * *'"
        raise _unusable(where, "the schedule is not a cron", expected, settings.schedule) from error


def _check_device(device: str, where: str) -> None:
    """A device that is here; an unknown one would fail at the first fold, after the expert was fetched and read."""
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise _unusable(where, "the device is unknown", "cpu, cuda or cuda:N", device)
    here = torch.cuda.device_count()
    if device != "cpu" and int(device.partition(":")[2] or 0) >= here:
        expected = f"one of cpu, {', '.join(f'cuda:{number}' for number in range(here))}" if here else "cpu"
        raise _unusable(where, "this machine has no such device", expected, device)


def _unusable(where: str, what: str, expected: str = "", found: str = "", remedy: str = "") -> FoldinError:
    shown = repr(found) if found else ""
    return FoldinError(Refusal("E_CONFIG", what, where, "", "", expected, shown, remedy or CORRECT))
