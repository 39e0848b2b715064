"""The documents keep up with the code."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from evaluation.gate import Rules
from flows.cli import cli
from flows.config import load
from flows.options import (
    AccessConfig,
    LineConfig,
    ReceiverConfig,
    RegistryConfig,
    SearchConfig,
    SigningConfig,
    StackConfig,
)
from merging import METHODS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("flows", "merging", "evaluation", "registry", "experiments")


def tracked():
    """Top-level names that git tracks; the test needs a checkout."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {path.split("/")[0] for path in listed.stdout.splitlines()}


def test_the_readme_is_short():
    assert len(README.splitlines()) < 150


def test_the_tree_in_the_readme_is_the_tree_in_git():
    tree = README.split("## The house")[1].split("```")[1]
    described = {line.split()[0].rstrip("/") for line in tree.strip().splitlines() if not line.startswith(" ")}
    usual = {
        *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "constraints.txt"),
        *(".gitignore", ".dvcignore", ".pre-commit-config.yaml", "dvc.lock"),
    }
    assert described == tracked() - usual


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_explains_itself_and_its_options(name):
    command = cli.commands[name]
    assert command.help
    assert len(command.help.splitlines()[0]) > 15


def test_every_command_in_the_documents_exists():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "infra").glob("*.md"))]:
        for verb in re.findall(r"`foldin (?:--config \S+ )?([a-z]+)", path.read_text(encoding="utf-8")):
            assert verb in cli.commands, f"{path.name} names `foldin {verb}`"


def test_every_method_has_its_paragraph():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## `(\w+)`", text, flags=re.MULTILINE)) == set(METHODS)


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("`[registry]`", RegistryConfig),
        ("`[receiver]`", ReceiverConfig),
        ("`[stack]`", StackConfig),
        ("`[lines.NAME]`", LineConfig),
        ("`[lines.NAME.gate]`", Rules),
        ("`[lines.NAME.search]`", SearchConfig),
        ("`[lines.NAME.access]`", AccessConfig),
        ("`[lines.NAME.signing]`", SigningConfig),
    ],
)
def test_every_setting_is_documented_and_nothing_else(heading, kind):
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == {each.name for each in fields(kind)}


def test_every_error_code_is_documented_and_nothing_else():
    documented = set(
        re.findall(r"^\| `([EQ]_\w+)`", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    sources = (path.read_text(encoding="utf-8") for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    used = {code for source in sources for code in re.findall(r'"([EQ]_[A-Z0-9_]+)"', source)}
    assert documented == used


def test_the_example_for_servers_loads():
    config = load(ROOT / "infra/foldin.toml")
    assert config.line("support").trigger == "nightly"
    assert config.registry.ledger_url.startswith("postgresql+psycopg://")


def test_links_inside_the_documents_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_one_place_per_concern():
    """The rule of the house that no import contract can say."""
    homes = {
        "mlflow": {
            *(f"registry/mlflow_{part}.py" for part in ("files", "link", "models", "runs", "store", "webhooks")),
            "experiments/plain_client.py",
        },
        "safetensors": {"registry/weights.py"},
        "boto3": {"registry/s3.py"},
        "botocore": {"registry/s3.py", "registry/mlflow_link.py"},  # there for the exceptions of MLflow's transfers
        "model_signing": {"registry/signing.py"},
        "openlineage": {"flows/emitting.py"},
        "opentelemetry": {"flows/spans.py", "flows/tracing.py"},
        "prometheus_client": {"flows/metrics.py"},
        "sqlalchemy": {
            f"registry/{name}.py" for name in ("database", "history", "leases", "ledger", "measures", "rows", "schema")
        },
        "alembic": {"registry/database.py"},
        "os.environ": {"flows/environment.py"},
    }
    for concern, home in homes.items():
        pattern = re.compile(
            rf"\b{re.escape(concern)}\b" if "." in concern else rf"^\s*(?:import|from) {concern}\b", re.MULTILINE
        )
        found = {
            path.relative_to(ROOT).as_posix()
            for package in PACKAGES
            for path in (ROOT / package).rglob("*.py")
            if "migrations" not in path.parts and pattern.search(path.read_text(encoding="utf-8"))
        }
        assert found == home, concern
