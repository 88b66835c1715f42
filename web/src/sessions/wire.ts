/** Sessions as the service sends and takes them, and what may be asked of it. Names are the wire's. */
import { Refusal } from "../api/refusals";
import type { Client } from "../api/client";
import type { JobState, JobView } from "../api/schema";

export interface SavedScan {
  /** SHA-256 of the result's manifest. */
  readonly result: string;
  readonly scan_key: string;
  readonly kind: string;
  readonly model: string;
  readonly revision: string;
  readonly request: Readonly<Record<string, unknown>>;
  readonly label: string;
}

/** Something seen, and where. */
export interface Note {
  readonly text: string;
  /** The result it is about; of the session as a whole where there is none. */
  readonly scan: string | null;
  readonly component: string | null;
  readonly position: number | null;
  readonly author: string;
}

export type View = Readonly<Record<string, unknown>>;

export interface SavedImage {
  readonly caption: string;
  readonly scan: string | null;
  readonly view: View;
}

export interface SessionDocument {
  readonly version: number;
  readonly parent: string | null;
  readonly scans: readonly SavedScan[];
  readonly perturbations: readonly unknown[];
  readonly notes: readonly Note[];
  readonly key_images: readonly SavedImage[];
  readonly view: View;
}

export interface SessionView {
  readonly id: string;
  readonly name: string;
  readonly owner: string;
  readonly pinned: boolean;
  readonly head: string;
  readonly revision: number;
  readonly scans: number;
  readonly models: readonly string[];
  readonly origin: "made" | "forked" | "imported";
  readonly forked_from: string | null;
  readonly created_at: string;
  readonly updated_at: string;
}

export interface Arrival {
  readonly job: string;
  readonly author: string;
  readonly label: string;
  readonly state: JobState;
  /** Why it does not join though it has succeeded. */
  readonly problem?: { readonly detail: string } | null;
}

export interface SessionDetail extends SessionView {
  /** The revision that the document is of. */
  readonly opened: string;
  readonly document: SessionDocument;
  readonly arriving: readonly Arrival[];
  readonly redacted: boolean;
}

export interface SessionPage {
  readonly sessions: readonly SessionView[];
  readonly next: string | null;
}

export interface RevisionView {
  readonly number: number;
  readonly revision: string;
  readonly parent: string | null;
  readonly author: string;
  readonly message: string;
  readonly created_at: string;
}

export type ShareAccess = "read" | "fork" | "contribute";

export interface ShareView {
  readonly id: string;
  readonly access: ShareAccess;
  readonly redacted: boolean;
  readonly label: string;
  readonly created_at: string;
  readonly expires_at: string | null;
  readonly revoked_at: string | null;
}

export interface CreatedShare extends ShareView {
  /** Where the viewer opens it. Said once. */
  readonly path: string;
}

export interface ComponentDifference {
  readonly component: string;
  readonly quantity: string | null;
  readonly before: number;
  readonly after: number;
  readonly difference: number;
}

export interface ScanDifference {
  readonly change: "same" | "changed" | "added" | "removed";
  readonly kind: string;
  readonly label: string;
  readonly before: string | null;
  readonly after: string | null;
  readonly fields: Readonly<Record<string, readonly [unknown, unknown]>>;
  readonly table: {
    readonly table: string;
    readonly unit: string;
    readonly rows: number;
    readonly root_mean_square: number | null;
    readonly rank_correlation: number | null;
    readonly strongest: readonly ComponentDifference[];
  } | null;
  readonly incomparable: string | null;
}

export interface SessionDifference {
  readonly before: string;
  readonly after: string;
  readonly scans: readonly ScanDifference[];
  readonly notes_added: readonly Note[];
  readonly notes_removed: readonly Note[];
  readonly key_images_added: number;
  readonly key_images_removed: number;
}

export interface Saved {
  readonly type: "saved";
  readonly revision: string;
  readonly number: number;
  readonly name: string;
  readonly author: string;
  readonly added: readonly string[];
}

export type SessionEvent =
  Saved | ({ readonly type: "scan" } & Arrival) | { readonly type: "closed" };

/** A scan by the job that measured it, or by the result that the session has already. */
export type ScanReference = { readonly label: string } & (
  { readonly job: string } | { readonly result: string }
);

export interface Content {
  readonly scans: readonly ScanReference[];
  readonly perturbations: readonly unknown[];
  readonly notes: readonly Note[];
  readonly key_images: readonly SavedImage[];
  readonly view: View;
}

/** Where a session is read from: by its id, or by a link's token. */
export type Where = AtRevision | { readonly token: string };

export interface AtRevision {
  readonly id: string;
  /** The latest where it is null. */
  readonly revision: string | null;
}

export const FILE_TYPE = "application/vnd.neural-mri.session+zip";

/** What may be asked of the service about sessions. Throws its refusals. */
export class SessionsService {
  readonly #client: Client;

  constructor(client: Client) {
    this.#client = client;
  }

  page(words: string, after: string | null): Promise<SessionPage> {
    const asked = new URLSearchParams({ q: words, limit: "50" });
    if (after !== null) asked.set("after", after);
    return this.#json(`/api/sessions?${asked}`);
  }

