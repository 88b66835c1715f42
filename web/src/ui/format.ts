/** Numbers, times and tokens as a person reads them. Nothing here is read back by the viewer. */

import { t } from "../words/words.svelte";

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** A measured value: four significant digits, and all of those before the point; thousands apart. */
export function value(x: number): string {
  if (Number.isNaN(x)) return t("not measured");
  if (!Number.isFinite(x)) return x > 0 ? "+∞" : "−∞";
  if (Number.isInteger(x) && Math.abs(x) < 1e15) return grouped.format(x);
  const size = Math.abs(x);
  if (size >= 1e7 || size < 1e-3) return x.toExponential(3);
  if (size >= 1e4) return grouped.format(x);
  return x.toPrecision(4);
}

/** A value where there is room for few characters: 1.2k, 28M. */
export function short(x: number): string {
  if (!Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  for (const [unit, symbol] of [
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ] as const) {
    // What is rounded up to a unit is written in it.
    if (size >= 0.9995 * unit) return `${(x / unit).toPrecision(3)}${symbol}`;
  }
  if (size >= 0.01 || size === 0) return x.toPrecision(3);
  return x.toExponential(1);
}

export function bytes(count: number): string {
  return count >= 1e9 ? `${(count / 1e9).toFixed(2)} GB` : `${(count / 1e6).toFixed(0)} MB`;
}

export function percent(share: number): string {
  const hundred = share * 100;
  return `${hundred >= 10 ? hundred.toFixed(1) : hundred.toFixed(2)} %`;
}

export function seconds(duration: number): string {
  return duration < 1 ? `${(duration * 1000).toFixed(0)} ms` : `${duration.toFixed(2)} s`;
}

/** Date and time of day where the reader is, to the second. */
export function moment(date: Date): string {
  const two = (n: number) => String(n).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

export function clock(elapsed: number): string {
  const whole = Math.floor(elapsed);
  return `${String(Math.floor(whole / 60)).padStart(2, "0")}:${String(whole % 60).padStart(2, "0")}`;
}

/** White space, controls, joiners and marks of direction: all that a token may have and nobody sees. */
const UNSEEN = /[\p{C}\p{Z}]/gu;
const SIGNS: Readonly<Record<string, string>> = { " ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥" };

/** A token with all of it to be seen, by a sign or a code. An empty one is the rest of a character before it. */
export function token(text: string): string {
  if (text === "") return "◌";
  const code = (one: string) => one.codePointAt(0)?.toString(16).padStart(4, "0");
  return text.replaceAll(UNSEEN, (one) => SIGNS[one] ?? `\\u${code(one)}`);
}

/** What of a text fits into so many characters; that more was there is seen. */
export function shortened(text: string, room: number): string {
  return text.length > room ? `${text.slice(0, room - 1)}…` : text;
}

/** A token as it is spoken: white space is no word, and what has no sound is spelled. */
export function spoken(text: string): string {
  const bare = text.trim();
  if (bare === "") return t("white space");
  return bare.replaceAll(UNSEEN, "") === "" ? token(bare) : bare;
}

/** The first characters of a digest or id. */
export function brief(id: string, length = 8): string {
  return id.length > length ? id.slice(0, length) : id;
}

/** Window and level in the value's own unit; a log window's width is a factor. */
export function windowLevel(
  window: { readonly level: number; readonly width: number },
  scale: "linear" | "log" | "size",
): string {
  return scale === "log"
    ? `L ${short(10 ** window.level)}  W ×${short(10 ** window.width)}`
    : `L ${short(window.level)}  W ${short(window.width)}`;
}
