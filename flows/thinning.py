"""Old versions without their serving weights: base and state give the same bytes again, when somebody wants them.

What an expert never changed is in no state, so it is stored once, with the base (ADR 21). Nothing is given up before it
was had back once, to the byte.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.config import LineConfig
from flows.passes import materialise
from flows.plan import numerics_profile
from flows.planning import plan_to_read
from flows.pool import devices_of
from flows.telling import say
from flows.versions import Version, chain, open_version, thin
from flows.wiring import House
from registry.files import verify_manifest
from registry.records import FoldinError, Lease, Refusal
from registry.serving import serving_files

SCRATCH = "rebuilt-"  # begins the names of folders in a line's scratch


def thin_out(house: House, lease: Lease, number: int, because: str, who: str) -> None:
    """Give up the serving weights of a version, once it is proven that they can be had back. Each step is repeatable.

    Args:
        house: where the line is.
        lease: of the line.
        number: of a version that is not the base, and that no alias names.
        because: why; kept in the line's history.
        who: asks for it.

    Raises:
        FoldinError: E_THIN when base and state give other bytes here, E_ALIAS when an alias was put on the version
            meanwhile, E_DIGEST when it or the base is damaged; its files are then all there.
    """
    line = lease.line
    house.mlflow.files.forget(line, number)  # what counts is what is stored
    version = open_version(house, line, number)
    with rebuilt(house, line, version):
        pass
    house.ledger.leases.check(lease)
    if number in house.mlflow.aliased(line):
        what, remedy = "an alias names the version, so users may load it", "leave it whole"
        raise FoldinError(Refusal("E_ALIAS", what, f"{line} v{number}", remedy=remedy))
    if not version.thin:
        house.ledger.remark(lease, "thinned", f"v{number}: {because}", who)
    house.mlflow.thin(line, number, sorted(serving_files(version.folder)))


def restore(house: House, lease: Lease, number: int, because: str, who: str) -> None:
    """Give a thin version its serving weights back; nothing to do for any other. Each step is repeatable.

    Raises:
        FoldinError: E_THIN when base and state give other bytes here, E_DIGEST when one of them is damaged, E_MLFLOW
            when what was uploaded did not arrive; the version then stays thin.
    """
    line = lease.line
    if number not in thin(house, line):
        return
    house.mlflow.files.forget(line, number)
    version = open_version(house, line, number, whole=True)
    if verify_manifest(version.folder):  # else a run was killed before it removed them, or after it put them back
        say(f"{line} v{number}: its weights are made again from the base and its state")
        with rebuilt(house, line, version) as folder:
            house.ledger.leases.check(lease)
            house.mlflow.files.put(line, number, folder, sorted(serving_files(version.folder)))
    _check_arrived(house, line, number)
    house.mlflow.unlabel(line, number)
    house.ledger.remark(lease, "restored", f"v{number}: {because}", who)


def _check_arrived(house: House, line: str, number: int) -> None:
    stored = house.mlflow.folder(line, number)
    house.mlflow.files.look_again(stored)
    wrong = verify_manifest(stored)
    if wrong:
        what = "the weights that were put back did not arrive whole"
        raise FoldinError(replace(wrong[0], code="E_MLFLOW", what=what, where=f"{line} v{number}"))


def had_back(house: House, lease: Lease, version: Version, because: str, who: str) -> Version:
    """A version with its serving weights; arguments and errors as of `restore`."""
    restore(house, lease, version.number, because, who)
    return open_version(house, lease.line, version.number) if version.thin else version


@contextmanager
def rebuilt(house: House, line: str, version: Version) -> Iterator[Path]:
    """A folder with the serving weights of a version, made of base and state; gone when the block ends.

    Raises:
        FoldinError: E_THIN when they are not, to the byte, those that the version's manifest lists; as `open_version`
            for the base, and as `materialise`.
    """
    base = open_version(house, line, chain(house, line, version.number)[-1])
    work = house.work(line)
    work.mkdir(parents=True, exist_ok=True)
    for left in work.glob(f"{SCRATCH}*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=work, prefix=SCRATCH, ignore_cleanup_errors=True) as scratch:
        made = read_again(Path(scratch), house.config.line(line), base, version)
        listed = serving_files(version.folder)
        if made != listed:
            raise FoldinError(_other_bytes(f"{line} v{version.number}", version, listed, made, house.config.line(line)))
        yield Path(scratch)


def read_again(folder: Path, settings: LineConfig, base: Version, version: Version) -> Mapping[str, str]:
    """Make the serving weights of a version in a folder, from base and state: file -> SHA-256 of what was written."""
    from merging import Stats

    devices = devices_of(_device(settings), int(settings.workers) if settings.workers.isdigit() else 0)
    plan = plan_to_read(settings, base, version)
    return materialise(folder, plan.slots, plan, Stats(*version.memory.stats), devices).files


def _device(settings: LineConfig) -> str:
    """The line's device, or the processor where there is no such one: a rollback must not need a GPU."""
    import torch

    return settings.device if torch.cuda.is_available() else "cpu"


def _other_bytes(
    where: str, version: Version, listed: Mapping[str, str], made: Mapping[str, str], settings: LineConfig
) -> Refusal:
    file = min(name for name in {*listed, *made} if listed.get(name) != made.get(name))
    then, now = dict(version.memory.profile), numerics_profile(_device(settings))
    told = ", ".join(f"{key} {value}" for key, value in then.items())
    remedy = f"do it where the version was made: {told}" if then != now else "choose another version"
    what = "base and state do not give the version's serving weights here"
    expected, found = (each.get(file, "no such file")[:12] for each in (listed, made))
    return Refusal("E_THIN", what, where, file, "", expected, found, remedy)
