import { expect, test } from "vitest";

import { follow } from "../../src/api/events";
import { Refusal } from "../../src/api/refusals";
import type { JobEvent } from "../../src/api/schema";

const ENDED = '{"type":"ended","state":"succeeded","attempt":1,"cached":false}';

function block(id: number, data: string): string {
  return `id: ${id}\nevent: x\ndata: ${data}\n\n`;
}

function progress(done: number): string {
  return `{"type":"progress","stage":"forward","done":${done},"total":3}`;
}

/** A stream that sends its parts and then closes, or breaks. */
function stream(parts: readonly string[], breaks = false): Response {
  const body = new ReadableStream<Uint8Array>({
    start(controller) {
      for (const part of parts) controller.enqueue(new TextEncoder().encode(part));
      if (breaks) controller.error(new TypeError("network error"));
      else controller.close();
    },
  });
  return new Response(body, { headers: { "Content-Type": "text/event-stream" } });
}

/** Answers one after another, remembering what was asked. */
function answers(...all: (() => Response)[]) {
  const asked: Headers[] = [];
  const fetcher = ((_: string, init: RequestInit) => {
    init.signal?.throwIfAborted();
    asked.push(new Headers(init.headers));
    const next = all[asked.length - 1] ?? all.at(-1);
    if (next === undefined) throw new TypeError("no answer");
    return Promise.resolve(next());
  }) as typeof fetch;
  return { asked, fetcher };
}

async function read(fetcher: typeof fetch, patience = 3): Promise<JobEvent[]> {
  const { signal } = new AbortController();
  const events: JobEvent[] = [];
  const options = { signal, fetch: fetcher, retryMilliseconds: 1, patience };
  for await (const event of follow("/events", options)) events.push(event);
  return events;
}

test("a stream is read to its ended event, in whatever pieces it comes", async () => {
  const whole = `retry: 1\n\n: heartbeat\n\n${block(1, progress(1))}${block(2, ENDED)}`;
  const { fetcher } = answers(() => stream([...whole]));
  expect((await read(fetcher)).map((event) => event.type)).toEqual(["progress", "ended"]);
});

test("after a cut it goes on behind the last event it had, each event once", async () => {
  const { asked, fetcher } = answers(
    () => stream([`retry: 1\n\n${block(7, progress(1))}`]),
    () => stream([block(8, progress(2)), block(9, ENDED)]),
  );
  const events = await read(fetcher);
  expect(events.map((event) => ("done" in event ? event.done : event.type))).toEqual([
    1,
    2,
    "ended",
  ]);
  expect(asked[0]?.get("Last-Event-ID")).toBeNull();
  expect(asked[1]?.get("Last-Event-ID")).toBe("7");
});

test("a server that is restarting is asked again", async () => {
  const { asked, fetcher } = answers(
    () => new Response(null, { status: 503 }),
    () => stream([block(1, ENDED)]),
  );
  expect(await read(fetcher)).toHaveLength(1);
  expect(asked).toHaveLength(2);
});

test("a refusal is final, and says why", async () => {
  const { asked, fetcher } = answers(() =>
    Response.json(
      { title: "There is no such job", status: 404, detail: "no job 9 is known here" },
      { status: 404, headers: { "Content-Type": "application/problem+json" } },
    ),
  );
  await expect(read(fetcher)).rejects.toThrow("There is no such job: no job 9 is known here.");
  expect(asked).toHaveLength(1);
});

test("204 means that the end was read before", async () => {
  const { fetcher } = answers(() => new Response(null, { status: 204 }));
  expect(await read(fetcher)).toEqual([]);
});

test("a stream that never says anything is given up", async () => {
  const { asked, fetcher } = answers(() => stream(["retry: 1\n\n"]));
  await expect(read(fetcher, 2)).rejects.toThrow(Refusal);
  expect(asked).toHaveLength(3);
});

test("giving up a scan ends the wait for the next connection", async () => {
  const { fetcher } = answers(() => stream(["retry: 60000\n\n"]));
  const control = new AbortController();
  setTimeout(() => control.abort(), 5);
  const options = { signal: control.signal, fetch: fetcher, retryMilliseconds: 60_000 };
  await expect(follow("/events", options).next()).rejects.toThrow(/given up/);
});
