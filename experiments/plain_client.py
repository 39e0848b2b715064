"""What a team does that knows MLflow and not foldin: register an expert, move an alias. No call of ours is involved."""

from pathlib import Path

import mlflow
from mlflow import MlflowClient


def register_expert(tracking_uri: str, model: str, folder: Path, task: str, files: str | None = None) -> int:
    """Register the files in a folder as the next version of a registered model; its number.

    Args:
        tracking_uri: of MLflow.
        model: name of the registered model that a line watches.
        folder: config.json, *.safetensors, suite.json with its data.
        task: what the expert was trained for; the one tag that foldin needs.
        files: where MLflow keeps the files of a new experiment; None leaves it to the server.
    """
    mlflow.set_tracking_uri(tracking_uri)
    client = MlflowClient()
    known = client.get_experiment_by_name("fine-tuning")
    experiment = known.experiment_id if known else client.create_experiment("fine-tuning", artifact_location=files)
    made = client.create_logged_model(experiment, name=task, model_type="expert")
    client.log_model_artifacts(made.model_id, str(folder))
    client.finalize_logged_model(made.model_id, "READY")
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    source, tags = f"models:/{made.model_id}", {"foldin.task": task}
    return int(client.create_model_version(model, source, model_id=made.model_id, tags=tags).version)


def move_alias(tracking_uri: str, model: str, version: int) -> None:
    """Move the alias `champion` by hand, as MLflow's own page does."""
    MlflowClient(tracking_uri, tracking_uri).set_registered_model_alias(model, "champion", str(version))


def champion(tracking_uri: str, model: str) -> int:
    """The version that the alias `champion` stands on."""
    return int(MlflowClient(tracking_uri, tracking_uri).get_model_version_by_alias(model, "champion").version)
