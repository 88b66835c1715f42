"""Results in one file: a zip whose every byte is named by its SHA-256.

    manifest.json            what the file is, and size and hash of each other entry
    session.json             the session's document: its SHA-256 is the revision; in a session's file
    lines.json               which result is which line's; in a batch's file
    results/<sha256>.json    a result's manifest
    chunks/<sha256>.arrow    a table

The same content gives the same bytes: entries stand in order, none is compressed (Arrow bodies stay readable
where they lie), none has a date. Nothing of a file is believed: whoever reads one checks every name, size
and hash before any of it is used, and nothing is ever unpacked to a path that the file names.
"""

import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Annotated, Any, Literal, NamedTuple

import msgspec
import pyarrow as pa
from msgspec import Meta

from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.results import Manifest, from_ipc, provenance_of

__all__ = (
    "FORMAT",
    "SESSION_FILE",
    "Archive",
    "ArchiveManifest",
    "Entry",
    "InvalidArchive",
    "canonical",
    "chunk_entry",
    "open_archive",
    "plain_entry",
    "result_digest",
    "result_entry",
    "write_archive",
)

SESSION_FILE = "application/vnd.neural-mri.session+zip"
FORMAT: Literal["neural-mri"] = "neural-mri"
VERSION = 1

MANIFEST = "manifest.json"
DOCUMENT = "session.json"
LINES = "lines.json"

LARGEST_JSON_BYTES = 64 * 2**20
"""Of one entry that is read as JSON."""
MOST_ENTRIES = 100_000

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$", max_length=64)]

_NAMES = re.compile(
    r"manifest\.json|session\.json|lines\.json|results/[0-9a-f]{64}\.json|chunks/[0-9a-f]{64}\.arrow"
)
_EPOCH = (1980, 1, 1, 0, 0, 0)
_READ_BYTES = 1 << 20
_ENCRYPTED = 0x1
_DAMAGE = (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, struct.error)
"""What zipfile raises over bytes that make no sense."""


class InvalidArchive(Unprocessable):
    """The file is no session's, or not the one that was written."""


class ArchivedFile(msgspec.Struct, frozen=True, kw_only=True):
    """An entry, as the manifest names it."""

    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0)]


class ArchiveManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an archive says of itself."""

    format: Literal["neural-mri"] = FORMAT
    version: int = VERSION
    name: str = ""
    revision: Sha256 | None = None
    """Digest of the session's document; none where the file holds results alone."""
    files: dict[str, ArchivedFile] = {}


class Entry(NamedTuple):
    """A file to be put into an archive."""

    name: str
    sha256: str
    size: int
    read: Callable[[], bytes]


def canonical(value: Any) -> bytes:
    """Canonical JSON: keys sorted, no white space. Equal values have equal bytes."""
    return msgspec.json.encode(value, order="sorted")


def result_digest(manifest: bytes) -> str:
    """What names a result: the SHA-256 of its manifest, which names its tables by theirs."""
    return hashlib.sha256(manifest).hexdigest()


def result_entry(manifest: bytes) -> Entry:
    """A result's manifest, as an archive holds it."""
    digest = result_digest(manifest)
    return Entry(f"results/{digest}.json", digest, len(manifest), lambda: manifest)


def chunk_entry(sha256: str, size: int, read: Callable[[], bytes]) -> Entry:
    """A table, as an archive holds it."""
    return Entry(f"chunks/{sha256}.arrow", sha256, size, read)


def plain_entry(name: str, body: bytes) -> Entry:
    """Something under a name that is not its hash."""
    return Entry(name, hashlib.sha256(body).hexdigest(), len(body), lambda: body)


