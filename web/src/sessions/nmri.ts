/**
 * A session's file: a zip, nothing in it compressed, whose every byte is named by its SHA-256. Nothing of a file
 * is believed: each name, size and hash is checked before any of it is shown, and what is wrong is named. As
 * `neural_mri/contract/archives.py` writes it.
 */
import { UnreadableTable, readTable } from "../api/arrow";
import type { Manifest } from "../api/schema";
import { sha256 } from "../export/sha256";
import { t } from "../words/words.svelte";
import type { SessionDocument } from "./wire";

export interface NmriFile {
  /** The session's when it was written. */
  readonly name: string;
  /** SHA-256 of `session.json`. */
  readonly revision: string;
  readonly document: SessionDocument;
  readonly results: ReadonlyMap<string, KeptResult>;
}

export interface KeptResult {
  readonly manifest: Manifest;
  /** The manifest's bytes, whose hash names the result. */
  readonly body: Bytes;
  /** A table's Arrow file by its hash. */
  readonly chunks: ReadonlyMap<string, Bytes>;
}

export type Bytes = Uint8Array<ArrayBuffer>;

/** The file is no session's, or not the one that was written. */
export class DamagedFile extends Error {
  override readonly name = "DamagedFile";

  constructor(
    message: string,
    /** What is wrong in it, by name. */
    readonly entry: string | null = null,
  ) {
    super(message);
  }
}

interface ArchiveManifest {
  readonly format: string;
  readonly version: number;
  readonly name?: string;
  readonly revision?: string | null;
  readonly files?: Readonly<Record<string, { readonly sha256: string; readonly bytes: number }>>;
}

const VERSION = 1;
const MANIFEST = "manifest.json";
const DOCUMENT = "session.json";
const NAMES =
  /^(manifest\.json|session\.json|lines\.json|results\/[0-9a-f]{64}\.json|chunks\/[0-9a-f]{64}\.arrow)$/;

/** Reads a file whole. Throws `DamagedFile`, which names what is wrong. */
export async function readNmri(buffer: ArrayBuffer): Promise<NmriFile> {
  const entries = unzipped(buffer);
  const said = archiveManifest(entries);
  await checkFiles(entries, said);
  if (said.revision == null) throw new DamagedFile(t("The file holds results, and no session."));
  const document = json<SessionDocument>(entries, DOCUMENT);
  if (document.version > VERSION) throw tooNew(DOCUMENT, document.version);
  const results = new Map<string, KeptResult>();
  const named = new Set<string>();
  for (const name of entries.keys()) {
    if (!name.startsWith("results/")) continue;
    const manifest = json<Manifest>(entries, name);
    const chunks = new Map<string, Bytes>();
    for (const ref of manifest.tables) {
      const entry = `chunks/${ref.chunk}.arrow`;
      const body = entries.get(entry);
      if (body?.length !== ref.bytes) throw missing(entry);
      checkTable(entry, body, ref.table);
      chunks.set(ref.chunk, body);
      named.add(entry);
    }
    const digest = name.slice("results/".length, -".json".length);
    results.set(digest, { manifest, body: entries.get(name) ?? new Uint8Array(), chunks });
  }
  for (const name of entries.keys()) {
    if (name.startsWith("chunks/") && !named.has(name)) {
      throw new DamagedFile(t("{entry} belongs to no result of the file.", { entry: name }), name);
    }
  }
  for (const { result } of document.scans) {
    if (!results.has(result)) throw missing(`results/${result}.json`);
  }
  return { name: said.name ?? "", revision: said.revision, document, results };
}

function missing(entry: string): DamagedFile {
  return new DamagedFile(t("{entry} is named in the file and missing from it.", { entry }), entry);
}

function tooNew(entry: string, version: number): DamagedFile {
  return new DamagedFile(
    t("{entry} is of version {version}; this viewer reads up to version {known}.", {
      entry,
      version,
      known: VERSION,
    }),
    entry,
  );
}

function json<T>(entries: ReadonlyMap<string, Bytes>, name: string): T {
  const body = entries.get(name);
  if (body === undefined) throw missing(name);
  try {
    const value: unknown = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(body));
    if (typeof value === "object" && value !== null) return value as T;
  } catch {
    // As below: no JSON, no object.
  }
  throw new DamagedFile(t("{entry} cannot be read: it is no JSON.", { entry: name }), name);
}

function archiveManifest(entries: ReadonlyMap<string, Bytes>): ArchiveManifest {
  if (!entries.has(MANIFEST)) {
    throw new DamagedFile(t("The file has no manifest.json: it is no session's."), MANIFEST);
  }
  const said = json<ArchiveManifest>(entries, MANIFEST);
  if (said.format !== "neural-mri") {
    throw new DamagedFile(t("The file has no manifest.json: it is no session's."), MANIFEST);
  }
  if (said.version > VERSION) throw tooNew(MANIFEST, said.version);
  return said;
}

/** What is there is what the manifest names, to the byte. */
async function checkFiles(
  entries: ReadonlyMap<string, Bytes>,
  { files = {}, revision = null }: ArchiveManifest,
): Promise<void> {
  for (const name of Object.keys(files)) if (!entries.has(name)) throw missing(name);
  for (const [name, body] of entries) {
    if (name === MANIFEST) continue;
    const wanted = files[name];
    if (wanted === undefined) {
      throw new DamagedFile(t("{entry} is not named by manifest.json.", { entry: name }), name);
    }
    const found = await digest(body);
    const own = name === DOCUMENT ? revision : (/[0-9a-f]{64}/.exec(name)?.[0] ?? found);
    if (body.length !== wanted.bytes || found !== wanted.sha256 || found !== own) {
      throw new DamagedFile(
        t("{entry} is damaged: its bytes have the hash {found}, and {expected} is expected.", {
          entry: name,
          found: found.slice(0, 12),
          expected: (own ?? wanted.sha256).slice(0, 12),
        }),
        name,
      );
    }
  }
}

