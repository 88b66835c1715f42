/**
 * A view as a session keeps it: the address's fields by name, scans by their number among the session's. A link
 * that takes prompts out leaves what is plain words and numbers, so the fields stand apart; and a result's hash
 * is another there, so none stands in a view.
 */
import { decode, encode, type Place } from "../state/url";
import type { View } from "./wire";

const JOBS = new Set(["job", "prior.job"]);
/** What is the session's own matter. */
const ELSEWHERE = new Set(["session", "revision", "shared", "prior.session"]);
const NUMBERS = /^-?[\d.]+(e[-+]?\d+)?(,-?[\d.]+(e[-+]?\d+)?)*$/;

/** `indexOf` says where a scan stands in the session, -1 for one that it does not hold. */
export function viewOf(fragment: string, indexOf: (job: string) => number): View {
  const fields = new URLSearchParams(fragment);
  const view: Record<string, unknown> = {};
  for (const name of new Set(fields.keys())) {
    if (ELSEWHERE.has(name)) continue;
    const all = fields.getAll(name);
    if (JOBS.has(name)) view[name] = all.map(indexOf).filter((index) => index >= 0);
    else view[name] = all.length === 1 ? plain(all[0] ?? "") : all;
  }
  return view;
}

/** The fragment that a view is of. What is not the viewer's own, or was taken out, is the default. */
export function fragmentOf(view: View, jobOf: (index: number) => string | undefined): string {
  const fields = new URLSearchParams();
  for (const [name, value] of Object.entries(view)) {
    if (ELSEWHERE.has(name)) continue;
    const all: readonly unknown[] = Array.isArray(value) ? value : [value];
    if (JOBS.has(name)) {
      for (const index of all) {
        const job = typeof index === "number" ? jobOf(index) : undefined;
        if (job !== undefined) fields.append(name, job);
      }
    } else if (all.every((part) => typeof part === "number")) fields.set(name, all.join());
    else for (const part of all) if (typeof part === "string") fields.append(name, part);
  }
  return encode(decode(fields.toString()));
}

/** Another address with its scans called otherwise. */
export function renamed(fragment: string, nameOf: (job: string) => string): string {
  const place = decode(fragment);
  const jobs = place.jobs.map(nameOf);
  const prior = { ...place.prior, jobs: place.prior.jobs.map(nameOf) };
  return encode({ ...place, jobs, prior });
}

export function jobsIn(fragment: string): readonly string[] {
  const { jobs, prior } = decode(fragment);
  return [...jobs, ...prior.jobs];
}

/** Whether an address asks for a session and for nothing in particular in it. */
export function isBare(place: Place, start: Place): boolean {
  const { session, revision, shared } = place;
  return encode(place) === encode({ ...start, session, revision, shared });
}

function plain(text: string): string | readonly number[] {
  return NUMBERS.test(text) && text.split(",").every((part) => String(Number(part)) === part)
    ? text.split(",").map(Number)
    : text;
}
