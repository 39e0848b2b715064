"""What nobody may read in a log, an error or a traceback: passwords in addresses, secrets of the environment."""

import logging
import sys
import traceback
from types import TracebackType

from flows.environment import secrets
from registry.logins import without_logins

LOGGERS = (
    "foldin",
    *(f"prefect.{name}" for name in ("flow_runs", "task_runs", "engine", "flow_engine", "task_engine")),
)


def hidden(text: str) -> str:
    """The text with *** for all that is secret."""
    for secret in secrets():
        text = text.replace(secret, "***")
    return without_logins(text)


def conceal(record: logging.LogRecord) -> bool:
    """A filter of a logger that lets everything through, without its secrets."""
    record.msg, record.args = hidden(record.getMessage()), ()
    if record.exc_info:
        record.exc_text = hidden(logging.Formatter().formatException(record.exc_info))  # every handler takes this one
    return True


def conceal_logs() -> None:
    """Let no logger of foldin, or of Prefect's runs, tell a secret: an error of a library may quote an address."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(conceal)  # the same function is added once


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What `sys.excepthook` does, without secrets."""
    sys.stderr.write(hidden("".join(traceback.format_exception(kind, error, trace))))
