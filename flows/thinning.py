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

from flows.options import LineConfig
from flows.passes import materialise
from flows.placing import here
from flows.plan import numerics_profile
from flows.planning import plan_to_read
from flows.pool import devices_of
from flows.telling import say
from flows.versions import Found, Version, chain, extents, find_merge, look_at, open_version, opened
from flows.wiring import House
from registry.lineage import Extent
from registry.manifests import MANIFEST
from registry.records import FoldinError, Lease, Refusal
from registry.serving import STATE, serving_files

SCRATCH = "rebuilt-"  # begins the names of folders in a line's scratch


def thin_out(house: House, lease: Lease, base: Version, number: int, because: str, who: str) -> None:
    """Give up the serving weights of a version, once it is proven that they can be had back. Each step is repeatable.

    Args:
        house: where the line is.
        lease: of the line.
        base: the line's first version, opened whole.
        number: of another one, that no alias names.
        because: why; kept in the line's history.
        who: asks for it.

    Raises:
        FoldinError: E_THIN when base and state give other bytes here, E_ALIAS when an alias was put on the version
            meanwhile, E_DIGEST when it or the base is damaged; its files are then all there. E_FENCED when the line was
            taken over; what was removed is then there again.
    """
    line = lease.line
    house.mlflow.files.forget(line, number)  # what counts is what is stored, not what is kept of it here
    version = open_version(house, line, number, whole=True)
    with rebuilt(house, line, base, version) as folder:
        house.ledger.leases.check(lease)
        check_unnamed(house, line, number)
        if not version.thin:
            house.ledger.remark(lease, "thinned", f"v{number}: {because}", who)
        _remove(house, lease, version, folder)


def check_unnamed(house: House, line: str, number: int) -> None:
    """Nothing, while no alias names a version; else E_ALIAS: its files stay."""
    if number in house.mlflow.aliased(line):
        what, remedy = "an alias names the version, so users may load it", "leave it whole"
        raise FoldinError(Refusal("E_ALIAS", what, f"{line} v{number}", remedy=remedy))


def _remove(house: House, lease: Lease, version: Version, again: Path) -> None:
    """Remove a version's serving weights; `again` holds them.

    MLflow cannot check the fence. A run that is paused between a check and a removal may remove late what whoever took
    over found there, and had back by that, or has made champion. So whoever was overtaken puts everything back, which
    at worst is in the way until the next `gc`; when it dies before, the next watch does (`champion.mend_served`).
    """
    line, number, names = lease.line, version.number, sorted(serving_files(version.folder))
    try:
        house.mlflow.label(line, number, {STATE: Extent.THIN})
        for name in names:
            house.ledger.leases.check(lease)
            house.mlflow.files.drop(line, number, [name])
        house.ledger.leases.check(lease)
    except FoldinError:
        extent = extents(house, line)[number]
        if house.ledger.leases.holder(line).fence != lease.fence and extent is not Extent.RETIRED:
            house.mlflow.files.put(line, number, again, names)
            if extent is Extent.WHOLE:
                house.mlflow.unlabel(line, number)
        raise


