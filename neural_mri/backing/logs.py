"""Logs: one line an event, on standard error, our own and other libraries' in one form.

An event is a static, past-tense snake_case name; what varies is a keyword. Prompts and answers are
users' data: their values appear at DEBUG only. Secrets never do.
"""

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog

from neural_mri.backing.settings import Settings, unknown, without_credentials

__all__ = ("USER_DATA", "configure")

USER_DATA = frozenset(
    {
        "prompt",
        "prompts",
        "corrupt_prompt",
        "source_prompt",
        "subject",
        "answer",
        "foil",
        "request",
        "body",
        "text",
        "texts",
        "token",
        "token_ids",
        "tokens",
    }
)
"""What is called so may hold what people write, or what a model answers to it."""
SECRETS = frozenset(
    {"authorization", "cookie", "set-cookie", "password", "secret", "api_key", "pepper"}
)
HIDDEN = "***"

_NOISY = {
    "alembic": logging.WARNING,
    "asyncio": logging.WARNING,
    "aiosqlite": logging.WARNING,
    "httpx2": logging.WARNING,  # a file's address on the hub is signed: whoever reads it may fetch
    "sqlalchemy": logging.WARNING,
    "urllib3": logging.WARNING,
}


def configure(settings: Settings, *, process: str) -> None:
    """Send every log record of this process to standard error. Calling it again replaces the first."""
    shared = (
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _Stamp(process),
        hide,
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    # Both renderers would print the local variables of a traceback's frames: prompts and keys among them.
    render: list[Any]
    if settings.log_format == "json":
        transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        render = [
            structlog.processors.ExceptionRenderer(transformer),
            structlog.processors.JSONRenderer(),
        ]
    else:
        render = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared[:-1], structlog.stdlib.ExtraAdder(), hide],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    for name, level in _NOISY.items():
        logging.getLogger(name).setLevel(max(level, root.level))
    logging.captureWarnings(capture=True)
    if names := unknown():
        structlog.get_logger(__name__).warning("settings_not_known", names=names)


class _Stamp:
    """Says in every record which process wrote it."""

    def __init__(self, process: str) -> None:
        self._process = process

    def __call__(
        self, _logger: Any, _method: str, record: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        record.setdefault("process", self._process)
        return record


def hide(_logger: Any, method: str, record: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Take out what no log may hold: secrets always, users' data unless the record is for debugging."""
    debugging = record.get("level", method) == "debug"
    forbidden = SECRETS if debugging else SECRETS | USER_DATA
    for key, value in record.items():
        record[key] = HIDDEN if key.lower() in forbidden else _without(value, forbidden)
    return record


def _without(value: Any, forbidden: frozenset[str]) -> Any:
    """The value, with forbidden entries of mappings and passwords in URLs hidden."""
    match value:
        case str():
            return without_credentials(value)
        case Mapping():
            return {
                key: HIDDEN if str(key).lower() in forbidden else _without(each, forbidden)
                for key, each in value.items()
            }
        case _:
            return value