def write_archive(
    entries: Iterable[Entry], *, name: str = "", document: bytes | None = None
) -> Iterator[bytes]:
    """An archive's bytes, piece by piece; each entry is read when its turn comes.

    Raises `ValueError` where an entry's bytes are not those that it names.
    """
    listed = {entry.name: entry for entry in entries}
    revision = None
    if document is not None:
        listed[DOCUMENT] = plain_entry(DOCUMENT, document)
        revision = listed[DOCUMENT].sha256
    ordered = [listed[name] for name in sorted(listed)]
    manifest = canonical(
        ArchiveManifest(
            name=name,
            revision=revision,
            files={
                entry.name: ArchivedFile(sha256=entry.sha256, bytes=entry.size) for entry in ordered
            },
        )
    )
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_info(MANIFEST), manifest)
        yield sink.drained()
        for entry in ordered:
            content = entry.read()
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise ValueError(f"the bytes of {entry.name} are not those that it names")
            archive.writestr(_info(entry.name), content)
            yield sink.drained()
    yield sink.drained()


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = 0o600 << 16
    info.create_system = 3
    return info


class _Sink(io.RawIOBase):
    """Where an archive is written to, and taken away from as it grows: it cannot seek."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, body: Any) -> int:
        self._parts.append(bytes(body))
        return len(body)

    def drained(self) -> bytes:
        """What has been written since the last time."""
        body = b"".join(self._parts)
        self._parts.clear()
        return body


class Archive:
    """An archive whose every byte has been seen to be what it is named for."""

    def __init__(self, file: zipfile.ZipFile, manifest: ArchiveManifest) -> None:
        self._file = file
        self.manifest = manifest
        self.results = {
            name.removeprefix("results/").removesuffix(".json"): _manifest_of(file, name)
            for name in sorted(manifest.files)
            if name.startswith("results/")
        }
        """Manifests by digest."""

    @property
    def name(self) -> str:
        """The session's name when it was written."""
        return self.manifest.name

    def document(self) -> bytes:
        """The session's document, canonical JSON. Raises `InvalidArchive` where there is none."""
        if self.manifest.revision is None:
            raise InvalidArchive("the file holds results, and no session")
        return self._file.read(DOCUMENT)

    def result(self, digest: str) -> bytes:
        """A result's manifest, as it was written."""
        return self._file.read(f"results/{digest}.json")

    def chunk(self, sha256: str) -> bytes:
        """A table's bytes."""
        return self._file.read(f"chunks/{sha256}.arrow")

    def chunks(self) -> list[str]:
        """Every table's hash, in order."""
        return [
            name.removeprefix("chunks/").removesuffix(".arrow")
            for name in sorted(self.manifest.files)
            if name.startswith("chunks/")
        ]


def open_archive(file: IO[bytes], *, largest: int) -> Archive:
    """An archive, checked throughout. Raises `InvalidArchive`, which names what is wrong with it."""
    try:
        opened = zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise InvalidArchive(f"this is no .nmri file: {error}") from error
    infos = _checked_entries(opened, largest)
    manifest = _read_manifest(opened, infos)
    _check_files(opened, infos, manifest)
    archive = Archive(opened, manifest)
    _check_tables(archive)
    return archive


