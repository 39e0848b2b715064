"""The Kubernetes files: built with kustomize, as Kubernetes' own schemas say, confined, and naming what there is."""

import re
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

INFRA = Path(__file__).resolve().parents[2] / "infra"
VERSIONS = ("1.31", "1.37")  # the oldest that is meant to work, and the newest that the schemas' package knows
WORKLOADS = ("Deployment", "StatefulSet", "Job")
COMPONENT = "app.kubernetes.io/component"


@pytest.fixture(scope="module")
def build(tmp_path_factory, secrets):
    """Overlay -> its manifests, with secrets that were made for the test."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    folder = tmp_path_factory.mktemp("kustomize") / "infra"
    shutil.copytree(INFRA, folder, ignore=shutil.ignore_patterns("secrets"))
    shutil.copytree(secrets, folder / "secrets")

    def built(overlay):
        command = [kubectl, "kustomize", "--load-restrictor", "LoadRestrictionsNone", folder / "kubernetes" / overlay]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stderr
        return list(yaml.safe_load_all(found.stdout))

    return built


@pytest.fixture(scope="module")
def manifests(build):
    return build("overlays/gpu")


@pytest.fixture(scope="module")
def pods(manifests):
    """Workload -> the template of its pods."""
    return {each["metadata"]["name"]: each["spec"]["template"] for each in manifests if each["kind"] in WORKLOADS}


def named(manifests, kind):
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


def said(manifests, container):
    """What a container is told: its arguments and the values of its variables."""
    values = [each["value"] for each in container.get("env", []) if each["name"] != "MLFLOW_SERVER_ALLOWED_HOSTS"]
    for source in container.get("envFrom", []):
        values += named(manifests, "ConfigMap")[source["configMapRef"]["name"]]["data"].values()
    return " ".join([*values, *container.get("args", [])])


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_as_kubernetes_says(manifests, version):
    assert len(manifests) > 20
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_manifest_that_is_wrong_is_noticed(manifests):
    for wrong in (
        {"imagee": "foldin"},
        {"ports": [{"containerPort": "http"}]},
        {"securityContext": {"privilegd": True}},
    ):
        broken = deepcopy(named(manifests, "Deployment")["worker"])
        broken["spec"]["template"]["spec"]["containers"][0].update(wrong)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_the_gpu_overlay_is_the_base_and_a_worker(build, manifests):
    base = {(each["kind"], each["metadata"]["name"]) for each in build("base")}
    added = {(each["kind"], each["metadata"]["name"]) for each in manifests} - base
    assert added == {("Deployment", "gpu-worker"), ("PersistentVolumeClaim", "gpu-work")}
    container = named(manifests, "Deployment")["gpu-worker"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["image"] == "foldin:cuda"


def test_every_pod_is_confined(pods):
    assert len(pods) == 8
    for name, pod in pods.items():
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name  # or MLFLOW_PORT and the like are set
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert set(container["resources"]) == {"requests", "limits"}, name
        assert "memory" in container["resources"]["limits"], name
        assert re.search(r":(\d|cpu$|cuda$)", container["image"]), name
        assert not any("secretKeyRef" in str(each) for each in container.get("env", [])), f"{name}: secrets are files"
        if name != "webhook-install":
            assert {"startupProbe", "livenessProbe"} <= set(container), name


def test_what_a_pod_mounts_is_there(manifests, pods):
    secrets = named(manifests, "Secret")
    claims = set(named(manifests, "PersistentVolumeClaim"))
    maps = named(manifests, "ConfigMap")
    for name, pod in pods.items():
        volumes, container = {each["name"]: each for each in pod["spec"]["volumes"]}, pod["spec"]["containers"][0]
        own = {"databases"} if name == "postgres" else {"objects"} if name == "store" else set()
        assert {each["name"] for each in container["volumeMounts"]} == set(volumes) | own, name
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, name
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps, name
            if "secret" in volume:
                keys = {item["key"] for item in volume["secret"]["items"]}
                assert keys <= set(secrets[volume["secret"]["secretName"]]["data"]), name
                text = said(manifests, container)
                read = {key for key in keys if f"/run/secrets/{key}" in text}
                assert read == keys or name == "postgres", f"{name} mounts {keys - read} and does not read it"


def test_the_receiver_and_the_job_read_no_more_than_they_are_given(manifests, pods):
    """Files that the common variables name and that a pod does not mount: those of what it never asks."""
    data = named(manifests, "ConfigMap")["foldin-environment"]["data"]
    files = {value.rpartition("/")[2] for value in data.values() if value.startswith("/run/secrets/")}
    for name in ("worker", "gpu-worker", "receiver"):
        volumes = pods[name]["spec"]["volumes"]
        mounted = {item["key"] for volume in volumes if "secret" in volume for item in volume["secret"]["items"]}
        assert files - mounted == ({"store_credentials"} if name == "receiver" else set())


def test_whoever_is_selected_is_there(manifests, pods):
    components = {pod["metadata"]["labels"][COMPONENT] for pod in pods.values()}
    ports = {
        pod["metadata"]["labels"][COMPONENT]: {
            each["containerPort"]: each["name"] for each in pod["spec"]["containers"][0].get("ports", [])
        }
        for pod in pods.values()
    }
    for service in named(manifests, "Service").values():
        found = ports[service["spec"]["selector"][COMPONENT]]
        for port in service["spec"]["ports"]:
            assert port.get("targetPort", port["port"]) in {*found, *found.values()}
            assert port["port"] in found
    for policy in named(manifests, "NetworkPolicy").values():
        selected = policy["spec"]["podSelector"].get("matchLabels", {}).get(COMPONENT)
        for rule in policy["spec"].get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= set(ports[selected])
            for peer in rule["from"]:
                selector = peer.get("podSelector", {})
                names = set(selector.get("matchLabels", {}).values())
                names |= {name for one in selector.get("matchExpressions", []) for name in one["values"]}
                assert names <= components
    for budget in named(manifests, "PodDisruptionBudget").values():
        replicas = named(manifests, "Deployment")[budget["metadata"]["name"]]["spec"]["replicas"]
        assert budget["spec"]["minAvailable"] < replicas, "or no node could be drained"


def test_whoever_needs_a_service_may_speak_to_it(manifests, pods):
    """A pod whose variables or arguments name a service is among those that the service's policy lets in."""
    services = set(named(manifests, "Service"))
    unused = {("receiver", "store")}  # named to all alike
    for name, pod in pods.items():
        container, component = pod["spec"]["containers"][0], pod["metadata"]["labels"][COMPONENT]
        text = said(manifests, container)
        for service in services:
            if (f"//{service}:" in text or f"@{service}/" in text) and (component, service) not in unused:
                policy = named(manifests, "NetworkPolicy")[service]
                assert component in str(policy["spec"]["ingress"]), f"{name} may not speak to {service}"
