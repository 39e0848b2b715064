"""The webhooks that an MLflow server sends: found by the address they go to, made, tried and removed."""

from collections.abc import Iterator, Sequence
from typing import Any

from mlflow.entities.webhook import Webhook

from registry.files import shown
from registry.mlflow_link import Link
from registry.records import FoldinError, Refusal

NAME = "foldin"


class Webhooks:
    """Those of one MLflow server that go to one address."""

    def __init__(self, tracking_uri: str, url: str) -> None:
        """Talk to a server, not to its database: who writes past a server is heard by no webhook.

        Raises:
            FoldinError: E_WEBHOOK when `tracking_uri` is no server's.
        """
        self.url = url
        if not tracking_uri.startswith(("http://", "https://")):
            what, remedy = "MLflow sends webhooks only from a server", "set tracking_uri to that of an MLflow server"
            where, expected = "tracking_uri of [registry]", "http(s)://HOST:PORT"
            raise FoldinError(Refusal("E_WEBHOOK", what, where, expected=expected, found="a database", remedy=remedy))
        self._link = Link(tracking_uri, "")

    def install(self, events: Sequence[str], secret: str) -> Refusal | None:
        """Have MLflow tell of `events`, signed with `secret`; why a trial delivery failed, or None when it arrived.

        What goes to the address already is changed; more than one of them is removed but the first.
        """
        found = list(self._mine())
        mine = found[0] if found else None
        with self._link.reached():
            for other in found[1:]:
                self._link.client.delete_webhook(other.webhook_id)
            wanted: dict[str, Any] = {"url": self.url, "events": list(events), "secret": secret, "status": "ACTIVE"}
            if mine is None:
                mine = self._link.client.create_webhook(name=NAME, **wanted)
            else:
                self._link.client.update_webhook(mine.webhook_id, **wanted)
            tried = self._link.client.test_webhook(mine.webhook_id)
        if tried.success:
            return None
        answer = f"status {tried.response_status}" if tried.response_status else tried.error_message or "nothing"
        remedy = "start `foldin receive` with the same secret; docs/operations.md says what MLflow must be allowed"
        what = "the receiver did not take MLflow's trial delivery"
        return Refusal("E_WEBHOOK", what, self.url, expected="status 200", found=shown(answer), remedy=remedy)

    def remove(self) -> int:
        """Have MLflow send nothing to the address any more; how many webhooks did."""
        found = list(self._mine())
        with self._link.reached():
            for each in found:
                self._link.client.delete_webhook(each.webhook_id)
        return len(found)

    def _mine(self) -> Iterator[Webhook]:
        token: str | None = None
        while True:
            with self._link.reached():
                page = self._link.client.list_webhooks(max_results=100, page_token=token)
            yield from (each for each in page if each.url == self.url)
            token = page.token
            if not token:
                return
