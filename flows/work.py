"""What one merge works with, and what it is called."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from flows.admission import Admitted
from flows.naming import listed
from flows.options import LineConfig
from flows.scoring import own_suites
from flows.thinning import had_back
from flows.versions import Version, chain, open_version, with_files
from flows.wiring import House, merge_key
from registry.records import Expert, ExpertVersion, Lease


class Member(NamedTuple):
    """An expert that is folded in the same pass as others."""

    expert: Expert
    found: ExpertVersion  # as MLflow shows it
    admitted: Admitted


class Work(NamedTuple):
    """What one merge works with."""

    house: House
    settings: LineConfig
    lease: Lease
    expert: Expert
    found: ExpertVersion  # the expert as MLflow shows it
    base: Version
    parent: Version
    suites: Mapping[str, str]  # of the line's own and its guards: name -> identity
    others: tuple[Member, ...] = ()  # folded before `expert`, in the same pass

    @property
    def experts(self) -> tuple[Expert, ...]:
        """All that are folded, in their order."""
        return (*(each.expert for each in self.others), self.expert)

    @property
    def name(self) -> str:
        """Of the experts, for people."""
        return listed([each.name for each in self.experts])

    def key(self, admitted: Admitted) -> str:
        """The merge's name, made of everything that decides its result."""
        before = [f"{each.expert.name}:{each.admitted.tree_sha256}:{each.admitted.weight}" for each in self.others]
        # Registered again, the same files are judged anew.
        experts = ", ".join([*before, f"{self.expert.name}:{admitted.tree_sha256}"])
        tasks = [*(each.admitted for each in self.others), admitted]
        suites = {**self.suites, **{each.task: each.suite.sha256 for each in tasks}}
        parts = (self.parent.manifest_sha256, experts, ", ".join(each.task for each in tasks), suites)
        key = merge_key(self.lease.line, *parts, self.settings, admitted.weight)
        there = {None, *with_files(self.house, self.lease.line)}
        while (known := self.house.ledger.merge(key)) and known.version not in there:
            key = hashlib.sha256(f"{key}:again".encode()).hexdigest()  # the files of the last one are gone
        return key

    def scratch(self, admitted: Admitted) -> Path:
        """The folder of this merge alone."""
        return self.house.work(self.lease.line) / self.key(admitted)

    def run(self, admitted: Admitted) -> str:
        """The MLflow run that shows the merge."""
        line, tags = self.lease.line, {"foldin.expert": self.name}
        return self.house.mlflow.runs.run_for(line, self.key(admitted), f"{line}: {self.name}", tags)


def work_on(
    at: House, settings: LineConfig, lease: Lease, expert: Expert, found: ExpertVersion, into: int | None = None
) -> Work:
    """Everything a merge reads, verified: the version it folds into, the champion when None, and the base."""
    number = into or at.ledger.line(lease.line).champion
    assert number is not None, "reconcile lets nothing be folded before the base is champion"
    parent = had_back(at, lease, number, f"{expert.name} is folded into it", "foldin")
    first = chain(at, lease.line, number)[-1]
    base = parent if first == number else open_version(at, lease.line, first)
    return Work(at, settings, lease, expert, found, base, parent, own_suites(settings))