def _checked_entries(file: zipfile.ZipFile, largest: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by name, once each may be read at all."""
    listed = file.infolist()
    if len(listed) > MOST_ENTRIES:
        raise InvalidArchive(f"the file has {len(listed)} entries, {MOST_ENTRIES} at most are read")
    infos: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in listed:
        name = info.orig_filename[:200]
        if not _NAMES.fullmatch(name):
            raise InvalidArchive(
                f"an entry is called {name!r}: expected manifest.json, session.json, "
                "results/<sha256>.json or chunks/<sha256>.arrow",
                entry=name,
            )
        if name in infos:
            raise InvalidArchive(f"{name} stands in the file twice", entry=name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise InvalidArchive(f"{name} is compressed: expected it as it is", entry=name)
        if info.flag_bits & _ENCRYPTED:
            raise InvalidArchive(f"{name} is encrypted", entry=name)
        total += info.file_size
        if total > largest:
            raise InvalidArchive(
                f"the file's entries have more than {largest} bytes in all", entry=name
            )
        infos[name] = info
    return infos


def _read_manifest(file: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo]) -> ArchiveManifest:
    if MANIFEST not in infos:
        raise InvalidArchive("the file has no manifest.json", entry=MANIFEST)
    try:
        manifest = msgspec.json.decode(_small(file, infos[MANIFEST]), type=ArchiveManifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArchive(f"manifest.json cannot be read: {error}", entry=MANIFEST) from error
    if manifest.version > VERSION:
        raise InvalidArchive(
            f"the file is of version {manifest.version}, this reader knows {VERSION}: upgrade "
            "neural_mri",
            entry=MANIFEST,
        )
    return manifest


def _check_files(
    file: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo], manifest: ArchiveManifest
) -> None:
    """What is there is what the manifest names, to the byte."""
    there, named = infos.keys() - {MANIFEST}, manifest.files.keys()
    for name in sorted(named - there):
        raise InvalidArchive(f"{name} is named by manifest.json and missing", entry=name)
    for name in sorted(there - named):
        raise InvalidArchive(f"{name} is not named by manifest.json", entry=name)
    for name in sorted(named):
        wanted, found = manifest.files[name], _sha256(file, infos[name])
        if infos[name].file_size != wanted.bytes or found != wanted.sha256:
            raise InvalidArchive(
                f"{name} holds bytes whose hash is {found}; manifest.json names {wanted.sha256}",
                entry=name,
                found=found,
                expected=wanted.sha256,
            )
        own = manifest.revision if name == DOCUMENT else name.rpartition("/")[2].partition(".")[0]
        if name != LINES and own != found:
            raise InvalidArchive(
                f"{name} holds bytes whose hash is {found}, not the {own} it is named for",
                entry=name,
                found=found,
                expected=own,
            )
    if (manifest.revision is not None) != (DOCUMENT in named):
        raise InvalidArchive("manifest.json names a revision without its document", entry=DOCUMENT)


def _sha256(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    digest = hashlib.sha256()
    with _reading(info.filename), file.open(info) as entry:
        while part := entry.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise InvalidArchive(f"{name} is damaged: {error}", entry=name) from error


def _small(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > LARGEST_JSON_BYTES:
        raise InvalidArchive(
            f"{info.filename} has {info.file_size} bytes, {LARGEST_JSON_BYTES} at most are read",
            entry=info.filename,
        )
    with _reading(info.filename):
        return file.read(info)


def _manifest_of(file: zipfile.ZipFile, name: str) -> Manifest:
    try:
        return msgspec.json.decode(_small(file, file.getinfo(name)), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArchive(f"{name} is no result's manifest: {error}", entry=name) from error


def _check_tables(archive: Archive) -> None:
    """Each table is one that a result names, and says of itself what the result says of it."""
    named: dict[str, str] = {}
    for digest, manifest in archive.results.items():
        for ref in manifest.tables:
            entry = f"chunks/{ref.chunk}.arrow"
            file = archive.manifest.files.get(entry)
            if file is None or file.bytes != ref.bytes:
                raise InvalidArchive(
                    f"{entry} is table {ref.name!r} of result {digest}, and missing", entry=entry
                )
            named[ref.chunk] = ref.table
    for chunk in archive.chunks():
        entry = f"chunks/{chunk}.arrow"
        if chunk not in named:
            raise InvalidArchive(f"{entry} is no result's table", entry=entry)
        try:
            table = provenance_of(from_ipc(archive.chunk(chunk))).table
        except (pa.ArrowInvalid, ValueError, OSError, KeyError, RecursionError) as error:
            raise InvalidArchive(f"{entry} cannot be read: {error}", entry=entry) from error
        if table != named[chunk]:
            raise InvalidArchive(
                f"{entry} says it holds {table!r}, its result says {named[chunk]!r}", entry=entry
            )
