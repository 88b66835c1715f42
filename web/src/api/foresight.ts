/**
 * Requests that the first picture is sure to need, begun before there is anybody to need them: the service answers
 * while the viewer is still being fetched and put up.
 */
import type { Asked } from "./requests";

type Fetch = typeof fetch;

export interface Foreseen extends Asked {
  /** What is sure to be needed after this answer. */
  readonly leads?: (answer: unknown) => readonly Foreseen[];
  /** Asked before it is sure to be there: what is refused is asked again by who needs it. */
  readonly isGuess?: boolean;
}

/** A fetch that has begun these requests already. Each answer goes to the first who asks the same. */
export function foreseeing(requests: readonly Foreseen[], fetcher: Fetch): Fetch {
  const begun = new Map<string, { answer: Promise<Response>; isGuess: boolean }>();

  function begin({ path, init, leads, isGuess = false }: Foreseen): void {
    const answer = answered(path, init, leads);
    // Who never asks is not told that it failed either.
    answer.catch(() => undefined);
    begun.set(named(path, init), { answer, isGuess });
  }

  /** An answer with all of its body, so that who reads it need not wait once more. */
  async function answered(
    path: string,
    init: RequestInit | undefined,
    leads: Foreseen["leads"],
  ): Promise<Response> {
    const answer = await fetcher(path, init);
    if (!answer.ok) return answer;
    const body = await answer.arrayBuffer();
    leads?.(JSON.parse(new TextDecoder().decode(body))).forEach(begin);
    return new Response(body, answer);
  }

  requests.forEach(begin);

  return (input, init) => {
    const name = typeof input === "string" ? named(input, init) : "";
    const early = begun.get(name);
    if (early === undefined) return fetcher(input, init);
    begun.delete(name);
    if (!early.isGuess) return early.answer;
    // Not before it is needed: by then the scan may have finished, or somebody have signed in.
    const again = () => fetcher(input, init);
    return early.answer.then((guessed) => (guessed.ok ? guessed : again()), again);
  };
}

function named(path: string, init?: RequestInit): string {
  const { method = "GET", body } = init ?? {};
  return `${method} ${path} ${typeof body === "string" ? body : ""}`;
}
