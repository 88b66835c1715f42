"""Statements that are built once, and on SQLite compiled once, and transactions: what they cost is then what SQLite takes.

SQLAlchemy finds a statement's text again at each call, and makes of it a context, a result and rows that know
everything; of one that finds a row by its key that is most of the time. Here its own compiler writes the text
and its own types convert what goes in and comes out, as they always do; what is left out is what lies between.
On PostgreSQL, where a statement is a trip to a server, it runs as any other.
"""

import sqlite3
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import Connection, Dialect, Select, UpdateBase
from sqlalchemy.exc import DBAPIError, MultipleResultsFound, NoResultFound
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

__all__ = ("Found", "Prepared", "transaction")

_Convert = Callable[[Any], Any]


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """One of SQLite's that writes: the lock is had from its beginning, and all is committed when the block ends.

    On a connection that begins none by itself; whoever has it takes back what a block that raises has changed. To
    have SQLAlchemy begin and end one takes ten times as long as SQLite does. Raises as SQLAlchemy would.
    """
    _run(connection, "BEGIN IMMEDIATE")
    yield
    if _driver(connection).in_transaction:  # else the block has committed it
        _run(connection, "COMMIT")


def _driver(connection: Connection) -> sqlite3.Connection:
    driver: Any = connection.connection.dbapi_connection
    found: sqlite3.Connection = driver
    return found


def _run(connection: Connection, text: str, values: Sequence[Any] = ()) -> Sequence[Any]:
    """All rows that a statement gives: one that has some left keeps its transaction from ending."""
    try:
        return _driver(connection).execute(text, values).fetchall()
    except sqlite3.Error as error:
        raise DBAPIError.instance(
            text, None, error, sqlite3.Error, hide_parameters=True, dialect=connection.dialect
        ) from error


class Found:
    """Rows that a statement has given, all of them read; named as `sqlalchemy.Result` names its own."""

    __slots__ = ("_rows",)

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def all(self) -> Sequence[Any]:
        """Every row."""
        return self._rows

    def one_or_none(self) -> Any:
        """The row, where there is one. Raises `MultipleResultsFound` where there are more."""
        if len(self._rows) > 1:
            raise MultipleResultsFound("Multiple rows were found when one or none was required")
        return self._rows[0] if self._rows else None

    def one(self) -> Any:
        """The one row. Raises `NoResultFound`, and as `one_or_none` does."""
        row = self.one_or_none()
        if row is None:
            raise NoResultFound("No row was found when one was required")
        return row

    def scalar_one(self) -> Any:
        """The first value of the one row. Raises as `one` does."""
        return self.one()[0]

    def scalar_one_or_none(self) -> Any:
        """The first value of the row, where there is one."""
        row = self.one_or_none()
        return None if row is None else row[0]


class Prepared:
    """A statement that is run again and again."""

    def __init__(self, statement: Select[Any] | UpdateBase) -> None:
        self.statement = statement
        self._of_sqlite: dict[tuple[str, ...], _Compiled] = {}
        """By the names of the parameters that it is given: an INSERT has the columns that it is told."""

    def run(self, session: Session, parameters: Mapping[str, Any]) -> Any:
        """What it gives on the session's transaction: `Found`, or SQLAlchemy's own of the same form."""
        connection = session.connection()
        if connection.dialect.name != "sqlite":
            return connection.execute(self.statement, parameters)
        names = tuple(parameters)
        compiled = self._of_sqlite.get(names)
        if compiled is None:
            compiled = _Compiled.of(self.statement, names, connection.dialect)
            self._of_sqlite[names] = compiled
        return compiled.run(connection, parameters)


class _Input(NamedTuple):
    """One value of a statement, in the order in which SQLite takes them."""

    name: str | None
    """Of the parameter that has it; None for one that the statement itself has."""
    value: Any
    convert: _Convert | None

    def of(self, parameters: Mapping[str, Any]) -> Any:
        """The value as the driver takes it."""
        if self.name is None:
            return self.value
        value = parameters[self.name]
        return value if self.convert is None else self.convert(value)


class _Compiled(NamedTuple):
    """A statement in SQLite's words."""

    text: str
    inputs: Sequence[_Input]
    row: Callable[[Sequence[Any]], Any]
    outputs: Sequence[tuple[int, _Convert]]
    """Columns whose values are something else than what the driver gives."""

    @classmethod
    def of(
        cls, statement: Select[Any] | UpdateBase, names: Sequence[str], dialect: Dialect
    ) -> "_Compiled":
        """Compiled for parameters of these names. Raises `TypeError` where its text depends on their values."""
        compiled: Any = statement.compile(dialect=dialect, column_keys=list(names))
        if any(bound.key in names for bound in compiled.post_compile_params):
            raise TypeError("a statement whose text depends on its parameters cannot be prepared")
        # Lists that the statement itself has are written out here, once.
        whole = compiled.construct_expanded_state(dict.fromkeys(names))
        inputs = []
        for name in whole.positiontup:
            bound = compiled.binds.get(name)
            kind = None if bound is None else bound.type.dialect_impl(dialect)
            convert = whole.processors.get(name) if kind is None else kind.bind_processor(dialect)
            if bound is not None and bound.key in names:
                inputs.append(_Input(bound.key, None, convert))
            else:
                value = whole.parameters[name]
                inputs.append(_Input(None, value if convert is None else convert(value), None))
        columns = _columns(statement)
        kinds: list[TypeEngine[Any]] = [column.type for column in columns]
        found = [kind.dialect_impl(dialect).result_processor(dialect, None) for kind in kinds]
        names_of_columns = [column.key for column in columns]
        row = namedtuple("Row", names_of_columns, rename=True)  # type: ignore[misc]  # noqa: PYI024  known only now
        outputs = [(at, convert) for at, convert in enumerate(found) if convert is not None]
        return cls(whole.statement, inputs, row._make, outputs)

    def run(self, connection: Connection, parameters: Mapping[str, Any]) -> Found:
        """Run it on an open transaction. Raises as SQLAlchemy would."""
        values = [each.of(parameters) for each in self.inputs]
        rows = _run(connection, self.text, values)
        return Found([self._row(values) for values in rows])

    def _row(self, values: Sequence[Any]) -> Any:
        row = list(values)
        for at, convert in self.outputs:
            row[at] = convert(row[at])
        return self.row(row)


def _columns(statement: Select[Any] | UpdateBase) -> Sequence[Any]:
    """What a row of it has."""
    if isinstance(statement, Select):
        return list(statement.selected_columns)
    return list(statement.exported_columns)
