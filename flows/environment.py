"""The process's environment: what foldin reads there, what it sets for Prefect, MLflow and boto3, what children get."""

import base64
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flows.alive import holder, is_dead
from registry.files import replacing
from registry.records import FoldinError, Refusal

if TYPE_CHECKING:
    from flows.config import Config

STORE_KEYS = {  # of a store on this machine; moto asks for some and looks at none
    "AWS_ACCESS_KEY_ID": "foldin",
    "AWS_SECRET_ACCESS_KEY": "foldin-on-this-machine",
    "AWS_DEFAULT_REGION": "us-east-1",
}
STORE_URLS = ("MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
OFFERED_BY = "FOLDIN_UP"  # the process that keeps the services running
LOG_FORMATS = ("plain", "json")
SECRETS = (
    *("FOLDIN_WEBHOOK_SECRET", "FOLDIN_SIGNING_PASSPHRASE", "OPENLINEAGE_API_KEY", "OTEL_EXPORTER_OTLP_HEADERS"),
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD"),
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"),
    *("MLFLOW_FLASK_SERVER_SECRET_KEY", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"),
)
SHORTEST_HIDDEN = 8  # characters; shorter ones are words, such as those of STORE_KEYS
LOGINS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PREFECT_API_AUTH_STRING")  # that a file may hold
SHORTEST_SECRET = 16  # characters, of a webhook's secret


def prepare_environment(config: "Config", *, verbose: bool = False) -> None:
    """Settings that Prefect and MLflow read when they are imported; what the user set stays."""
    _check_log_format()
    home = config.home
    home.mkdir(parents=True, exist_ok=True)
    defaults = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO" if verbose else "CRITICAL",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "foldin",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # 5 s; 7 would hold a line for minutes, and the next watch tries again
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for large pages: half the time where memory is only passed through
    }
    defaults |= offered(config)
    for key, value in (defaults | _secrets()).items():
        os.environ.setdefault(key, value)
    for one, other in (STORE_URLS, STORE_URLS[::-1]):  # MLflow and boto3 name the same store differently
        if one in os.environ:
            os.environ.setdefault(other, os.environ[one])


def _secrets() -> dict[str, str]:
    """Passwords that files hold, as orchestrators mount them: KEY_FILE names the file of KEY.

    Raises:
        FoldinError: E_CONFIG when one cannot be read. Not to be shown or logged.
    """
    found = {}
    for key in LOGINS:
        file = os.environ.get(f"{key}_FILE", "")
        if file and key not in os.environ:
            try:
                found[key] = Path(file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                what, remedy = "the file cannot be read", f"correct {key}_FILE, or unset it"
                where = f"{file}, which {key}_FILE names"
                raise FoldinError(
                    Refusal("E_CONFIG", what, where, found=type(error).__name__, remedy=remedy)
                ) from error
    ours = os.environ.get("PREFECT_SERVER_API_AUTH_STRING", "")
    if ours and "PREFECT_API_URL" not in os.environ:  # of a server that is started here, and of no other
        found.setdefault("PREFECT_API_AUTH_STRING", ours)
    return found


def prefect_authorization() -> dict[str, str]:
    """The header with which Prefect's API is asked, as Prefect's own client sends it. Not to be shown or logged."""
    login, key = (os.environ.get(name, "") for name in ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"))
    if login:
        return {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
    return {"Authorization": f"Bearer {key}"} if key else {}


def prefect_api_url() -> str:
    """The Prefect API that the environment names, the user's or that of `using_prefect`; "" when none."""
    return os.environ.get("PREFECT_API_URL", "")


@contextmanager
def using_prefect(url: str, *, watched: bool) -> Iterator[None]:
    """Send this process's flow runs, and those of its children, to a server while the block runs.

    Args:
        url: of the server's API.
        watched: whether the server looks for runs that went silent. Where none does, nothing is sent for it: the end
            of a run would wait up to a second for the next beat.
    """
    os.environ["PREFECT_API_URL"] = url
    try:
        # What was imported before read the environment then, and would start a server of its own.
        from prefect import settings

        beats = {} if watched else {settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with settings.temporary_settings({settings.PREFECT_API_URL: url, **beats}):
            yield
    finally:
        os.environ.pop("PREFECT_API_URL", None)


def log_as_json() -> bool:
    """Whether every line that foldin says is to be a JSON object."""
    return os.environ.get("FOLDIN_LOG", "") == "json"


def _check_log_format() -> None:
    found = os.environ.get("FOLDIN_LOG", "")
    if found not in ("", *LOG_FORMATS):
        what, remedy = "FOLDIN_LOG is unknown", "correct it, or unset it"
        expected = f"one of {', '.join(LOG_FORMATS)}"
        raise FoldinError(Refusal("E_CONFIG", what, "the environment", "", "", expected, repr(found), remedy))


def wants_traces() -> bool:
    """Whether the environment says where OpenTelemetry traces go."""
    named = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{each}") for each in ("ENDPOINT", "TRACES_ENDPOINT"))
    return named and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def signing_passphrase() -> bytes:
    """What opens an encrypted signing key; b"" when the environment has none. Not to be shown or logged."""
    return os.environb.get(b"FOLDIN_SIGNING_PASSPHRASE", b"")


def openlineage_key() -> str:
    """What an OpenLineage server knows this deployment by; "" when the environment has none. Not to be shown."""
    return os.environ.get("OPENLINEAGE_API_KEY", "")


def secrets() -> list[str]:
    """What the environment holds that nobody may read."""
    found = (os.environ.get(name, "") for name in SECRETS)
    return [each for each in found if len(each) >= SHORTEST_HIDDEN]


def webhook_secrets() -> tuple[bytes, ...]:
    """What MLflow's webhooks are signed with, the newest first: FOLDIN_WEBHOOK_SECRET, or the lines of a file.

    Raises:
        FoldinError: E_CONFIG when there is none, or one that is short. Not to be shown or logged.
    """
    text, file = os.environ.get("FOLDIN_WEBHOOK_SECRET", ""), os.environ.get("FOLDIN_WEBHOOK_SECRET_FILE", "")
    try:
        lines = (Path(file).read_text(encoding="utf-8") if file and not text else text).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _no_secret("the file of FOLDIN_WEBHOOK_SECRET_FILE cannot be read", type(error).__name__) from error
    found = [each.strip() for each in lines if each.strip()]
    if not found or min(map(len, found)) < SHORTEST_SECRET:
        raise _no_secret("there is no secret for webhooks, or a short one", "a short one" if found else "none")
    return tuple(each.encode() for each in found)


def _no_secret(what: str, found: str) -> FoldinError:
    expected = f"{SHORTEST_SECRET} or more characters in FOLDIN_WEBHOOK_SECRET, or a file in FOLDIN_WEBHOOK_SECRET_FILE"
    remedy = "make one, such as with `openssl rand -hex 32`, and give it to `foldin receive` and `foldin webhook`"
    return FoldinError(Refusal("E_CONFIG", what, "the environment", "", "", expected, found, remedy))


def store_variables(url: str) -> dict[str, str]:
    """What names an S3-compatible store on this machine to MLflow and boto3."""
    return {**dict.fromkeys(STORE_URLS, url), **STORE_KEYS}


@contextmanager
def using_variables(variables: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """Set variables of this process and its children while the block runs; the same variables."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield variables
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def variables_file(config: "Config") -> Path:
    """What `foldin up` leaves for every other process that works with its services: lines of KEY=VALUE."""
    return config.home / "stack" / "variables.env"


def offer_variables(config: "Config", variables: Mapping[str, str]) -> None:
    """Write them into that file, which only its owner may read, for as long as this process lives."""
    lines = [f"{key}={value}\n" for key, value in sorted({OFFERED_BY: holder(), **variables}.items())]
    with replacing(variables_file(config)) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write("".join(lines).encode())


def offered(config: "Config") -> dict[str, str]:
    """What that file holds; nothing when whoever wrote it died and could not remove it."""
    try:
        lines = variables_file(config).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    found = dict(line.split("=", 1) for line in lines)
    return {} if is_dead(found.pop(OFFERED_BY, "")) else found


def starter_name() -> str:
    """The socket at which this process's flow runs may be forked (`flows.forking`); "" when there is none."""
    return os.environ.get("FOLDIN_STARTER", "")


def replace_variables(variables: Mapping[str, str]) -> None:
    """Have another process's environment instead of one's own."""
    os.environ.clear()
    os.environ.update(variables)


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a child, with some settings over it."""
    return {**os.environ, **extra}
