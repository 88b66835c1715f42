/**
 * Requests that the first picture is sure to need, begun before there is anybody to need them: the service answers
 * while the viewer is still being put up.
 */
import type { Asked } from "./client";

type Fetch = typeof fetch;

/** A fetch that has begun these requests already. Each answer goes to the first who asks the same. */
export function foreseeing(requests: readonly Asked[], fetcher: Fetch): Fetch {
  const begun = new Map(requests.map(({ path, init }) => [named(path, init), fetcher(path, init)]));
  // Who never asks is not told that it failed either.
  for (const answer of begun.values()) answer.catch(() => undefined);
  return (input, init) => {
    const name = typeof input === "string" ? named(input, init) : "";
    const answer = begun.get(name);
    begun.delete(name);
    return answer ?? fetcher(input, init);
  };
}

function named(path: string, init?: RequestInit): string {
  const { method = "GET", body } = init ?? {};
  return `${method} ${path} ${typeof body === "string" ? body : ""}`;
}