  detail(where: Where): Promise<SessionDetail> {
    return this.#json(...at(where, ""));
  }

  /** Everything in one file. */
  async file(where: Where): Promise<ArrayBuffer> {
    const answer = await this.#client.ask(...at(where, "/export"));
    return answer.arrayBuffer();
  }

  create(name: string, content: Content, message: string): Promise<SessionDetail> {
    return this.#json("/api/sessions", sent("POST", { name, message, ...content }));
  }

  save(id: string, over: string, content: Content, message: string): Promise<SessionDetail> {
    const headers = { "If-Match": `"${over}"` };
    return this.#json(path(id), sent("PUT", { message, ...content }, headers));
  }

  change(id: string, change: { name?: string; pinned?: boolean }): Promise<SessionView> {
    return this.#json(path(id), sent("PATCH", change));
  }

  async remove(id: string): Promise<void> {
    await this.#client.ask(path(id), { method: "DELETE" });
  }

  fork(where: Where, name: string | null): Promise<SessionDetail> {
    const named = name === null ? {} : { name };
    if ("token" in where) {
      return this.#json("/api/shared/fork", sent("POST", named, token(where.token)));
    }
    const revision = where.revision === null ? {} : { revision: where.revision };
    return this.#json(`${path(where.id)}/fork`, sent("POST", { ...named, ...revision }));
  }

  add(where: Where, job: string): Promise<SessionDetail> {
    return "token" in where
      ? this.#json("/api/shared/scans", sent("POST", { job }, token(where.token)))
      : this.#json(`${path(where.id)}/scans`, sent("POST", { job }));
  }

  /** The job of a model's anatomy, where it is there already or comes at once; else null. */
  async structure(model: string): Promise<string | null> {
    const asked = sent("POST", { model }, { Prefer: "wait=5" });
    const answer = await this.#client.ask("/api/scan/structural", asked, false);
    const job = (await answer.json()) as JobView;
    if (job.state === "succeeded") return job.id;
    await this.#client.cancel(job.id);
    return null;
  }

  revisions(id: string): Promise<readonly RevisionView[]> {
    return this.#json(`${path(id)}/revisions`);
  }

  shares(id: string): Promise<readonly ShareView[]> {
    return this.#json(`${path(id)}/shares`);
  }

  share(
    id: string,
    wanted: { access: ShareAccess; redact: boolean; label: string; days: number | null },
  ): Promise<CreatedShare> {
    const { access, redact, label, days } = wanted;
    const expires = days === null ? {} : { expires_in_seconds: days * 86_400 };
    return this.#json(`${path(id)}/shares`, sent("POST", { access, redact, label, ...expires }));
  }

  revoke(id: string, share: string): Promise<ShareView> {
    return this.#json(`${path(id)}/shares/${share}`, { method: "DELETE" });
  }

  take(file: ArrayBuffer): Promise<SessionDetail> {
    const headers = { "Content-Type": FILE_TYPE };
    return this.#json("/api/sessions/import", { method: "POST", headers, body: file });
  }

  difference(before: AtRevision, after: AtRevision): Promise<SessionDifference> {
    const asked = new URLSearchParams({ other: after.id, strongest: "5" });
    if (before.revision !== null) asked.set("revision", before.revision);
    if (after.revision !== null) asked.set("other_revision", after.revision);
    return this.#json(`${path(before.id)}/difference?${asked}`);
  }

  /** What happens to a session, from now on and across broken connections, until it is deleted. */
  events(
    where: Where,
    signal: AbortSignal,
    connected: (yes: boolean) => void,
  ): AsyncGenerator<SessionEvent> {
    const [asked, { headers = {} } = {}] = at(where, "/events", false);
    return this.#client.stream<SessionEvent>(asked, {
      signal,
      connected,
      headers: headers as Record<string, string>,
      last: "closed",
      // Others may come long after: a service that restarts is waited for.
      patience: Infinity,
    });
  }

  async #json<T>(asked: string, init?: RequestInit): Promise<T> {
    const answer = await this.#client.ask(asked, init);
    return (await answer.json()) as T;
  }
}

/** The revision that stands now, where a save was refused because it is another. */
export function conflict(error: unknown): string | null {
  if (!(error instanceof Refusal) || error.status !== 412) return null;
  const { head } = error.problem as { head?: unknown };
  return typeof head === "string" ? head : "";
}

function path(id: string): string {
  return `/api/sessions/${encodeURIComponent(id)}`;
}

function at(where: Where, rest: string, revised = true): [string, RequestInit?] {
  if ("token" in where) return [`/api/shared${rest}`, { headers: token(where.token) }];
  const { id, revision } = where;
  return [path(id) + rest + (revised && revision !== null ? `?revision=${revision}` : "")];
}

function token(value: string): Record<string, string> {
  return { "Share-Token": value };
}

function sent(
  method: string,
  body: unknown,
  headers: Readonly<Record<string, string>> = {},
): RequestInit {
  return {
    method,
    headers: { "Content-Type": "application/json", ...headers },
    body: JSON.stringify(body),
  };
}
