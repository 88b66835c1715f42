/**
 * How the service is asked for what more than one place asks for. Depends on nothing: the requests that leave
 * before the viewer has been fetched are named here as well.
 */
export const MODELS = "/api/models";
export const ARROW_FILE = "application/vnd.apache.arrow.file";
export const STRUCTURAL = "/api/scan/structural";

/** How long the first answer may take before we follow the job's events instead. */
export const PATIENCE_SECONDS = 10;

/** One request, as `fetch` takes it. */
export interface Asked {
  readonly path: string;
  readonly init?: RequestInit;
}

export function jobPath(id: string): string {
  return `/api/jobs/${encodeURIComponent(id)}`;
}

export function manifestPath(id: string): string {
  return `${jobPath(id)}/manifest`;
}

/** A table of a finished scan. */
export function table(id: string, name: string): Asked {
  const path = `${jobPath(id)}/result/${name.split("/").map(encodeURIComponent).join("/")}`;
  return { path, init: { headers: { Accept: ARROW_FILE } } };
}

/** How a scan is asked for; `wait` seconds are granted for it to finish before the answer comes. */
export function submission(
  endpoint: string,
  request: Readonly<Record<string, unknown>>,
  wait?: number,
): Asked {
  const init = post(request);
  if (wait !== undefined) init.headers["Prefer"] = `wait=${wait}`;
  return { path: endpoint, init };
}

/** T1: of the service's own model where none is chosen. */
export function structural(model: string | null): Asked {
  return submission(STRUCTURAL, model === null ? {} : { model }, PATIENCE_SECONDS);
}

export interface Post {
  method: "POST";
  headers: Record<string, string>;
  body: string;
}

export function post(body: unknown): Post {
  return {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
}
