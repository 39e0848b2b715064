"""What one of many processes does, in a module that costs a new one little: it imports neither torch nor foldin."""

from http import HTTPStatus
from pathlib import Path

from safetensors.numpy import load_file, save_file

from experiments.plain_client import register_expert

TENSOR = "encoder.layer.0.output.dense.bias"


def register_some(uri, files, expert, numbers, folder):
    """Register experts of one's own, a tensor apart from each other, as a team's client would."""
    weights = load_file(expert / "model.safetensors")
    for number in numbers:
        mine = Path(folder) / str(number)
        mine.mkdir(parents=True)
        for path in expert.iterdir():
            (mine / path.name).hardlink_to(path)
        (mine / "model.safetensors").unlink()
        changed = {**weights, TENSOR: weights[TENSOR] + 1e-3 * (number + 1)}
        save_file(changed, mine / "model.safetensors", {"format": "pt"})
        register_expert(uri, "tiny-experts", mine, "words", files)


def watch_until(toml, many, broken):
    """Look again and again until so many experts have ended, as a service that hears of them late, twice or never."""
    from prefect.exceptions import PrefectHTTPStatusError

    from flows.watch import watch
    from flows.wiring import house
    from registry.records import FoldinError

    def over():
        return broken.is_set() or sum(each.state != "pending" for each in house(toml).ledger.experts("tiny")) >= many

    while not over():
        try:
            watch("tiny", toml)
        except FoldinError as error:
            if error.refusal.code not in {"E_LOCKED", "E_FENCED"}:  # another watcher is at it
                raise
        except PrefectHTTPStatusError as error:  # cannot be pickled, so it must not leave this process
            if error.response.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                raise RuntimeError(str(error)) from None
            print("a watch failed because Prefect was not available", flush=True)  # a service just looks again
