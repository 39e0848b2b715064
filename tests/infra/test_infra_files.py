"""The production files name what there is: verbs, variables, ports, pools and each other; and stay confined."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from stat import S_IMODE

import pytest
import yaml
from click.testing import CliRunner

from flows import environment, pooling, receiver, upkeep
from flows.cli import cli
from flows.config import load

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBERNETES = sorted((INFRA / "kubernetes").rglob("*.yaml"))
WRITTEN = [INFRA / "compose.yaml", INFRA / "Dockerfile", INFRA / "entrypoint.sh", *KUBERNETES]
VARIABLE = re.compile(r"\b((?:FOLDIN|PREFECT|MLFLOW)_[A-Z0-9_]+[A-Z0-9])\b(?!\}|:-)")
MLFLOW = Path(find_spec("mlflow").origin).parent
OUTSIDE = {  # read by others than Prefect's settings and MLflow's list of variables
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_HOSTS",  # of compose.yaml alone
    "MLFLOW_PORT",  # named in a comment
    "PREFECT_PAGE",  # of compose.yaml alone
}
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
PINNED = re.compile(r"[\w./-]+:\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")


def commands():
    """Every command line of compose.yaml and Kubernetes, as words."""
    for service in COMPOSE["services"].values():
        command = service.get("command", "")
        yield command if isinstance(command, list) else command.split()
    for path in KUBERNETES:
        for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if isinstance(manifest, dict) and "template" in manifest.get("spec", {}):
                yield manifest["spec"]["template"]["spec"]["containers"][0].get("args", [])


def test_compose_is_as_its_specification_says_and_one_that_is_not_is_noticed(tmp_path):
    good, bad = INFRA / "compose.yaml", tmp_path / "bad.yaml"
    bad.write_text(good.read_text(encoding="utf-8").replace("    healthcheck:", "    healthchek:", 1))
    # The schema is the specification's own, as this package carries it.
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "-o", "json"]
    found = subprocess.run([*command, str(good), str(bad)], capture_output=True, text=True, timeout=60)
    errors = json.loads(found.stdout)["errors"]
    assert {each["filename"] for each in errors} == {str(bad)}
    assert "healthchek" in str(errors)


def test_docker_compose_takes_the_file(secrets):
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker has no compose plugin here")
    command = ["docker", "compose", "-f", str(INFRA / "compose.yaml"), "--profile", "gpu", "config", "--quiet"]
    found = subprocess.run(command, env={"MODELS": "/srv/models", "PATH": "/usr/bin:/usr/local/bin"}, text=True)
    assert found.returncode == 0


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_every_service_is_confined_and_asked_whether_it_is_well(name):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert PINNED.fullmatch(service["image"]) or service["image"].startswith("foldin:")
    assert ("healthcheck" in service) != (name == "webhook")  # which ends
    assert all(each.startswith("127.0.0.1:") for each in service.get("ports", []))
    assert not service.get("ports") or name in {"mlflow", "prefect"}
    for kind in ("secrets", "networks"):
        assert set(service.get(kind, [])) <= set(COMPOSE[kind])
    read = {Path(value).name for value in service.get("environment", {}).values() if "/run/secrets/" in str(value)}
    assert read <= set(service.get("secrets", []))
    assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])
    for other, how in service.get("depends_on", {}).items():
        assert how["condition"] == "service_healthy"
        assert "healthcheck" in COMPOSE["services"][other]


def test_no_service_is_missing_of_those_that_foldin_up_keeps(tmp_path):
    """PostgreSQL, a store, MLflow, Prefect, two workers and the receiver: named as in flows.upkeep, or as here."""
    here = {"postgresql": "postgres", "s3": "store"}
    config = load(INFRA / "foldin.toml")
    kept = {each.name for each in upkeep._services(INFRA / "foldin.toml", config, tmp_path)}
    assert {here.get(name, name) for name in kept} == set(COMPOSE["services"]) - {"webhook"}


def test_every_verb_that_is_run_exists():
    verbs = 0
    for words in commands():
        if words[:1] == ["foldin"]:
            verbs += 1
            assert CliRunner().invoke(cli, [*words[3:], "--help"]).exit_code == 0, words
            assert words[1:3] == ["--config", "/etc/foldin/foldin.toml"]
    assert verbs == 4


def test_the_pools_are_those_of_the_code():
    pools = {word for words in commands() for word in words if word.startswith(("foldin-", "--pool=foldin-"))}
    text = (INFRA / "prefect.yaml").read_text(encoding="utf-8")
    deployed = {each["work_pool"]["name"] for each in yaml.safe_load(text)["deployments"]}
    assert deployed == {pooling.CONTROL, pooling.FOLDS}
    assert {each.removeprefix("--pool=") for each in pools} == deployed


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_every_variable_is_read_by_somebody(path):
    import prefect.settings

    readers = (Path(environment.__file__), MLFLOW / "environment_variables.py")
    texts = "".join(file.read_text(encoding="utf-8") for file in readers)
    for name in set(VARIABLE.findall(path.read_text(encoding="utf-8"))) - OUTSIDE:
        plain = name if name.startswith("FOLDIN_") else name.removesuffix("_FILE")  # see entrypoint.sh
        known = hasattr(prefect.settings, plain) if name.startswith("PREFECT_") else f'"{plain}"' in texts
        assert known, f"{path.name} sets {name}"


def test_what_is_asked_of_the_receiver_and_where_is_there():
    config = load(INFRA / "foldin.toml")
    assert config.receiver.host == "0.0.0.0"
    assert config.receiver.address == f"http://receiver:{config.receiver.port:.0f}{receiver.PATH}"
    manifests = yaml.safe_load_all((INFRA / "kubernetes/base/receiver.yaml").read_text(encoding="utf-8"))
    service, deployment, _budget = manifests
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"] == config.receiver.port
    assert f":{config.receiver.port:.0f}/healthz" in COMPOSE["services"]["receiver"]["healthcheck"]["test"][-1]
    routes = Path(receiver.__file__).read_text(encoding="utf-8")
    asked = {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    missing = {path for path in asked if f'"{path}"' not in routes}
    assert not missing


def test_secrets_are_made_once_each_and_for_nobody_else(secrets):
    made = {each.name: each.read_bytes() for each in secrets.iterdir()}
    assert {Path(each["file"]).name for each in COMPOSE["secrets"].values()} == set(made)
    assert S_IMODE(secrets.stat().st_mode) == 0o700
    assert len(set(made.values())) == len(made)
    from cryptography.fernet import Fernet

    Fernet(made["mlflow_webhook_key"])  # ValueError unless it is a key
    assert len(made["webhook_secret"]) >= environment.SHORTEST_SECRET
    identity = json.loads(made["store_identities.json"])["identities"][0]["credentials"][0]
    assert f"aws_secret_access_key = {identity['secretKey']}" in made["store_credentials"].decode()
    assert f"aws_access_key_id = {identity['accessKey']}" in made["store_credentials"].decode()
    (secrets / "prefect_auth").unlink()
    subprocess.run(["sh", str(INFRA / "secrets.sh"), str(secrets)], check=True)
    again = {each.name: each.read_bytes() for each in secrets.iterdir()}
    assert again.pop("prefect_auth") != made.pop("prefect_auth")
    assert again == made


def test_the_entry_point_reads_secrets_from_files(secrets):
    run = ["sh", str(INFRA / "entrypoint.sh"), "printenv", "PGPASSWORD"]
    found = subprocess.run(
        run, env={"PATH": "/bin:/usr/bin", "PGPASSWORD_FILE": str(secrets / "prefect_database_password")}, stdout=-1
    )
    assert found.stdout.strip() == (secrets / "prefect_database_password").read_bytes()
    missing = subprocess.run(run, env={"PATH": "/bin:/usr/bin", "PGPASSWORD_FILE": "/nowhere"}, capture_output=True)
    assert missing.returncode != 0
    assert missing.stdout == b""


def test_the_image_gets_what_it_copies_and_nobody_is_root_in_it():
    lines = (INFRA / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    images = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert images
    assert all(PINNED.fullmatch(image) for image in images)
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 10001:10001"
    copied = {
        source for line in lines if line.startswith("COPY ") and "--from=" not in line for source in line.split()[1:-1]
    }
    ignored = (INFRA / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)
    for program in ("entrypoint.sh", "postgres/init.sh"):  # docker keeps the modes
        assert (INFRA / program).stat().st_mode & 0o111 == 0o111
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"include = \[(.*)\]", project)[1]
    assert set(re.findall(r'"(\w+)\*"', packages)) <= copied
    extras = next(line for line in lines if line.startswith("ARG EXTRAS=")).removeprefix("ARG EXTRAS=").split(",")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
