import { createHash, randomBytes } from "node:crypto";

import { expect, test } from "vitest";

import { dense, densely } from "../../scripts/dense.mjs";
import { UnreadableArchive, pack, stateHash, unpack, type Archive } from "../../src/export/archive";
import { csvOf } from "../../src/export/csv";
import { fileName } from "../../src/export/download";
import { colourBar, sectionFigure, type SectionFigure } from "../../src/export/figure";
import { INKS, onGround } from "../../src/export/ink";
import { gather } from "../../src/export/page";
import { sha256 } from "../../src/export/sha256";
import { storedFetch } from "../../src/export/stored";
import { document, escaped } from "../../src/export/svg";
import { wrapped } from "../../src/export/wrap";
import { lut } from "../../src/colour/lut";
import { field } from "../../src/model/field";
import { Volume } from "../../src/model/volume";

test("the digest is SHA-256's, at every length about a block", () => {
  for (let length = 0; length < 200; length++) {
    const bytes = randomBytes(length);
    expect(sha256(bytes), String(length)).toBe(createHash("sha256").update(bytes).digest("hex"));
  }
});

test("bytes come back out of a page's text, which HTML reads as it stands", () => {
  for (let length = 0; length < 500; length++) {
    const bytes = new Uint8Array(randomBytes(length));
    const text = densely(bytes);
    expect(dense(text)).toEqual(bytes);
    expect(text).not.toMatch(/[\0\r<]/);
    expect(Buffer.byteLength(text)).toBe(text.length);
  }
});

const ARCHIVE: Archive = {
  fragment: "seq=fMRI&prompt=%ED%95%9C%EA%B5%AD%EC%96%B4",
  savedAt: "2026-11-23T14:32:05.120Z",
  recording: [{ milliseconds: 0, fragment: "seq=T1" }],
  words: { Export: "내보내기" },
  answers: [
    { request: "GET /api/models", type: "application/json", body: new TextEncoder().encode("[]") },
    {
      request: "GET /api/jobs/1/result/tokens",
      type: "application/vnd.apache.arrow.file",
      body: new Uint8Array(randomBytes(100_000)),
    },
  ],
};

test("a viewing comes back as it was packed, byte for byte", async () => {
  expect(await unpack(await pack(ARCHIVE))).toEqual(ARCHIVE);
});

test("what was cut short is refused in words", async () => {
  const text = await pack(ARCHIVE);
  await expect(unpack(text.slice(0, 2000))).rejects.toThrow(UnreadableArchive);
  await expect(unpack("")).rejects.toThrow(/not a page that was saved here/);
});

test("the state's hash knows the numbers and the view, and not who saved it when", () => {
  const hash = stateHash(ARCHIVE);
  expect(stateHash({ ...ARCHIVE, answers: ARCHIVE.answers.toReversed() })).toBe(hash);
  expect(stateHash({ ...ARCHIVE, fragment: "seq=T2" })).not.toBe(hash);
  const changed = ARCHIVE.answers.map((answer) => ({ ...answer, body: answer.body.slice() }));
  const table = changed[1];
  if (table !== undefined) table.body[77] = (table.body[77] ?? 0) ^ 1;
  expect(stateHash({ ...ARCHIVE, answers: changed })).not.toBe(hash);
});

test("a saved page answers what it holds, and refuses the rest as the service would", async () => {
  const stored = storedFetch(ARCHIVE, "This page was saved without it");
  const answer = await stored("/api/models");
  expect([answer.status, await answer.text()]).toEqual([200, "[]"]);
  const refused = await stored("/api/scan/activation", { method: "POST" });
  expect(refused.status).toBe(404);
  expect(await refused.json()).toMatchObject({ title: "This page was saved without it" });
});

test("no model's anatomy is answered for another's", async () => {
  const ask = (path: string) => {
    const [, job = ""] = /^\/api\/jobs\/([^/]+)/.exec(path) ?? [];
    const said = path.endsWith("/manifest")
      ? { tables: [] }
      : { id: job, model: `model of ${job}` };
    const body = new TextEncoder().encode(JSON.stringify(said));
    return Promise.resolve({ type: "application/json", body });
  };
  const answers = await gather(ask, ["1", "2"], ["3", "2"]);
  const requests = answers.map(({ request }) => request);
  expect(requests.filter((request) => request === "GET /api/jobs/2")).toHaveLength(1);
  const stored = storedFetch({ answers }, "This page was saved without it");
  const structural = async (model?: string) => {
    const body = JSON.stringify({ model });
    const answer = await stored("/api/scan/structural", { method: "POST", body });
    return answer.ok ? ((await answer.json()) as { id: string }).id : answer.status;
  };
  expect(await structural()).toBe("1");
  expect(await structural("model of 1")).toBe("1");
  expect(await structural("model of 2")).toBe("2");
  expect(await structural("model of 3")).toBe(404);
});

