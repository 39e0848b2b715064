"""The work pools' templates and prefect.yaml, as Prefect's own published templates and loader read them."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import kubernetes_validate
import pytest
from jsonschema import Draft202012Validator
from rich.console import Console

from flows.config import load
from flows.pooling import CONTROL, ERRAND, FOLDS

INFRA = Path(__file__).resolve().parents[2] / "infra"
KINDS = ("process", "docker", "kubernetes")
ADDED = {"docker": {"container_create_kwargs"}}  # in prefect-docker since 0.6, not yet in Prefect's list


def template(kind):
    return json.loads((INFRA / "pools" / f"{kind}.json").read_text(encoding="utf-8"))


def published(kind):
    """The default template that Prefect itself carries for a kind of worker."""
    views = Path(find_spec("prefect").origin).parent / "server/api/collections_data/views"
    packages = json.loads((views / "aggregate-worker-metadata.json").read_text(encoding="utf-8")).values()
    return next(each[kind] for each in packages if kind in each)["default_base_job_configuration"]


def filled(kind, **values):
    """The configuration of a run, as a worker makes it: defaults under values."""
    from prefect.utilities.templating import apply_values

    found = template(kind)
    known = {name: each["default"] for name, each in found["variables"]["properties"].items() if "default" in each}
    return apply_values(found["job_configuration"], {**known, "name": "a-run", **values})


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_has_the_form_that_prefect_publishes(kind):
    ours, theirs = template(kind), published(kind)
    assert set(ours["job_configuration"]) <= set(theirs["job_configuration"]) | ADDED.get(kind, set())
    properties = ours["variables"]["properties"]
    Draft202012Validator.check_schema(ours["variables"])
    for name, each in properties.items():
        assert each["type"] in {"string", "integer", "boolean", "object", "array"}
        if name in theirs["variables"]["properties"]:
            assert each["type"] == theirs["variables"]["properties"][name]["type"], name
    asked = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(ours["job_configuration"])))
    assert asked == set(properties)
    defaults = {name: each["default"] for name, each in properties.items() if "default" in each}
    Draft202012Validator(ours["variables"]).validate(defaults)
    assert set(properties) - set(defaults) == {"command", "name"}, "a run that names no variable must start"


def test_a_value_that_cannot_be_is_refused():
    for kind, wrong in (
        ("kubernetes", {"memory_request": "lots"}),
        ("kubernetes", {"gpus": 0}),
        ("kubernetes", {"backoff_limit": 0}),  # Prefect would start the run anew, beside Kubernetes
        ("docker", {"mem_limit": "32 GB"}),
        ("process", {"memory": "1g"}),
    ):
        assert not Draft202012Validator(template(kind)["variables"]).is_valid(wrong), wrong


def test_a_job_is_as_kubernetes_says_and_gets_what_was_asked():
    variables = {"memory_request": "48Gi", "gpus": 2, "node_selector": {"pool": "spot"}, "backoff_limit": 5}
    job = filled("kubernetes", **variables)["job_manifest"]
    spec = job["spec"]["template"]["spec"]
    container = spec["containers"][0]
    assert container["resources"]["limits"] == {"memory": "48Gi", "nvidia.com/gpu": 2}
    assert container["resources"]["requests"]["memory"] == "48Gi"
    assert spec["nodeSelector"] == {"pool": "spot"}
    assert job["spec"]["backoffLimit"] == 5
    # prefect-kubernetes asks for these two where Kubernetes does not know them, and turns `env` into a list.
    assert (spec.pop("parallelism"), spec.pop("completions")) == (1, 1)
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    for version in ("1.31", "1.37"):
        kubernetes_validate.validate(job, version, strict=True)
    container["env"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_docker_gives_a_container_the_gpus_and_no_rights():
    from docker.models.containers import _create_container_args

    extra = filled("docker", gpus=2)["container_create_kwargs"]
    made = _create_container_args({"image": "foldin:cuda", "command": None, "version": "1.50", **extra})
    host = made["host_config"]
    assert [(each["Count"], each["Capabilities"]) for each in host["DeviceRequests"]] == [(2, [["gpu"]])]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert made["user"] == "10001:10001"


def test_jobs_have_the_variables_of_the_workers_that_always_run():
    import yaml

    text = (INFRA / "compose.yaml").read_text(encoding="utf-8")
    worker = yaml.safe_load(text)["services"]["gpu-worker"]["environment"]
    for kind in ("docker", "kubernetes"):
        said = template(kind)["variables"]["properties"]["env"]["default"]
        assert {**said, "PREFECT_API_URL": worker["PREFECT_API_URL"]} == worker  # which Prefect's workers hand on


@pytest.fixture(scope="module")
def deployments():
    """Entry point -> its entry in prefect.yaml, as `prefect deploy` reads the file."""
    from prefect.cli.deploy._config import _load_deploy_configs_and_actions

    console = Console(record=True, quiet=True)
    found, actions = _load_deploy_configs_and_actions(INFRA / "prefect.yaml", console=console)
    assert console.export_text() == ""  # where it would say what it skipped
    assert actions == {"build": [], "push": [], "pull": []}
    return {each["entrypoint"]: each for each in found}


def test_the_deployments_in_the_file_are_those_that_foldin_makes(deployments):
    from flows.serve import deployments as made_by

    config = load(INFRA / "foldin.toml")
    made = made_by(config, "/etc/foldin/foldin.toml")
    folds = {"flows.merge.merge_expert", "flows.batching.merge_batch"}
    assert {each.entrypoint for each in made} | folds == set(deployments)
    for each in made:
        written = deployments[each.entrypoint]
        assert written["name"] == each.name
        assert written["tags"] == each.tags
        assert written["parameters"] == each.parameters
        crons = [(one.schedule.cron, one.schedule.timezone) for one in each.schedules or []]
        assert [(one["cron"], one["timezone"]) for one in written["schedules"]] == crons
        limit = written.get("concurrency_limit") or {}
        assert limit.get("limit") == each.concurrency_limit
        strategy = each.concurrency_options.collision_strategy.value if each.concurrency_options else None
        assert limit.get("collision_strategy") == strategy
        assert written["work_pool"] == {"name": CONTROL, "job_variables": {"command": ERRAND}}
    for entrypoint in folds:
        assert (deployments[entrypoint]["name"], deployments[entrypoint]["work_pool"]["name"]) == ("support", FOLDS)


def test_every_entry_point_is_a_flow(deployments):
    from prefect.flows import load_flow_from_entrypoint

    for entrypoint, each in deployments.items():
        flow = load_flow_from_entrypoint(entrypoint)
        assert flow.fn.__name__ == entrypoint.rpartition(".")[2]
        flow.validate_parameters({**each["parameters"], **({"version": 1} if "approval" in entrypoint else {})})
