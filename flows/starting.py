"""The beginning of a line: its base, registered as version 1 and champion, so that everything after has a parent."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from flows.admission import base_digests
from flows.champion import follow
from flows.leasing import held
from flows.memory import STATE_FILE, STATE_FORMAT, Memory
from flows.options import LineConfig
from flows.plan import numerics_profile
from flows.publishing import register, write_version_manifest
from flows.settings import check_settings
from flows.telling import say
from flows.versions import PAGE_FILE, REPORT_FILE
from flows.wiring import House, merge_key
from registry import intake
from registry.files import write_atomic, write_json
from registry.manifests import SIGNATURE
from registry.records import FoldinError, Merge, Refusal
from registry.verdicts import Outcome, Report, Verdict


def start(house: House, line: str, settings: LineConfig) -> int:
    """The version that holds the base of a line, registered now or before.

    Raises:
        FoldinError: E_BASE when the base is missing, is not a checkpoint, or has another digest than configured;
            before that, as `check_settings`.
    """
    check_settings(settings, line)
    known = _started(house, line, settings)
    if known is not None:
        return known
    copy = _admit(house, line, settings)
    digest = _digest(copy, line, settings)
    key = merge_key(line, "", digest, "", {}, settings)
    _check_name_is_free(house, line, key)
    house.ledger.add_line(line, digest)
    with held(house, line, told=say) as lease:
        known = _started(house, line, settings)  # another process may have been first
        if known is not None:
            return known
        verdict = Verdict(Outcome.PASSED)
        merge = Merge(key, line, None, None, verdict)
        house.ledger.record_verdict(lease, merge)
        scratch = house.work(line) / key
        folder = _build(scratch / "candidate", copy, settings, digest)
        write_version_manifest(folder, line, key, None, verdict, {}, far=bool(house.far))
        run = house.mlflow.runs.run_for(line, key, f"{line}: base", {"foldin.verdict": "passed"})
        house.mlflow.runs.show(run, params={"line": line, "base": digest}, metrics={}, tags={}, artifacts=[])
        version, manifest = register(house, line, key, run, folder, {}, 0)
        done = replace(merge, version=version, manifest_sha256=manifest)
        follow(house, lease, house.ledger.commit(lease, done))
        shutil.rmtree(scratch, ignore_errors=True)
    return version


def _started(house: House, line: str, settings: LineConfig) -> int | None:
    """The version that holds the line's base, when the line was started; it must be the base that is configured."""
    root = next((number for number, parent in house.ledger.parents(line).items() if parent is None), None)
    if root is None or house.ledger.line(line).champion is None:
        return None
    if settings.base_sha256:
        accepted = base_digests(house.mlflow.folder(line, root), house.ledger.line(line).base_sha256, f"{line} v{root}")
        _check_base(settings, line, accepted)
    return root


def _check_name_is_free(house: House, line: str, key: str) -> None:
    """Nothing, when MLflow holds nothing under the line's name but what an interrupted start of it left there."""
    mine = house.mlflow.registered(line, key)
    strange = [version for version in house.mlflow.versions(line) if version != mine]
    if strange or (house.mlflow.exists(line) and house.mlflow.champion(line) is not None):
        raise FoldinError(
            Refusal(
                code="E_ALIAS",
                what="MLflow has a registered model of the line's name that this ledger does not know",
                where=f"line {line}",
                found=f"{len(strange)} other versions" if strange else "an alias champion",
                remedy="if it was lost, put it back with `foldin doctor --rebuild`; else choose another name",
            )
        )


def _admit(house: House, line: str, settings: LineConfig) -> intake.Admitted:
    """The base's copy in the content store; it must be a whole checkpoint of a known architecture."""
    from evaluation.models import check_config

    source = house.config.path(settings.base)
    where = f"base of line {line}"
    if not source.is_dir():
        raise FoldinError(
            Refusal(
                code="E_BASE",
                what="there is no such folder",
                where=where,
                expected="a folder with config.json and *.safetensors",
                found=str(source),
                remedy=f"correct base in [lines.{line}] of foldin.toml",
            )
        )
    copy = intake.admit(source, house.experts, where)
    refusal = copy if isinstance(copy, Refusal) else check_config(copy.folder, where)
    if refusal:
        raise FoldinError(refusal)
    assert isinstance(copy, intake.Admitted)
    return copy


def _digest(copy: intake.Admitted, line: str, settings: LineConfig) -> str:
    """The content digest of the base's weights, every value of them finite."""
    from merging.check import check_finite
    from registry.weights import Checkpoint, content_sha256

    where, wrong = f"base of line {line}", []
    checkpoint = Checkpoint.open(copy.folder, where)
    digest, _ = content_sha256(checkpoint, visit=lambda name, tensor: wrong.append(check_finite(name, tensor)))
    for found in filter(None, wrong):
        remedy = f"give a base whose values are all finite in [lines.{line}]"
        raise FoldinError(Refusal(found.code, found.what, where, "", found.tensor, found.expected, found.found, remedy))
    files = [sha for name, sha in copy.files_sha256.items() if name.endswith(".safetensors")]
    _check_base(settings, line, [digest, *(files if len(files) == 1 else [])])
    return digest


def _check_base(settings: LineConfig, line: str, accepted: list[str]) -> None:
    if settings.base_sha256 and settings.base_sha256 not in accepted:
        raise FoldinError(
            Refusal(
                code="E_BASE",
                what="the base has another digest than foldin.toml names",
                where=f"base of line {line}",
                expected=settings.base_sha256,
                found=" or ".join(accepted),
                remedy=f"restore the base, or correct base_sha256 in [lines.{line}]",
            )
        )


def _build(folder: Path, copy: intake.Admitted, settings: LineConfig, digest: str) -> Path:
    """The base as a version's folder: its files as they are, an empty memory, an empty report."""
    from evaluation.page import as_html
    from evaluation.report import Record, as_json
    from merging.catalogue import parameters_of

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(copy.folder, folder, ignore=shutil.ignore_patterns(SIGNATURE))
    profile = numerics_profile("cpu" if settings.runner.pool else settings.device)  # nothing is computed here
    parameters = parameters_of(settings.method, settings.parameters)
    memory = Memory(settings.method, parameters, digest, digest, profile=profile)
    write_json(folder / STATE_FILE, {"format": STATE_FORMAT, **asdict(memory)})
    record = Record(Report(digest, {}))
    write_json(folder / REPORT_FILE, as_json(record))
    write_atomic(folder / PAGE_FILE, as_html(record, "the base").encode())
    return folder