def restore(house: House, lease: Lease, number: int, because: str, who: str, *, whole: bool = True) -> Found:
    """The files of a version, its serving weights made again where they are not as its manifest lists them.

    That is so where they were given up; whatever else became of them, they can be made again. Each step is repeatable.

    Args:
        house: where the line is.
        lease: of the line.
        number: of the version.
        because: why; kept in the line's history.
        who: asks for it.
        whole: as in `look_at`, for a version that is not thin.

    Raises:
        FoldinError: E_THIN when base and state give other bytes here, E_DIGEST when one of them is damaged, E_MLFLOW
            when what was uploaded did not arrive; and as `look_at`. The version then stays as it is.
    """
    line = lease.line
    found = look_at(house, line, number, whole=whole).checked(weights=False)
    if found.thin or found.weights:
        house.mlflow.files.forget(line, number)  # perhaps it is only ours that is damaged
        found = look_at(house, line, number, whole=True).checked(weights=False)
    if not (found.thin or found.weights):
        return found
    if find_merge(house, line, number).parent is None:
        found.checked()  # the base is made of nothing else
    if found.weights:  # else a run was killed before it removed them, or after it put them back
        _make_again(house, lease, opened(line, number, found))
        found = look_at(house, line, number, whole=True)
        for wrong in (*found.others, *found.weights):
            what, remedy = "the weights that were put back did not arrive whole", "run it again"
            raise FoldinError(replace(wrong, code="E_MLFLOW", what=what, where=f"{line} v{number}", remedy=remedy))
    house.mlflow.unlabel(line, number)
    house.ledger.remark(lease, "restored", f"v{number}: {because}", who)
    return found._replace(thin=False)


def _make_again(house: House, lease: Lease, version: Version) -> None:
    line, number = lease.line, version.number
    say(f"{line} v{number}: its weights are made again from the base and its state")
    base = open_version(house, line, chain(house, line, number)[-1], whole=True)
    with rebuilt(house, line, base, version) as folder:
        house.ledger.leases.check(lease)
        house.mlflow.files.put(line, number, folder, sorted(serving_files(version.folder)))


def had_back(house: House, lease: Lease, number: int, because: str, who: str) -> Version:
    """A version with its serving weights; arguments and errors as of `restore`, but what is far is not read whole."""
    return opened(lease.line, number, restore(house, lease, number, because, who, whole=False))


def lacks_weights(house: House, line: str, number: int) -> bool:
    """Whether a serving file of a version is not where it should be, by the listing; only the manifest is read."""
    with house.mlflow.files.scratch() as folder:
        manifest = house.mlflow.files.single(line, number, MANIFEST, folder)
        listed = serving_files(folder) if manifest else {}
    return not listed.keys() <= house.mlflow.files.names(line, number)


@contextmanager
def rebuilt(house: House, line: str, base: Version, version: Version) -> Iterator[Path]:
    """A folder with the serving weights of a version, made of base and state; gone when the block ends.

    Raises:
        FoldinError: E_THIN when they are not, to the byte, those that the version's manifest lists; as `materialise`.
    """
    work = house.work(line)
    work.mkdir(parents=True, exist_ok=True)
    for left in work.glob(f"{SCRATCH}*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=work, prefix=SCRATCH, ignore_cleanup_errors=True) as scratch:
        settings = here(house.config.line(line))
        made = read_again(Path(scratch), settings, base, version)
        listed = serving_files(version.folder)
        if made != listed:
            raise FoldinError(_other_bytes(f"{line} v{version.number}", version, listed, made, settings))
        yield Path(scratch)


def read_again(folder: Path, settings: LineConfig, base: Version, version: Version) -> Mapping[str, str]:
    """Make the serving weights of a version in a folder, from base and state: file -> SHA-256 of what was written."""
    from merging import Stats

    devices = devices_of(settings.device, int(settings.workers) if settings.workers.isdigit() else 0)
    plan = plan_to_read(settings, base, version)
    return materialise(folder, plan.slots, plan, Stats(*version.memory.stats), devices).files


def _other_bytes(
    where: str, version: Version, listed: Mapping[str, str], made: Mapping[str, str], settings: LineConfig
) -> Refusal:
    file = min(name for name in {*listed, *made} if listed.get(name) != made.get(name))
    then, now = dict(version.memory.profile), numerics_profile(settings.device)
    told = ", ".join(f"{key} {value}" for key, value in then.items())
    remedy = f"do it where the version was made: {told}" if then != now else "choose another version"
    what = "base and state do not give the version's serving weights here"
    expected, found = (each.get(file, "no such file")[:12] for each in (listed, made))
    return Refusal("E_THIN", what, where, file, "", expected, found, remedy)
