/** The service's answers out of an archive, in the place of the network. */
import type { Archive } from "./archive";

/** A `fetch` that knows what was saved, and refuses the rest as the service would. */
export function storedFetch({ answers }: Pick<Archive, "answers">, refusal: string): typeof fetch {
  const saved = new Map(answers.map((answer) => [answer.request, answer]));
  return (input, init) => {
    init?.signal?.throwIfAborted();
    const path = typeof input === "string" ? input : input instanceof URL ? input.href : input.url;
    const answer = saved.get(`${init?.method ?? "GET"} ${path}`);
    if (answer !== undefined) {
      return Promise.resolve(
        new Response(answer.body, { headers: { "Content-Type": answer.type } }),
      );
    }
    const problem = { title: refusal, status: 404 };
    return Promise.resolve(
      new Response(JSON.stringify(problem), {
        status: 404,
        headers: { "Content-Type": "application/problem+json" },
      }),
    );
  };
}
