/** What others do to the open session while it is open: their saves, and their scans on the way. */
import { explain, isAbort } from "../api/refusals";
import { whereOf } from "./origin";
import type { Session } from "./session.svelte";
import type { Arrival, Saved, SessionEvent, SessionsService } from "./wire";

/** Who wants to know. */
export interface Follower {
  /** Somebody has saved. */
  saved(session: Session, event: Saved): Promise<void>;
  /** The session has been deleted. */
  closed(): void;
  /** What became of a save cannot be told, for this reason. */
  failed(sentence: string): void;
}

const ENDED = ["succeeded", "failed", "cancelled", "expired", "quarantined"];

export class Following {
  readonly #service: SessionsService;
  readonly #follower: Follower;
  #stream: AbortController | null = null;
  /** Scans of others that are on their way. */
  arriving = $state.raw<readonly Arrival[]>([]);
  connected = $state(true);

  constructor(service: SessionsService, follower: Follower) {
    this.#service = service;
    this.#follower = follower;
  }

  /** Follows nothing any more; then no connection is lost either. */
  stop(): void {
    this.#stream?.abort();
    this.#stream = null;
    this.connected = true;
  }

  /** Follows a session from now on, unless it is one that nobody changes any more. */
  async follow(session: Session): Promise<void> {
    this.stop();
    const { origin } = session;
    if (origin.kind !== "own" && origin.kind !== "shared") return;
    if (origin.kind === "own" && origin.revision !== null) return;
    const stream = new AbortController();
    this.#stream = stream;
    const connected = (yes: boolean) => {
      if (this.#stream === stream) this.connected = yes;
    };
    try {
      const events = this.#service.events(whereOf(origin), stream.signal, connected);
      for await (const event of events) {
        if (this.#stream !== stream) return;
        try {
          await this.#heard(session, event);
        } catch (error) {
          this.#follower.failed(explain(error));
        }
      }
    } catch (error) {
      // The stream of a link ends with the link, and what has been read stays.
      if (!isAbort(error) && this.#stream === stream) this.connected = false;
    }
  }

  async #heard(session: Session, event: SessionEvent): Promise<void> {
    if (event.type === "closed") this.#follower.closed();
    else if (event.type === "scan") {
      const others = this.arriving.filter(({ job }) => job !== event.job);
      const left = ENDED.includes(event.state) && !event.problem;
      this.arriving = left ? others : [...others, event];
    } else await this.#follower.saved(session, event);
  }
}
