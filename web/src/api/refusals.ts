/** Refusals of the service (RFC 9457 problem details) as errors that read like sentences. */
import { counted } from "../words/words.svelte";
import type { Problem } from "./schema";

/** The service said no, or could not be reached (status 0). `message` is a sentence for a person. */
export class Refusal extends Error {
  override readonly name = "Refusal";

  constructor(
    readonly problem: Problem,
    options?: ErrorOptions,
    /** Seconds after which it is worth trying again, where the service says so. */
    readonly retryAfter: number | null = null,
  ) {
    super(sentence(problem) + patience(retryAfter), options);
  }

  get status(): number {
    return this.problem.status ?? 0;
  }
}

function patience(seconds: number | null): string {
  return seconds === null
    ? ""
    : ` ${counted(seconds, "Try again in {count} second.", "Try again in {count} seconds.")}`;
}

/** The refusal that an answer is. */
export async function refused(answer: Response): Promise<Refusal> {
  const seconds = Number(answer.headers.get("Retry-After") ?? NaN);
  return new Refusal(await problemOf(answer), undefined, Number.isFinite(seconds) ? seconds : null);
}

/** What a problem says, in one or two sentences: its title, then its detail. */
export function sentence(problem: Problem): string {
  const title = problem.title.trim().replace(/[.:]$/, "");
  const detail = problem.detail?.trim().replace(/\.$/, "") ?? "";
  return detail === "" || detail === title ? `${title}.` : `${title}: ${detail}.`;
}

/** Any thrown thing as a sentence. */
export function explain(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === "AbortError";
}

/** The problem an answer carries, or one made from its status line. */
export async function problemOf(answer: Response): Promise<Problem> {
  const fallback: Problem = {
    title: answer.statusText || `HTTP ${answer.status}`,
    status: answer.status,
  };
  if (!/\bjson\b/.test(answer.headers.get("Content-Type") ?? "")) return fallback;
  try {
    return { ...fallback, ...((await answer.json()) as Partial<Problem>) };
  } catch {
    return fallback;
  }
}
