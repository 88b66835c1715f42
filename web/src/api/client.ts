/**
 * The service's HTTP interface. Every refusal becomes a `Refusal` that carries one clear sentence.
 * Knows nothing of what is drawn.
 */
import type { FollowOptions, StreamEvent } from "./events";
import { Refusal, isAbort, refused } from "./refusals";
import {
  ARROW_FILE,
  MODELS,
  jobPath,
  manifestPath,
  post,
  structural,
  submission,
  table,
  type Asked,
} from "./requests";
import type { Identity, JobEvent, JobView, Manifest, ModelInfo, Tokens } from "./schema";
import { t } from "../words/words.svelte";

type Fetch = typeof fetch;

export class Client {
  readonly #fetch: Fetch;
  readonly #base: string;
  /** Told whenever the service does not know who asks: that is not the single request's matter. */
  onStranger: () => void = () => undefined;
  /** Whether somebody looks who need not be known: a shared session is open. */
  isGuest = false;
  /** What is answered here, or where else it is asked for: scans that an open session keeps. */
  kept: (path: string, init?: RequestInit) => Response | string | null = () => null;

  /** `base` is where `/api` lives: empty for the page's own origin. */
  constructor(base = "", fetcher: Fetch = (input, init) => fetch(input, init)) {
    this.#base = base;
    this.#fetch = fetcher;
  }

  async models(): Promise<readonly ModelInfo[]> {
    const answer = await this.#json<readonly ModelInfo[] | { models: readonly ModelInfo[] }>(
      MODELS,
    );
    return "models" in answer ? answer.models : answer;
  }

  tokenize(model: string, prompt: string, signal?: AbortSignal): Promise<Tokens> {
    return this.#json("/api/tokenize", { ...post({ model, prompt }), ...given({ signal }) });
  }

  /** Who the service takes us for. */
  whoAmI(): Promise<Identity> {
    return this.#json("/api/login");
  }

  /** Exchanges a key for a cookie that no script can read. The key is not kept. */
  logIn(key: string): Promise<Identity> {
    return this.#json("/api/login", post({ key }));
  }

  async logOut(): Promise<void> {
    await this.ask("/api/logout", { method: "POST" });
  }

  /** Asks for a scan; `wait` seconds are granted for it to finish before the answer comes. */
  submit(
    endpoint: string,
    request: Readonly<Record<string, unknown>>,
    options: { readonly wait?: number; readonly signal?: AbortSignal } = {},
  ): Promise<JobView> {
    return this.#submitted(submission(endpoint, request, options.wait), options.signal);
  }

  /** T1 of a model, or of the service's own. */
  structural(model: string | null, signal?: AbortSignal): Promise<JobView> {
    return this.#submitted(structural(model), signal);
  }

  #submitted({ path, init }: Asked, signal?: AbortSignal): Promise<JobView> {
    return this.#json(path, { ...init, ...given({ signal }) });
  }

  job(id: string): Promise<JobView> {
    return this.#json(jobPath(id));
  }

  /** Asks for a job to be stopped; its event stream says when it has. */
  async cancel(id: string): Promise<void> {
    await this.ask(jobPath(id), { method: "DELETE" });
  }

  manifest(id: string): Promise<Manifest> {
    return this.#json(manifestPath(id));
  }

  /** An answer as it came, byte for byte. */
  async answer(path: string): Promise<{ type: string; body: Uint8Array<ArrayBuffer> }> {
    const headers = path.includes("/result/") ? { headers: { Accept: ARROW_FILE } } : {};
    const answer = await this.ask(path, headers);
    const type = answer.headers.get("Content-Type") ?? "";
    return { type, body: new Uint8Array(await answer.arrayBuffer()) };
  }

  async table(id: string, name: string): Promise<ArrayBuffer> {
    const { path, init } = table(id, name);
    return (await this.ask(path, init)).arrayBuffer();
  }

  /**
   * One layer's attention patterns for the prompt of a finished scan. The service measures them when
   * first asked; while it does (202) we follow that job and ask again.
   */
  async attention(id: string, layer: number, signal?: AbortSignal): Promise<ArrayBuffer> {
    const path = `${jobPath(id)}/attention/${layer}`;
    for (let attempt = 0; ; attempt++) {
      const answer = await this.ask(path, {
        headers: { Accept: ARROW_FILE },
        ...given({ signal }),
      });
      if (answer.status !== 202) return answer.arrayBuffer();
      const job = (await answer.json()) as JobView;
      const ended = await this.#end(job, signal);
      if (ended.state !== "succeeded" || attempt >= 3) {
        throw new Refusal(
          ended.problem ?? { title: `The attention scan ended as ${ended.state}`, status: 409 },
        );
      }
    }
  }

  /** A job's events from its beginning to its end, across broken connections. */
  events(
    job: JobView,
    signal: AbortSignal,
    connected?: (yes: boolean) => void,
  ): AsyncGenerator<JobEvent> {
    const path = job.links["events"] ?? `${jobPath(job.id)}/events`;
    return this.stream(path, { signal, ...given({ connected }) });
  }

  /** Any event stream to its end, across broken connections. */
  async *stream<E extends StreamEvent>(path: string, options: FollowOptions): AsyncGenerator<E> {
    // Most of what is opened is finished, and has no use for a stream's reader.
    const { follow } = await import("./events");
    try {
      yield* follow<E>(this.#base + path, { fetch: this.#fetch, ...options });
    } catch (error) {
      if (error instanceof Refusal && error.status === 401) this.#stranger();
      throw error;
    }
  }

  #stranger(): void {
    if (!this.isGuest) this.onStranger();
  }

  async #end(job: JobView, signal?: AbortSignal): Promise<Pick<JobView, "state" | "problem">> {
    for await (const event of this.events(job, signal ?? new AbortController().signal)) {
      if (event.type === "ended") return event;
    }
    return this.job(job.id);
  }

  async #json<T>(path: string, init?: RequestInit): Promise<T> {
    const answer = await this.ask(path, init);
    return (await answer.json()) as T;
  }

  /** Any request; of what is kept here as well, unless it must be the service. Throws its refusal. */
  async ask(path: string, init?: RequestInit, here = true): Promise<Response> {
    let answer: Response;
    try {
      const kept = here ? this.kept(path, init) : null;
      const at = typeof kept === "string" ? kept : path;
      answer = kept instanceof Response ? kept : await this.#fetch(this.#base + at, init);
    } catch (error) {
      if (isAbort(error)) throw error;
      throw new Refusal(
        {
          title: t("The service cannot be reached"),
          detail: t("nothing answers; try again once it runs"),
          status: 0,
        },
        { cause: error },
      );
    }
    if (answer.ok) return answer;
    // A wrong key is told where it was typed.
    if (answer.status === 401 && path !== "/api/login") this.#stranger();
    throw await refused(answer);
  }
}

/** The members that have a value: an optional property must be absent, not undefined. */
function given<T extends object>(members: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(
    Object.entries(members).filter(([, value]) => value !== undefined),
  ) as never;
}
