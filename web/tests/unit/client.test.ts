import { expect, test } from "vitest";

import { Client } from "../../src/api/client";
import { Refusal, sentence } from "../../src/api/refusals";

type Answer = (path: string, init: RequestInit | undefined) => Response;

function client(answer: Answer): Client {
  return new Client("", ((path: string, init?: RequestInit) =>
    Promise.resolve(answer(path, init))) as typeof fetch);
}

test("a problem reads as a sentence", () => {
  expect(sentence({ title: "The request was understood, and cannot be done" })).toBe(
    "The request was understood, and cannot be done.",
  );
  expect(sentence({ title: "The prompt is too long.", detail: "9000 tokens, at most 8192." })).toBe(
    "The prompt is too long: 9000 tokens, at most 8192.",
  );
});

test("a refusal carries the problem's own words and status", async () => {
  const refusing = client(() =>
    Response.json(
      { type: "about:blank", title: "Too many requests", status: 429, detail: "10000 jobs wait" },
      { status: 429, headers: { "Content-Type": "application/problem+json" } },
    ),
  );
  const error = await refusing.models().catch((e: unknown) => e);
  expect(error).toBeInstanceOf(Refusal);
  expect((error as Refusal).message).toBe("Too many requests: 10000 jobs wait.");
  expect((error as Refusal).status).toBe(429);
});

test("an answer that is no JSON still makes a sentence", async () => {
  const broken = client(() => new Response("<h1>", { status: 502, statusText: "Bad Gateway" }));
  await expect(broken.models()).rejects.toThrow("Bad Gateway.");
});

test("a service that is not there is named as such", async () => {
  const absent = new Client("", (() => Promise.reject(new TypeError("failed"))) as typeof fetch);
  await expect(absent.models()).rejects.toThrow(/The service cannot be reached/);
});

test("the wait granted to a scan goes as a Prefer header", async () => {
  let preferred: string | null = null;
  const waiting = client((_, init) => {
    preferred = new Headers(init?.headers).get("Prefer");
    return Response.json({});
  });
  await waiting.submit("/api/scan/structural", {}, { wait: 10 });
  expect(preferred).toBe("wait=10");
});

test("an attention pattern still being measured is followed, then fetched", async () => {
  const asked: string[] = [];
  const job = { id: "j2", state: "running", links: { events: "/api/jobs/j2/events" } };
  const measuring = client((path) => {
    asked.push(path);
    if (path.endsWith("/events")) {
      return new Response('id: 1\ndata: {"type":"ended","state":"succeeded"}\n\n', {
        headers: { "Content-Type": "text/event-stream" },
      });
    }
    const first = asked.filter((p) => p.endsWith("/attention/3")).length === 1;
    return first ? Response.json(job, { status: 202 }) : new Response(new Uint8Array([1, 2]));
  });
  expect((await measuring.attention("j1", 3)).byteLength).toBe(2);
  expect(asked).toEqual([
    "/api/jobs/j1/attention/3",
    "/api/jobs/j2/events",
    "/api/jobs/j1/attention/3",
  ]);
});
