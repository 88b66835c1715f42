/** The service's answers out of an archive, in the place of the network. */
import type { Archive } from "./archive";

/** A `fetch` that knows what was saved, and refuses the rest as the service would. */
export function storedFetch({ answers }: Pick<Archive, "answers">, refusal: string): typeof fetch {
  return (input, init) => {
    init?.signal?.throwIfAborted();
    const path = typeof input === "string" ? input : input instanceof URL ? input.href : input.url;
    const request = `${init?.method ?? "GET"} ${path}`;
    const model = typeof init?.body === "string" ? modelIn(init.body) : undefined;
    // Of the models whose anatomy was saved the first is the one that is asked for without a name.
    const answer = answers.find(
      (one) =>
        one.request === request &&
        (model === undefined || modelIn(new TextDecoder().decode(one.body)) === model),
    );
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

/** The model that a request or a job is of. */
function modelIn(json: string): unknown {
  return (JSON.parse(json) as { readonly model?: unknown }).model;
}
