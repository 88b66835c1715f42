/**
 * What the tab keeps until it is closed, through reloads. A browser may forbid it: what is not saved is then
 * lost with the page.
 */
const OURS = "neural-mri.";

export function kept<T>(name: string): T | null {
  try {
    return JSON.parse(sessionStorage.getItem(OURS + name) ?? "null") as T | null;
  } catch {
    return null;
  }
}

/** Keeps something, or with `null` nothing any more. */
export function keep(name: string, value: unknown): void {
  try {
    if (value === null) sessionStorage.removeItem(OURS + name);
    else sessionStorage.setItem(OURS + name, JSON.stringify(value));
  } catch {
    // As it may.
  }
}

export function keepNothing(): void {
  try {
    for (const name of Object.keys(sessionStorage)) {
      if (name.startsWith(OURS)) sessionStorage.removeItem(name);
    }
  } catch {
    // Nothing was kept then.
  }
}
