/** Whether the open session is followed, and whether that is lost. */
import { beforeEach, expect, test } from "vitest";

import { Refusal } from "../../src/api/refusals";
import { Following } from "../../src/sessions/following.svelte";
import type { Origin } from "../../src/sessions/origin";
import type { Session } from "../../src/sessions/session.svelte";
import type { SessionEvent, SessionsService, Where } from "../../src/sessions/wire";

type Stream = (signal: AbortSignal, connected: (yes: boolean) => void) => Promise<void>;

/** Follows sessions whose streams tell nothing, and end as a test wants. */
function following(stream: Stream): Following {
  async function* events(
    _: Where,
    signal: AbortSignal,
    connected: (yes: boolean) => void,
  ): AsyncGenerator<SessionEvent> {
    await stream(signal, connected);
    yield* [];
  }
  return new Following({ events } as unknown as SessionsService, {
    saved: () => Promise.resolve(),
    closed: () => undefined,
    failed: () => undefined,
  });
}

function session(origin: Origin): Session {
  return { origin } as Session;
}

const OWN = session({ kind: "own", id: "one", revision: null });
const UNFOLLOWED = [
  session({ kind: "own", id: "one", revision: "older" }),
  session({ kind: "file", file: "one.nmri", bytes: new ArrayBuffer() }),
  session({ kind: "new" }),
];

let lost: Following;
beforeEach(async () => {
  lost = following(() => Promise.reject(new Refusal({ title: "Not known", status: 401 })));
  await lost.follow(OWN);
  expect(lost.connected).toBe(false);
});

test("nothing is lost of what is not followed any more", async () => {
  lost.stop();
  expect(lost.connected).toBe(true);
  for (const session of UNFOLLOWED) {
    await lost.follow(OWN);
    expect(lost.connected).toBe(false);
    await lost.follow(session);
    expect(lost.connected).toBe(true);
  }
});

test("a stream that is given up has no more say in whether one stands", async () => {
  const told: ((yes: boolean) => void)[] = [];
  const two = following((signal, connected) => {
    told.push(connected);
    return new Promise((_, reject) => {
      const stop = () => reject(new DOMException("Given up", "AbortError"));
      signal.addEventListener("abort", stop);
    });
  });
  const first = two.follow(OWN);
  const second = two.follow(OWN);
  await first;
  told[0]?.(false);
  expect(two.connected).toBe(true);
  told[1]?.(false);
  expect(two.connected).toBe(false);
  two.stop();
  await second;
  expect(two.connected).toBe(true);
});
