"""What the tests of the production files share."""

import subprocess
from pathlib import Path

import pytest

INFRA = Path(__file__).resolve().parents[2] / "infra"


@pytest.fixture(scope="session")
def secrets(tmp_path_factory):
    """The folder that `infra/secrets.sh` makes."""
    folder = tmp_path_factory.mktemp("infra") / "secrets"
    subprocess.run(["sh", str(INFRA / "secrets.sh"), str(folder)], check=True, capture_output=True, timeout=60)
    return folder
