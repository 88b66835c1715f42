/**
 * An event stream, read with fetch: a browser's `EventSource` hides status codes and waits three seconds
 * after a cut. Resumes with `Last-Event-ID`; ends after its last event, a job's `ended`.
 */
import { createParser, type EventSourceMessage } from "eventsource-parser";

import { Refusal, isAbort, refused } from "./refusals";
import type { JobEvent } from "./schema";
import { t } from "../words/words.svelte";

export interface StreamEvent {
  readonly type: string;
}

export interface FollowOptions {
  readonly signal: AbortSignal;
  readonly headers?: Readonly<Record<string, string>>;
  /** The type of the last event; a job's where it is not said. */
  readonly last?: string;
  readonly fetch?: typeof fetch;
  /** First pause before connecting again; the server's `retry:` replaces it. */
  readonly retryMilliseconds?: number;
  /** Connections in a row that bring no event before we give up. */
  readonly patience?: number;
  /** Told when the connection is lost, and when it stands again. */
  readonly connected?: (yes: boolean) => void;
}

const LONGEST_PAUSE = 10_000;

/**
 * Yields each event once, in order. Throws `Refusal` when the service refuses the stream (401, 404)
 * or cannot be reached `patience` times in a row; an `AbortError` when the signal fires.
 */
export async function* follow<E extends StreamEvent = JobEvent>(
  url: string,
  options: FollowOptions,
): AsyncGenerator<E> {
  const fetcher = options.fetch ?? ((input, init) => fetch(input, init));
  const patience = options.patience ?? 6;
  let pause = options.retryMilliseconds ?? 500;
  let lastId: string | undefined;
  let fruitless = 0;

  for (;;) {
    const headers: Record<string, string> = { Accept: "text/event-stream", ...options.headers };
    if (lastId !== undefined) headers["Last-Event-ID"] = lastId;
    let cause: unknown;
    try {
      const answer = await fetcher(url, { headers, signal: options.signal, cache: "no-store" });
      // 204: the stream had ended before we came back.
      if (answer.status === 204) return;
      if (answer.status >= 500) throw new TypeError(`HTTP ${answer.status}`);
      if (!answer.ok) throw await refused(answer);
      if (fruitless > 0) options.connected?.(true);
      for await (const message of messages(answer, (milliseconds) => (pause = milliseconds))) {
        if (message.id !== undefined) lastId = message.id;
        fruitless = 0;
        const event = JSON.parse(message.data) as E;
        yield event;
        if (event.type === (options.last ?? "ended")) return;
      }
    } catch (error) {
      if (error instanceof Refusal || isAbort(error)) throw error;
      cause = error;
    }
    options.connected?.(false);
    if (++fruitless > patience) {
      throw new Refusal(
        {
          title: t("The event stream was lost"),
          detail: t("the service does not answer"),
          status: 0,
        },
        { cause },
      );
    }
    await sleep(Math.min(pause * 2 ** (fruitless - 1), LONGEST_PAUSE), options.signal);
  }
}

async function* messages(
  answer: Response,
  onRetry: (milliseconds: number) => void,
): AsyncGenerator<EventSourceMessage> {
  if (answer.body === null) return;
  const arrived: EventSourceMessage[] = [];
  const parser = createParser({ onEvent: (message) => arrived.push(message), onRetry });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      parser.feed(value);
      yield* arrived.splice(0);
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

function sleep(milliseconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("The stream was given up", "AbortError"));
    };
    if (signal.aborted) {
      stop();
      return;
    }
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal.addEventListener("abort", stop, { once: true });
  });
}
