"""What differs between two sessions: which scans, what was asked of them, and what was measured.

From stored tables alone. A row's values over tokens are compared one by one where both have as many, and by
their means where not; what is NaN in either, not measured, is left out. Knows no model.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from api.session_contents import Kept, kept
from neural_mri.backing.storage import Store
from neural_mri.backing.stored import StoredTable, read_table
from neural_mri.contract.problems import Gone
from neural_mri.contract.results import Manifest, TableRef, provenance_of
from neural_mri.contract.scans import ScanKind
from neural_mri.contract.sessions import (
    ComponentDifference,
    SavedScan,
    ScanChange,
    ScanDifference,
    SessionDifference,
    SessionDocument,
    TableDifference,
)
from neural_mri.contract.summaries import main_table

__all__ = ("Revision", "difference")

Vector = npt.NDArray[np.float32]

_COLUMNS: Mapping[str, str] = {
    "topology": "parameters",
    "weights": "frobenius",
    "effects": "effect",
    "comparison": "metric_after",
}
"""Which column a picture of a table is painted from, where it is not `value`."""
_SUB_KEYS = ("quantity", "circuit", "lens", "channel", "row", "position", "role")
"""Columns that tell rows of one component apart."""
_PREFERRED: Mapping[ScanKind, str] = {ScanKind.PERTURBATION: "change"}
FEWEST_RANKED = 3


class Revision(NamedTuple):
    """A session at a revision."""

    digest: str
    document: SessionDocument


def difference(
    store: Store, before: Revision, after: Revision, *, strongest: int
) -> SessionDifference:
    """What leads from one to the other; of each table the rows that differ most."""
    first, second = before.document, after.document
    return SessionDifference(
        before=before.digest,
        after=after.digest,
        scans=tuple(
            _scan_difference(store, old, new, strongest)
            for old, new in _paired(first.scans, second.scans)
        ),
        notes_added=_beyond(second.notes, first.notes),
        notes_removed=_beyond(first.notes, second.notes),
        key_images_added=len(_beyond(second.key_images, first.key_images)),
        key_images_removed=len(_beyond(first.key_images, second.key_images)),
        perturbations_changed=first.perturbations != second.perturbations,
        view_changed=first.view != second.view,
    )


def _beyond(these: Sequence[Any], those: Sequence[Any]) -> tuple[Any, ...]:
    left = list(those)
    beyond = []
    for each in these:
        if each in left:
            left.remove(each)
        else:
            beyond.append(each)
    return tuple(beyond)


Pair = tuple[SavedScan | None, SavedScan | None]


def _paired(before: Sequence[SavedScan], after: Sequence[SavedScan]) -> Iterator[Pair]:
    """Each scan beside its counterpart: the same result, or else the likeliest other of its kind."""
    left = list(after)
    partners: dict[str, SavedScan] = {}
    for likeness in (_same_result, _same_name, _same_question, _same_prompt, _same_model):
        for old in before:
            if old.result not in partners:
                found = next((new for new in left if likeness(old, new)), None)
                if found is not None:
                    partners[old.result] = found
                    left.remove(found)
    for old in before:
        yield old, partners.get(old.result)
    for new in left:
        yield None, new


def _same_result(old: SavedScan, new: SavedScan) -> bool:
    return old.result == new.result


def _same_name(old: SavedScan, new: SavedScan) -> bool:
    return old.kind is new.kind and old.label == new.label != ""


def _same_question(old: SavedScan, new: SavedScan) -> bool:
    """Of two models, most likely."""
    return old.kind is new.kind and set(_fields(old, new)) <= {"model"}


def _same_prompt(old: SavedScan, new: SavedScan) -> bool:
    prompt = old.request.get("prompt")
    return old.kind is new.kind and prompt is not None and prompt == new.request.get("prompt")


def _same_model(old: SavedScan, new: SavedScan) -> bool:
    return old.kind is new.kind and old.model == new.model


def _fields(old: SavedScan, new: SavedScan) -> dict[str, tuple[Any, Any]]:
    names = [*old.request, *(name for name in new.request if name not in old.request)]
    pairs = {name: (old.request.get(name), new.request.get(name)) for name in names}
    # A request of before it could be canonical is like one that is not.
    return {
        name: pair
        for name, pair in pairs.items()
        if pair[0] != pair[1] and (name != "canonical" or any(pair))
    }


def _scan_difference(
    store: Store, old: SavedScan | None, new: SavedScan | None, strongest: int
) -> ScanDifference:
    known = new or old
    if known is None:
        raise ValueError("neither session has the scan")
    told = ScanDifference(
        change=ScanChange.SAME,
        kind=known.kind,
        label=known.label,
        before=None if old is None else old.result,
        after=None if new is None else new.result,
    )
    if old is None or new is None:
        change = ScanChange.ADDED if old is None else ScanChange.REMOVED
        return msgspec.structs.replace(told, change=change)
    if old.result == new.result:
        return told
    changed = msgspec.structs.replace(told, change=ScanChange.CHANGED, fields=_fields(old, new))
    try:
        table = _measured(store, kept(store, old.result), kept(store, new.result), strongest)
    except _Incomparable as reason:
        return msgspec.structs.replace(changed, incomparable=str(reason))
    except Gone as gone:
        return msgspec.structs.replace(changed, incomparable=gone.detail)
    return msgspec.structs.replace(changed, table=table)


class _Incomparable(Exception):
    """Why two results have no numbers in common."""


def _measured(store: Store, before: Kept, after: Kept, strongest: int) -> TableDifference:
    first, second = _ref(before.manifest), _ref(after.manifest)
    if (first.table, first.unit) != (second.table, second.unit):
        raise _Incomparable(
            f"one measured {first.table} in {first.unit}, the other {second.table} in {second.unit}"
        )
    old, new = _read(store, before.table(first)), _read(store, after.table(second))
    shared = [key for key in old.rows if key in new.rows]
    rows = [row for key in shared if (row := _row(key, old.rows[key], new.rows[key])) is not None]
    if not shared:
        raise _Incomparable("they have no component in common")
    told = TableDifference(
        table=first.table,
        column=old.column,
        unit=first.unit,
        rows=len(rows),
        only_before=len(old.rows) - len(shared),
        only_after=len(new.rows) - len(shared),
    )
    if not rows:
        return told
    differences = np.array([row.difference for row in rows])
    ranked = sorted(rows, key=lambda row: (-row.largest, row.component, row.quantity or ""))
    return msgspec.structs.replace(
        told,
        mean_difference=float(differences.mean()),
        root_mean_square=float(np.sqrt((differences**2).mean())),
        largest=max(row.largest for row in rows),
        rank_correlation=_rank_correlation(
            np.array([row.before for row in rows]), np.array([row.after for row in rows])
        ),
        strongest=tuple(ranked[:strongest]),
    )


def _ref(manifest: Manifest) -> TableRef:
    preferred = manifest.table(_PREFERRED.get(manifest.kind, ""))
    return preferred or main_table(manifest)


class _Values(NamedTuple):
    column: str
    rows: dict[tuple[str, ...], Vector]
    """Values by component and whatever else tells rows apart."""


def _read(store: Store, stored: StoredTable) -> _Values:
    table = read_table(store, stored)
    if "component" not in table.column_names:
        raise _Incomparable(f"table {stored.ref.table} is not of components")
    column = "value" if "value" in table.column_names else _COLUMNS.get(stored.ref.table)
    column = column or _first_number(table)
    told_apart = [name for name in _SUB_KEYS if name in table.column_names]
    keys = zip(
        *(table.column(name).to_pylist() for name in ("component", *told_apart)), strict=True
    )
    return _Values(
        column,
        {
            tuple(map(str, key)): values
            for key, values in zip(keys, _vectors(table.column(column)), strict=True)
        },
    )


def _first_number(table: pa.Table) -> str:
    for field in table.schema:
        if pa.types.is_floating(field.type):
            return str(field.name)
    raise _Incomparable(f"table {provenance_of(table).table} holds no measured number")


def _vectors(column: pa.ChunkedArray) -> Iterator[Vector]:
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        flat = column.combine_chunks()
        flat = flat.chunk(0) if isinstance(flat, pa.ChunkedArray) else flat
        yield from np.asarray(flat.flatten(), dtype=np.float32).reshape(-1, width)
        return
    yield from np.asarray(column.to_numpy(), dtype=np.float32).reshape(-1, 1)


def _row(key: tuple[str, ...], old: Vector, new: Vector) -> ComponentDifference | None:
    """One row before and after; None where it was not measured in both."""
    if len(old) == len(new):
        both = np.isfinite(old) & np.isfinite(new)
        old, new = old[both], new[both]
    else:
        old, new = old[np.isfinite(old)], new[np.isfinite(new)]
    if not len(old) or not len(new):
        return None
    before, after = float(old.mean(dtype=np.float64)), float(new.mean(dtype=np.float64))
    each = np.abs(new - old).max() if len(old) == len(new) else abs(after - before)
    return ComponentDifference(
        component=key[0],
        quantity=" ".join(key[1:]) or None,
        before=before,
        after=after,
        difference=after - before,
        largest=float(each),
    )


def _rank_correlation(
    before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]
) -> float | None:
    """Spearman's; None where there are too few rows, or all of one side are alike."""
    if len(before) < FEWEST_RANKED:
        return None
    first, second = _ranks(before), _ranks(after)
    if not first.std() or not second.std():
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 0, equal values sharing theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: npt.NDArray[np.float64] = ends - (counts + 1) / 2
    return means[inverse]