test("rows keep every digit, and leave empty what was not measured", () => {
  const values = Float32Array.of(Math.PI, NaN, -0.1, 1e-30);
  const quantity = field({
    id: "activity",
    title: "Activity",
    unit: "L2 norm",
    method: "",
    volume: new Volume(["blocks.3.attn.head_7", "embed"], 2, values),
    map: "inferno",
  });
  const tokens = [" a,b", '"'].map((text, position) => ({ position, id: 0, text, sink: false }));
  const rows = csvOf(quantity, tokens).trimEnd().split("\r\n");
  expect(rows[0]).toBe("component,kind,layer,head,position,token,value,unit");
  expect(rows[1]).toBe(`blocks.3.attn.head_7,head,3,7,0," a,b",${Math.fround(Math.PI)},L2 norm`);
  expect(rows[2]).toBe('blocks.3.attn.head_7,head,3,7,1,"""",,L2 norm');
  expect(Math.fround(Number(rows[4]?.split(",").at(-2)))).toBe(values[3]);
});

test("on paper nothing stays white, and either direction darkens evenly from it", () => {
  const paper = onGround(lut("green-violet"), true, "paper");
  const light = (index: number) =>
    0.2126 * (paper[index * 3] ?? 0) +
    0.7152 * (paper[index * 3 + 1] ?? 0) +
    0.0722 * (paper[index * 3 + 2] ?? 0);
  expect(light(127)).toBeGreaterThan(240);
  for (let index = 128; index < 255; index++)
    expect(light(index + 1)).toBeLessThanOrEqual(light(index));
  for (let index = 127; index > 0; index--)
    expect(light(index - 1)).toBeLessThanOrEqual(light(index));
  expect(onGround(lut("inferno"), false, "paper")).toBe(lut("inferno"));
  expect(INKS.paper.ground).toBe("#ffffff");
});

test("the end of a scale says when values lie beyond it", () => {
  const map = lut("green-violet");
  const bar = (...values: readonly number[]) => {
    const window = { level: 0, width: 2 };
    const distribution = Float64Array.from(values);
    const colours = { lut: map, window, scale: "linear", signed: true, unit: "nats" } as const;
    return colourBar({ ...colours, distribution }, map, 0, 0, INKS.paper);
  };
  expect(bar(-16, 0, 0.5)).toContain(">≤ -1.00<");
  expect(bar(-16, 0, 0.5)).toContain(">1.00<");
  expect(bar(0, 3)).toContain(">≥ 1.00<");
  expect(bar()).not.toMatch(/[≤≥]/);
});

test("a figure's words are escaped, whatever the prompt was", () => {
  const svg = document(10, 10, `</title><script>"&`, "");
  expect(svg).toContain("<title>&lt;/title&gt;&lt;script&gt;&quot;&amp;</title>");
});

/** A map of one layer against these tokens, under these lines. */
function drawn(names: readonly string[], lines: readonly string[]): string {
  const distribution = new Float64Array(0);
  const figure: SectionFigure = {
    caption: { title: "fMRI", lines, notes: ["L2 norm"] },
    panels: [
      {
        title: "",
        section: {
          width: names.length,
          height: 1,
          values: Float64Array.from(names, () => 1),
          across: "tokens",
          names,
          top: 0,
          unit: "",
          shared: true,
          marks: null,
          word: null,
        },
        colours: {
          lut: lut("inferno"),
          window: { level: 0, width: 2 },
          scale: "linear",
          signed: false,
          unit: "",
          distribution,
        },
      },
    ],
    across: "token",
    depth: "layer",
    numbers: [],
    promptShown: true,
  };
  return sectionFigure(figure, "paper");
}

test("what XML cannot say is left out of a figure, and nothing else is", () => {
  expect(escaped("a\u0000\u001b\f\ud800b\uffff\ufffe")).toBe("ab");
  expect(escaped("\t\n 한국어 🗼 \u{10ffff}")).toBe("\t\n 한국어 🗼 \u{10ffff}");
  const svg = drawn(["\u001b[1m", "<&", "thirteen char🗼"], ["\u001b[1m", "\f"]);
  expect(svg).toMatch(/^[\t\n\r\x20-\ud7ff\ue000-\ufffd]*$/u);
  expect(svg).toContain(">&lt;&amp;<");
});

test("a long prompt stands on a few lines, and says where it was cut", () => {
  const shown = (prompt: string) =>
    [...drawn(["a"], [prompt]).matchAll(/<text[^>]*font-size="12.5"[^>]*>([^<]*)</g)].map(
      ([, line]) => line ?? "",
    );
  const words = Array.from({ length: 12 }, (_, at) => `word${at}`).join(" ");
  expect(shown(words).length).toBeGreaterThan(1);
  expect(shown(words).join(" ")).toBe(words);
  const long = shown(`${words} ${words} ${words} ${words}`);
  expect(long).toHaveLength(3);
  expect(long.at(-1)).toMatch(/…$/);
  // Without spaces, and in full width.
  expect(wrapped("에펠탑은 도시에", 5)).toEqual(["에펠", "탑은", "도시", "에"]);
  expect(wrapped("abcdefg hi", 4)).toEqual(["abcd", "efg", "hi"]);
});

test("a file's name says what is in it, in any script", () => {
  expect(fileName(["fMRI", "L3H7 · 토큰/4"], "svg")).toBe("neural-mri-fMRI-L3H7-토큰-4.svg");
});
