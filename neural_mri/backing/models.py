"""The registry: which models may be scanned, and which of them should be held by a worker."""

from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Row, bindparam, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from neural_mri.backing.database import epoch
from neural_mri.backing.prepared import Prepared
from neural_mri.backing.rows import ModelRow
from neural_mri.contract.models import Architecture, Numerics

__all__ = ("RegisteredModel", "all", "get", "register", "set_wanted")

_MODEL = tuple(ModelRow.__table__.c)
_GET = Prepared(select(*_MODEL).where(ModelRow.__table__.c.name == bindparam("wanted")))
"""Parameter: wanted. Built once, because every request asks."""
_architecture = msgspec.json.Decoder(Architecture)
_numerics = msgspec.json.Decoder(Numerics)


class RegisteredModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that may be scanned."""

    name: str
    source: str
    folder: str
    """Its folder's name inside the model store."""
    revision: str
    tokenizer_digest: str
    architecture: Architecture
    n_parameters: int
    weights_bytes: int
    quantization: str | None
    numerics: Numerics
    wanted: bool
    """Whether a worker should hold it."""
    registered_at: datetime


def register(
    session: Session,
    *,
    name: str,
    source: str,
    folder: str,
    revision: str,
    tokenizer_digest: str,
    architecture: Architecture,
    n_parameters: int,
    weights_bytes: int,
    quantization: str | None = None,
    numerics: Numerics = Numerics(),
    wanted: bool = False,
) -> RegisteredModel:
    """Let a model be scanned; one of that name is replaced."""
    dialect = session.get_bind().dialect.name
    insert_or = postgresql.insert if dialect == "postgresql" else sqlite.insert
    values: dict[str, Any] = {
        "source": source,
        "folder": folder,
        "revision": revision,
        "tokenizer_digest": tokenizer_digest,
        "architecture": msgspec.json.encode(architecture).decode(),
        "n_parameters": n_parameters,
        "weights_bytes": weights_bytes,
        "quantization": quantization,
        "numerics": msgspec.json.encode(numerics).decode(),
        "wanted": wanted,
        "registered_at": epoch(),
    }
    row = session.execute(
        insert_or(ModelRow)
        .values(name=name, **values)
        .on_conflict_do_update(index_elements=[ModelRow.name], set_=values)
        .returning(*_MODEL)
    ).one()
    return _of_row(row)


def get(session: Session, name: str) -> RegisteredModel | None:
    """The model of that name."""
    row = _GET.run(session, {"wanted": name}).one_or_none()
    return None if row is None else _of_row(row)


def all(session: Session) -> list[RegisteredModel]:  # noqa: A001 (read as `models.all`)
    """Every registered model, by name."""
    return [_of_row(row) for row in session.execute(select(*_MODEL).order_by(ModelRow.name))]


def set_wanted(session: Session, name: str, wanted: bool) -> RegisteredModel | None:  # noqa: FBT001
    """Say whether a worker should hold a model; None when there is none of that name."""
    row = session.execute(
        update(ModelRow).where(ModelRow.name == name).values(wanted=wanted).returning(*_MODEL),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    return None if row is None else _of_row(row)


def _of_row(row: Row[*tuple[Any, ...]]) -> RegisteredModel:
    return RegisteredModel(
        name=row.name,
        source=row.source,
        folder=row.folder,
        revision=row.revision,
        tokenizer_digest=row.tokenizer_digest,
        architecture=_architecture.decode(row.architecture),
        n_parameters=row.n_parameters,
        weights_bytes=row.weights_bytes,
        quantization=row.quantization,
        numerics=_numerics.decode(row.numerics),
        wanted=row.wanted,
        registered_at=datetime.fromtimestamp(row.registered_at, UTC),
    )
