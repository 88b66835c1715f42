/**
 * The page's words in the reader's language. A message is its English text, so English costs nothing
 * and stands where it is read; another language is a table of the same messages, fetched when it is
 * spoken. A message that the Korean table lacks does not compile.
 *
 * There is one language for the whole page, as there is one `<html lang>`: hence a module of its own
 * rather than a part of the room.
 */
import type { Korean } from "./ko";

/** Names between braces in a message: what it has to be told. */
type Names<M extends string> = M extends `${string}{${infer Name}}${infer Rest}`
  ? Name | Names<Rest>
  : never;
/** Any message, and one that needs to be told nothing: what other modules keep to be said later. */
type AnyMessage = keyof Korean;
export type Message = { [M in AnyMessage]: [Names<M>] extends [never] ? M : never }[AnyMessage];
type Facts<M extends string> = [Names<M>] extends [never]
  ? []
  : [facts: Readonly<Record<Names<M>, string | number>>];

export type Language = "en" | "ko";
/** Each language by its own name. */
export const LANGUAGES: Readonly<Record<Language, string>> = { en: "English", ko: "한국어" };

type Table = Readonly<Record<AnyMessage, string>>;
const TABLES: Readonly<Record<Exclude<Language, "en">, () => Promise<Table>>> = {
  ko: () => import("./ko").then(({ korean }) => korean),
};

/** A saved page has no table to fetch: it brings the one it was saved with, or speaks English alone. */
let brought: Table | null | undefined;

export function bring(table: Readonly<Record<string, string>> | null): void {
  brought = table as Table | null;
}

/** The table that is spoken now, to be taken along; null for English. */
export function spokenTable(): Readonly<Record<string, string>> | null {
  return words.table;
}

export function canSpeak(language: Language): boolean {
  return language === "en" || brought !== null;
}

class Words {
  language = $state<Language>("en");
  table = $state.raw<Table | null>(null);
}
const words = new Words();

/** A message in the language spoken now. What it has in braces is replaced by the fact of that name. */
export function t<M extends AnyMessage>(message: M, ...[facts]: Facts<M>): string {
  return filled(words.table?.[message] ?? message, facts);
}

/** `one` of something or `many`; `{count}` is the number in either. */
export function counted<M extends AnyMessage>(
  count: number,
  one: M,
  many: M,
  ...[facts]: Exclude<Names<M>, "count"> extends never
    ? []
    : [facts: Readonly<Record<Exclude<Names<M>, "count">, string | number>>]
): string {
  const message = new Intl.PluralRules(words.language).select(count) === "one" ? one : many;
  return filled(words.table?.[message] ?? message, { ...facts, count });
}

/** A text that may or may not be ours to translate, as what the service says of a scan. */
export function known(text: string): string {
  return (words.table as Readonly<Record<string, string>> | null)?.[text] ?? text;
}

export function language(): Language {
  return words.language;
}

/** Speaks a language from now on, and the next time the viewer is opened. */
export async function speak(chosen: Language): Promise<void> {
  const table = chosen === "en" ? null : (brought ?? (await TABLES[chosen]()));
  words.table = table;
  words.language = chosen;
  document.documentElement.lang = chosen;
}

const REMEMBERED = "neural-mri.language";

export function remember(chosen: Language): void {
  // A browser may forbid storage; the language is then spoken for this visit alone.
  try {
    localStorage.setItem(REMEMBERED, chosen);
  } catch {
    return;
  }
}

/** What the address asks for (`?lang=ko`), else what was chosen before, else what the browser prefers. */
export function preferred(): Language {
  // Read once, so it need not be reactive.
  // eslint-disable-next-line svelte/prefer-svelte-reactivity
  const asked = new URLSearchParams(location.search).get("lang");
  let chosen: string | null = null;
  try {
    chosen = localStorage.getItem(REMEMBERED);
  } catch {
    // As in `remember`.
  }
  const wished = [asked, chosen, ...navigator.languages].map((tag) => tag?.slice(0, 2));
  return wished.find(isLanguage) ?? "en";
}

function isLanguage(tag: string | undefined): tag is Language {
  return tag !== undefined && Object.hasOwn(LANGUAGES, tag);
}

function filled(
  text: string,
  facts: Readonly<Record<string, string | number>> | undefined,
): string {
  if (facts === undefined) return text;
  return text.replaceAll(/\{(\w+)\}/g, (braces, name: string) => String(facts[name] ?? braces));
}
