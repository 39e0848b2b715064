"""What a webhook of MLflow may be about: a hint to look, never a reason to believe what it says."""

import json
from collections.abc import Callable, Mapping

from flows.config import Config
from flows.environment import webhook_secrets
from flows.options import LineConfig
from flows.wiring import tracking_uri
from registry.records import Refusal

EVENTS = ("model_version.created", "model_version_alias.created")  # what is asked of MLflow


def lines_for(body: bytes, lines: Mapping[str, LineConfig], champion: Callable[[str], int | None]) -> dict[str, str]:
    """Line -> a name of what happened, of every line that should look now: the same event has the same name.

    A new version of a watched model wakes the lines that watch it. An alias `champion` that stands elsewhere than
    `champion(line)`, the ledger's, wakes the line whose model it is of: foldin itself moves it after the ledger. Lines
    that fold by night or by hand are left alone.

    Raises:
        ValueError: this is no event of MLflow's.
    """
    try:
        event = json.loads(body)
    except RecursionError as error:
        raise ValueError("no event, but many brackets") from error
    if not isinstance(event, dict) or not isinstance(event.get("data"), dict):
        raise ValueError("no event")
    kind, facts = f"{event.get('entity')}.{event.get('action')}", event["data"]
    name, version = str(facts.get("name", "")), str(facts.get("version", ""))
    awake = {line: each for line, each in lines.items() if each.trigger == "on-register"}
    if kind == "model_version.created":
        return {line: f"{name} v{version}" for line, each in awake.items() if name in each.experts}
    moved = kind == "model_version_alias.created" and facts.get("alias") == "champion" and name in awake
    if moved and version != str(champion(name)):
        return {name: f"{name}@champion on v{version} {event.get('timestamp')}"}
    return {}


def subscribe(config: Config) -> Refusal | None:
    """Have MLflow send what may be about a line to the receiver; why a trial delivery failed, None when it arrived.

    Raises:
        FoldinError: E_CONFIG without a secret; E_WEBHOOK when MLflow is no server.
    """
    secret = webhook_secrets()[0].decode()
    from registry.mlflow_webhooks import Webhooks

    return Webhooks(tracking_uri(config), config.receiver.address).install(EVENTS, secret)
