"""Which verdicts a person may overrule. Pure: a verdict and the line's setting in, a verdict out."""

from dataclasses import replace

from registry.verdicts import Outcome, Verdict

APPROVALS = ("never", "on-reject", "always")


def under_approval(verdict: Verdict, approval: str) -> Verdict:
    """The verdict, or the same one waiting for a person where the line asks for one.

    Args:
        verdict: the gate's.
        approval: one of APPROVALS: "on-reject" lets what was rejected wait, "always" what passed as well.

    What failed a hard check (a safety suite, or what could not be measured) stays rejected under every setting. So do a
    rejection that names no failed check, and one before the last rung: nobody can wave through what was not measured.
    """
    if approval not in APPROVALS:
        raise ValueError(f"approval is {approval!r}, not one of {', '.join(APPROVALS)}")
    failed = [check for check in verdict.checks if not check.passed]
    soft = bool(failed) and verdict.rung == "full" and not any(check.hard for check in failed)
    waits = approval == "always" if verdict.passed and not failed else approval != "never" and soft
    return replace(verdict, outcome=Outcome.WAITING) if waits else verdict