/** A table says of itself what its result says of it. */
function checkTable(entry: string, body: Bytes, wanted: string): void {
  let table: unknown;
  try {
    const { metadata } = readTable(alone(body));
    table = (JSON.parse(metadata.get("neural_mri") ?? "{}") as { table?: unknown }).table;
  } catch (error) {
    if (!(error instanceof UnreadableTable || error instanceof SyntaxError)) throw error;
    throw new DamagedFile(
      t("{entry} cannot be read: {why}.", { entry, why: error.message.replace(/\.$/, "") }),
      entry,
    );
  }
  if (table !== wanted) {
    throw new DamagedFile(
      t("{entry} says it holds {found}; its result says {expected}.", {
        entry,
        found: typeof table === "string" ? table : "?",
        expected: wanted,
      }),
      entry,
    );
  }
}

/** Bytes in a buffer of their own: a table's reader takes a whole one. */
export function alone(body: Bytes): ArrayBuffer {
  return body.buffer.slice(body.byteOffset, body.byteOffset + body.byteLength);
}

/** By the browser where it offers that, which it does on secure origins alone. */
async function digest(body: Bytes): Promise<string> {
  const subtle = globalThis.crypto?.subtle as SubtleCrypto | undefined;
  if (subtle === undefined) return sha256(body);
  const found = new Uint8Array(await subtle.digest("SHA-256", body));
  return Array.from(found, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The zip itself: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT

const END = 0x06054b50;
const CENTRAL = 0x02014b50;
const LOCAL = 0x04034b50;
const END_BYTES = 22;
const CENTRAL_BYTES = 46;
const LOCAL_BYTES = 30;
const LONGEST_COMMENT = 0xffff;
const ENCRYPTED = 0x1;
const NOT_HERE = 0xffffffff;

/** The entries by name, in the file's order, each seen to be stored whole. */
function unzipped(buffer: ArrayBuffer): ReadonlyMap<string, Bytes> {
  const view = new DataView(buffer);
  const end = endOf(view);
  const count = view.getUint16(end + 10, true);
  let at = view.getUint32(end + 16, true);
  if (count === 0xffff || at === NOT_HERE) {
    throw new DamagedFile(
      t("The file is larger than a browser opens: import it into the service instead."),
    );
  }
  const entries = new Map<string, Bytes>();
  try {
    for (let index = 0; index < count; index++) {
      if (view.getUint32(at, true) !== CENTRAL) throw cut();
      const flags = view.getUint16(at + 8, true);
      const method = view.getUint16(at + 10, true);
      const crc = view.getUint32(at + 16, true);
      const packed = view.getUint32(at + 20, true);
      const size = view.getUint32(at + 24, true);
      const length = view.getUint16(at + 28, true);
      const name = text(buffer, at + CENTRAL_BYTES, length);
      if (!NAMES.test(name)) {
        throw new DamagedFile(
          t("The file holds {entry}, which is no part of a session's file.", {
            entry: name.slice(0, 80),
          }),
          name,
        );
      }
      if (entries.has(name)) {
        throw new DamagedFile(t("{entry} stands in the file twice.", { entry: name }), name);
      }
      if (method !== 0 || packed !== size || (flags & ENCRYPTED) !== 0) {
        throw new DamagedFile(
          t("{entry} is compressed or encrypted: expected it as it is.", { entry: name }),
          name,
        );
      }
      const body = bodyAt(buffer, view.getUint32(at + 42, true), size);
      if (crc32(body) !== crc) {
        throw new DamagedFile(
          t("{entry} is damaged: its checksum differs.", { entry: name }),
          name,
        );
      }
      entries.set(name, body);
      at += CENTRAL_BYTES + length + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
    }
  } catch (error) {
    if (error instanceof RangeError) throw cut();
    throw error;
  }
  return entries;
}

function cut(): DamagedFile {
  return new DamagedFile(t("The file is cut short or damaged: its list of parts points nowhere."));
}

function endOf(view: DataView): number {
  const last = view.byteLength - END_BYTES;
  for (let at = last; at >= Math.max(0, last - LONGEST_COMMENT); at--) {
    if (view.getUint32(at, true) === END) return at;
  }
  throw new DamagedFile(t("This is no .nmri file, or it was cut short."));
}

/** The local header says again how long the name is, and what else stands before the bytes. */
function bodyAt(buffer: ArrayBuffer, header: number, size: number): Bytes {
  const view = new DataView(buffer);
  if (view.getUint32(header, true) !== LOCAL) throw cut();
  const lengths = view.getUint16(header + 26, true) + view.getUint16(header + 28, true);
  return new Uint8Array(buffer, header + LOCAL_BYTES + lengths, size);
}

function text(buffer: ArrayBuffer, at: number, length: number): string {
  return new TextDecoder().decode(new Uint8Array(buffer, at, length));
}

let crcs: Uint32Array | null = null;

function crc32(body: Bytes): number {
  crcs ??= Uint32Array.from({ length: 256 }, (_, byte) => {
    let crc = byte;
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
    return crc;
  });
  const table = crcs;
  let crc = 0xffffffff;
  for (const byte of body) crc = (crc >>> 8) ^ (table[(crc ^ byte) & 0xff] ?? 0);
  return (crc ^ 0xffffffff) >>> 0;
}
