import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";

import { afterEach, expect, test, vi } from "vitest";

import { korean } from "../../src/words/ko";
import { counted, known, language, preferred, speak, t } from "../../src/words/words.svelte";

const SOURCES = new URL("../../src/", import.meta.url).pathname;

vi.stubGlobal("document", { documentElement: { lang: "en" } });
afterEach(() => speak("en"));

/** Every source but the tables themselves. */
const sources = readdirSync(SOURCES, { recursive: true, encoding: "utf8" })
  .filter((name) => /\.(ts|svelte)$/.test(name) && !name.startsWith("words/ko"))
  .map((name) => readFileSync(join(SOURCES, name), "utf8"))
  .join("\n");

function names(message: string): string[] {
  return [...message.matchAll(/\{(\w+)\}/g)].map(([, name]) => name ?? "").sort();
}

test("a translation is told the same facts as its English message", () => {
  for (const [english, text] of Object.entries(korean)) {
    expect(new Set(names(text)), english).toEqual(new Set(names(english)));
    expect(text.trim(), english).not.toBe("");
  }
});

/** Words of the service, which stand in no source of ours. */
const SERVICE = ["resident", "available", "queued", "claimed", "running", "storing", "forward"];

test("no message is kept that nothing says any more", () => {
  const unsaid = Object.keys(korean).filter(
    (message) => !SERVICE.includes(message) && !said(message),
  );
  expect(unsaid).toEqual([]);
});

function said(message: string): boolean {
  return (
    sources.includes(JSON.stringify(message)) ||
    sources.includes(`"${message}"`) ||
    sources.includes(`'${message}'`) ||
    sources.includes(`\`${message}\``)
  );
}

test("English costs no table, Korean is spoken when it is asked for", async () => {
  expect(t("Take the {id} scan", { id: "T2" })).toBe("Take the T2 scan");
  await speak("ko");
  expect(language()).toBe("ko");
  expect(t("Take the {id} scan", { id: "T2" })).toBe("T2 스캔하기");
  expect(document.documentElement.lang).toBe("ko");
});

test("one is not many in English; Korean counts alike", async () => {
  const tokens = (count: number) => counted(count, "{count} token", "{count} tokens");
  expect([0, 1, 2].map(tokens)).toEqual(["0 tokens", "1 token", "2 tokens"]);
  await speak("ko");
  expect([1, 2].map(tokens)).toEqual(["토큰 1개", "토큰 2개"]);
});

test("what the service says is translated where it is known, and left alone where not", async () => {
  await speak("ko");
  expect(known("resident")).toBe("로드됨");
  expect(known("L2 norm of z W_O")).toBe("L2 norm of z W_O");
});

test("the address decides the language, then the last choice, then the browser", () => {
  const browser = { search: "", stored: null as string | null, languages: ["fr-FR", "ko-KR"] };
  vi.stubGlobal("location", {
    get search() {
      return browser.search;
    },
  });
  vi.stubGlobal("localStorage", { getItem: () => browser.stored });
  vi.stubGlobal("navigator", { languages: browser.languages });
  expect(preferred()).toBe("ko");
  browser.stored = "en";
  expect(preferred()).toBe("en");
  browser.search = "?lang=ko";
  expect(preferred()).toBe("ko");
  browser.search = "?lang=tlh";
  expect(preferred()).toBe("en");
});
