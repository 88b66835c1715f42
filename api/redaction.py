"""Sessions without their prompts: what a redacted link shows.

Every text that may come from a prompt or a vocabulary is taken out: of requests by the fields' names, of
tables every column that is not known to hold none, of notes and captions each word that a prompt has. What
stays is structure and numbers. Hashes are those of what is shown, and scan keys, which a guessed prompt would
confirm, become pseudonyms of the link's own. Numbers are not made up: who has the model and guesses a prompt
can still recognise its activations.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from api.session_contents import Kept, kept
from neural_mri.backing import shares
from neural_mri.backing.storage import Store
from neural_mri.backing.stored import StoredTable, read_table
from neural_mri.contract.archives import Entry, canonical, chunk_entry, result_entry
from neural_mri.contract.perturbations import Perturbation
from neural_mri.contract.results import Manifest, TableRef, provenance_of, stamp, to_ipc
from neural_mri.contract.sessions import (
    MOST_DEPTH,
    KeyImage,
    Note,
    SavedScan,
    SessionDocument,
)

__all__ = ("REDACTED", "Redaction", "redacted_table")

REDACTED = "[redacted]"
REMEMBERED = 1024

_REQUEST_TEXTS = frozenset(
    {"prompt", "corrupt_prompt", "source_prompt", "texts", "subject", "answer", "foil"}
)
"""Fields of requests that hold what somebody wrote, or tokens."""

_PLAIN_COLUMNS = frozenset(
    {
        *("component", "kind", "quantity", "role", "lens", "channel", "part", "circuit"),
        *("name", "dtype", "tied_to", "source", "target"),
    }
)
"""Columns of words of our own; any other column of texts is emptied."""
_TOKEN_COLUMNS = re.compile(r".*_id|start|end")
"""Columns of numbers that say which token, or how long a text is."""
_IDENTIFIER = re.compile(r"[\w.:/#-]{0,64}")
_WORD = re.compile(r"\w{4,}")


class _Secrets:
    """Texts that are not to be shown, and their words."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = {text.strip().casefold() for text in texts if text.strip()}
        words = {word for text in self._texts for word in _WORD.findall(text)}
        words |= {text for text in self._texts if len(text) < 200}
        listed = sorted(map(re.escape, words), key=len, reverse=True)
        self._pattern = re.compile(
            "|".join(rf"(?<!\w){word}(?!\w)" for word in listed) or r"(?!)", re.IGNORECASE
        )

    def without(self, text: str) -> str:
        """A text of somebody's, each word that a prompt has taken out."""
        return self._pattern.sub(REDACTED, text)

    def identifier(self, text: str) -> str:
        """A word of a program's, unless a prompt may have it."""
        is_plain = _IDENTIFIER.fullmatch(text) is not None
        folded = text.casefold()
        is_secret = len(text) > 1 and any(folded in secret for secret in self._texts)
        return text if is_plain and not is_secret else REDACTED

    def state(self, value: Any, levels: int = MOST_DEPTH) -> Any:
        """A viewer's state, its texts taken out, and what an earlier release kept below so many levels."""
        match value:
            case str():
                return self.identifier(value)
            case dict() | list() | tuple() if not levels:
                return REDACTED
            case dict():
                return {
                    self.identifier(name): self.state(inner, levels - 1)
                    for name, inner in value.items()
                }
            case list() | tuple():
                return [self.state(inner, levels - 1) for inner in value]
            case _:
                return value


class _Shown(NamedTuple):
    """A result as a link shows it."""

    digest: str
    body: bytes
    manifest: Manifest
    chunks: Mapping[str, StoredTable]
    """The table behind each shown one, by the shown one's hash."""


_shown: OrderedDict[tuple[str, str], _Shown] = OrderedDict()


