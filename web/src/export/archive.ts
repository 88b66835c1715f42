/**
 * A viewing as one block of bytes: what is on the screen, and every answer of the service that it is made
 * of. It goes into a page that opens without a service, and comes back out of it.
 */
import { sha256 } from "./sha256";

/** Raised when a reader of before could not read what is written. */
const VERSION = 1;

/** One answer of the service, byte for byte. */
export interface Answer {
  /** `GET /api/jobs/…`. */
  readonly request: string;
  readonly type: string;
  readonly body: Uint8Array<ArrayBuffer>;
}

/** What was on the screen at a time of a recording. */
export interface Step {
  readonly milliseconds: number;
  readonly fragment: string;
}

export interface Archive {
  /** The address's fragment: everything that can be seen. */
  readonly fragment: string;
  readonly savedAt: string;
  readonly recording: readonly Step[];
  /** The words of another language than English, where it was saved in one. */
  readonly words: Readonly<Record<string, string>> | null;
  readonly answers: readonly Answer[];
}

export class UnreadableArchive extends Error {
  override readonly name = "UnreadableArchive";
}

interface Head {
  readonly version: number;
  readonly fragment: string;
  readonly savedAt: string;
  readonly recording: readonly Step[];
  readonly words: Readonly<Record<string, string>> | null;
  readonly answers: readonly { request: string; type: string; bytes: number }[];
}

/** Length of the head, the head as JSON, then all bodies; compressed, as text that HTML can carry. */
export async function pack(archive: Archive): Promise<string> {
  const head: Head = {
    version: VERSION,
    fragment: archive.fragment,
    savedAt: archive.savedAt,
    recording: archive.recording,
    words: archive.words,
    answers: archive.answers.map(({ request, type, body }) => ({
      request,
      type,
      bytes: body.length,
    })),
  };
  const written = new TextEncoder().encode(JSON.stringify(head));
  const length = new Uint8Array(4);
  new DataView(length.buffer).setUint32(0, written.length);
  const parts = [length, written, ...archive.answers.map(({ body }) => body)];
  const stream = new Blob(parts).stream().pipeThrough(new CompressionStream("gzip"));
  return base64(new Uint8Array(await new Response(stream).arrayBuffer()));
}

export async function unpack(text: string): Promise<Archive> {
  const bytes = await decompressed(text);
  const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0);
  const head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length))) as Head;
  if (head.version !== VERSION) {
    throw new UnreadableArchive(
      `This page was saved in version ${head.version} of the form; version ${VERSION} is read here`,
    );
  }
  let at = 4 + length;
  const answers = head.answers.map(({ request, type, bytes: size }) => {
    const body = bytes.slice(at, at + size);
    at += size;
    return { request, type, body };
  });
  if (at !== bytes.length) {
    throw new UnreadableArchive(`The saved answers end at byte ${at} of ${bytes.length}`);
  }
  const { fragment, savedAt, recording, words } = head;
  return { fragment, savedAt, recording, words, answers };
}

async function decompressed(text: string): Promise<Uint8Array<ArrayBuffer>> {
  try {
    const packed = Uint8Array.from(atob(text.trim()), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch (error) {
    throw new UnreadableArchive("This is not a page that was saved here, or it was cut short", {
      cause: error,
    });
  }
}

/**
 * The same for two viewings if and only if they show the same of the same numbers: the fragment and every
 * table behind it. Who saved it, and when, do not count.
 */
export function stateHash({ fragment, answers }: Pick<Archive, "fragment" | "answers">): string {
  const tables = answers
    .filter(({ request }) => request.includes("/result/"))
    .map(({ request, body }) => `${request} ${sha256(body)}`)
    .sort();
  return sha256(new TextEncoder().encode([fragment, ...tables].join("\n")));
}

/** In pieces: an argument list has a limit. */
function base64(bytes: Uint8Array): string {
  const piece = 0x8000;
  let binary = "";
  for (let at = 0; at < bytes.length; at += piece) {
    binary += String.fromCharCode(...bytes.subarray(at, at + piece));
  }
  return btoa(binary);
}