class Redaction:
    """A session as one link shows it. Reads tables: use it in a thread."""

    def __init__(
        self, store: Store, pepper: bytes, share_id: str, document: SessionDocument
    ) -> None:
        self._store = store
        self._pepper = pepper
        self._share_id = share_id
        self._whole = document
        self._results = {
            scan.result: self._show(kept(store, scan.result)) for scan in document.scans
        }
        found = [kept(store, scan.result).manifest for scan in document.scans]
        self._secrets = _Secrets(
            text
            for scan, manifest in zip(document.scans, found, strict=True)
            for text in (*_secret_texts(scan.request), *manifest.prompt_tokens)
        )

    @cached_property
    def body(self) -> bytes:
        """The shown document, canonical JSON."""
        return canonical(self.document())

    @property
    def revision(self) -> str:
        """Its hash."""
        return hashlib.sha256(self.body).hexdigest()

    @property
    def results(self) -> tuple[_Shown, ...]:
        """The results as they are shown, in order."""
        return tuple(self._results.values())

    def name(self, name: str) -> str:
        """The session's."""
        return self._secrets.without(name)

    def document(self) -> SessionDocument:
        """The document as it is shown; it has no past."""
        whole = self._whole
        return SessionDocument(
            scans=tuple(map(self._scan, whole.scans)),
            perturbations=msgspec.convert(
                _request(msgspec.to_builtins(whole.perturbations)),
                tuple[Perturbation, ...],
            ),
            notes=tuple(map(self._note, whole.notes)),
            key_images=tuple(map(self._image, whole.key_images)),
            view=self._secrets.state(whole.view),
        )

    def entries(self) -> Iterator[Entry]:
        """What an archive of the results holds. A table is redacted when its turn comes."""
        for shown in self.results:
            yield result_entry(shown.body)
            for ref in shown.manifest.tables:
                yield chunk_entry(ref.chunk, ref.bytes, partial(self.table, shown, ref))

    def table(self, shown: _Shown, ref: TableRef) -> bytes:
        """A shown table's bytes."""
        return to_ipc(self._table(read_table(self._store, shown.chunks[ref.chunk])))

    def _scan(self, scan: SavedScan) -> SavedScan:
        return msgspec.structs.replace(
            scan,
            result=self._results[scan.result].digest,
            scan_key=self._pseudonym(scan.scan_key),
            request=_request(scan.request),
            label=self._secrets.without(scan.label),
        )

    def _note(self, note: Note) -> Note:
        return msgspec.structs.replace(
            note, text=self._secrets.without(note.text), scan=self._named(note.scan)
        )

    def _image(self, image: KeyImage) -> KeyImage:
        return KeyImage(
            caption=self._secrets.without(image.caption),
            scan=self._named(image.scan),
            view=self._secrets.state(image.view),
        )

    def _named(self, scan: str | None) -> str | None:
        return None if scan is None else self._results[scan].digest

    def _pseudonym(self, scan_key: str) -> str:
        return shares.pseudonym(self._pepper, self._share_id, scan_key)

    def _show(self, whole: Kept) -> _Shown:
        known = _shown.get((self._share_id, whole.digest))
        if known is not None:
            return known
        refs, chunks = [], {}
        for ref in whole.manifest.tables:
            own = whole.table(ref)
            body = to_ipc(self._table(read_table(self._store, own)))
            chunk = hashlib.sha256(body).hexdigest()
            refs.append(msgspec.structs.replace(ref, chunk=chunk, bytes=len(body)))
            chunks[chunk] = own
        manifest = msgspec.structs.replace(
            whole.manifest,
            scan_key=self._pseudonym(whole.manifest.scan_key),
            request=_request(whole.manifest.request),
            prompt_tokens=("",) * len(whole.manifest.prompt_tokens),
            tables=tuple(refs),
        )
        body = canonical(manifest)
        shown = _Shown(hashlib.sha256(body).hexdigest(), body, manifest, chunks)
        _shown[self._share_id, whole.digest] = shown
        while len(_shown) > REMEMBERED:
            _shown.popitem(last=False)
        return shown

    def _table(self, table: pa.Table) -> pa.Table:
        scan_key = provenance_of(table).scan_key
        return redacted_table(table, self._pseudonym(scan_key))


def redacted_table(table: pa.Table, scan_key: str) -> pa.Table:
    """The table without a text or a token that may be a prompt's."""
    provenance = provenance_of(table)
    for index, field in enumerate(table.schema):
        if (column := _emptied(field, table.num_rows)) is not None:
            table = table.set_column(index, field, column)
    said = msgspec.structs.replace(
        provenance, scan_key=scan_key, parameters=_plain(provenance.parameters)
    )
    return stamp(table.replace_schema_metadata(None), said)


def _emptied(field: pa.Field, rows: int) -> pa.Array | None:
    """A column with nothing in it; None for one that may stay."""
    if field.name in _PLAIN_COLUMNS:
        return None
    if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
        return pa.array([""] * rows, field.type)
    if pa.types.is_integer(field.type) and _TOKEN_COLUMNS.fullmatch(field.name):
        nothing = 0 if field.name in ("start", "end") else -1
        return pa.array([nothing] * rows, field.type)
    if pa.types.is_list(field.type) and not _is_number(field.type.value_type):
        return pa.array([[]] * rows, field.type)
    return None


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _plain(parameters: Any, levels: int = MOST_DEPTH) -> Any:
    """What a table says of its making, texts left out that are no words of ours, and what is nested deeper."""
    match parameters:
        case str():
            return parameters if _IDENTIFIER.fullmatch(parameters) else REDACTED
        case dict() | list() | tuple() if not levels:
            return REDACTED
        case dict():
            return {
                name: _plain(inner, levels - 1)
                for name, inner in parameters.items()
                if name not in _REQUEST_TEXTS
            }
        case list() | tuple():
            return [_plain(inner, levels - 1) for inner in parameters]
        case _:
            return parameters


def _request(value: Any, levels: int = MOST_DEPTH) -> Any:
    """A request, what somebody wrote taken out, and what is nested deeper than any of ours."""
    match value:
        case dict() | list() | tuple() if not levels:
            return REDACTED
        case dict():
            return {
                name: _hidden(inner) if name in _REQUEST_TEXTS else _request(inner, levels - 1)
                for name, inner in value.items()
            }
        case list() | tuple():
            return [_request(inner, levels - 1) for inner in value]
        case _:
            return value


def _hidden(value: Any) -> Any:
    match value:
        case None:
            return None
        case list() | tuple():
            return [REDACTED for _ in value]
        case _:
            return REDACTED


def _secret_texts(value: Any, *, secret: bool = False, levels: int = MOST_DEPTH) -> Iterator[str]:
    """What somebody wrote in a request, as far down as it is shown."""
    match value:
        case str() if secret:
            yield value
        case dict() if levels:
            for name, inner in value.items():
                is_secret = secret or name in _REQUEST_TEXTS
                yield from _secret_texts(inner, secret=is_secret, levels=levels - 1)
        case list() | tuple() if levels:
            for inner in value:
                yield from _secret_texts(inner, secret=secret, levels=levels - 1)
