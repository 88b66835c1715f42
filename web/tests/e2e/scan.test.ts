import { readFileSync } from "node:fs";

import {
  Field,
  FixedSizeList,
  Float32,
  Schema,
  Table,
  makeData,
  makeVector,
  tableFromIPC,
  tableToIPC,
} from "apache-arrow";
import type { Browser, Locator } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";

import {
  FRAMES,
  PROMPT,
  drawn,
  launch,
  leave,
  pixel,
  reading,
  scan,
  settled,
  visit,
} from "./browser";

let browser: Browser;
beforeAll(async () => {
  browser = await launch();
});
afterAll(() => browser.close());

const PROBLEM = {
  type: "urn:neural-mri:problem:prompt-too-long",
  title: "The prompt is longer than the model's context",
  status: 422,
  detail: "9000 tokens, at most 8192",
};

test("the first thing on the screen is a true T1 picture, with nothing pressed", async () => {
  const open = await visit(browser);
  await settled(open.page);
  expect(await reading(open.page)).toEqual({
    component: "blocks.0.mlp",
    column: 0,
    value: 2654784,
  });
  expect(open.complaints).toEqual([]);
  await leave(open);
});

test("nothing is ever asked of another origin", async () => {
  const open = await visit(browser);
  await scan(open.page);
  const origins = new Set(open.requests.map((address) => new URL(address).origin));
  expect([...origins]).toEqual([open.server.origin]);
  await leave(open);
});

test("a scan sweeps the layers, then paints the tokens, then stands exact", async () => {
  const open = await visit(browser, { behaviour: { pause: 15 } });
  const { page } = open;
  await settled(page);
  await page.fill("#prompt", PROMPT);
  await page.press("#prompt", "Enter");
  await page.locator(".sweep").waitFor();
  await page
    .getByTestId("status")
    .filter({ hasText: /forward \d+ %/ })
    .waitFor();
  await page.getByTestId("chip").first().waitFor();
  expect(await page.getByTestId("chip").count()).toBe(FRAMES.texts.length);
  await page.locator(".status", { hasText: "fMRI scan complete" }).waitFor();
  const { component, column, value } = await reading(page);
  expect(column).toBe(FRAMES.texts.length - 1);
  expect(value).toBe(FRAMES.values[component]?.[column]);
  await leave(open);
});

test("a broken event stream is resumed where it broke", async () => {
  const open = await visit(browser, { behaviour: { cutAfter: 25 } });
  await scan(open.page);
  const streams = open.server.requests.filter((request) => request.endsWith("/events"));
  expect(streams).toHaveLength(2);
  await leave(open);
});

test("cancelling stops the scan and leaves the picture there was", async () => {
  const open = await visit(browser, { behaviour: { pause: 40 } });
  const { page } = open;
  await settled(page);
  await page.fill("#prompt", PROMPT);
  await page.press("#prompt", "Enter");
  await page.getByRole("button", { name: "CANCEL" }).click();
  await page.getByTestId("status").filter({ hasText: "cancelled" }).waitFor();
  expect(open.server.requests.some((request) => request.startsWith("DELETE /api/jobs/"))).toBe(
    true,
  );
  await page.getByText("No fMRI scan yet").waitFor();
  await leave(open);
});

test("a refusal is shown in its own words, and the scan before it stays", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  const before = await reading(page);
  Object.assign(open.server.behaviour, { refuse: true, problem: PROBLEM });
  await page.fill("#prompt", "too long");
  await page.press("#prompt", "Enter");
  await page
    .getByTestId("problem")
    .filter({ hasText: "longer than the model's context: 9000 tokens, at most 8192." })
    .waitFor();
  expect(await reading(page)).toEqual(before);
  await page.getByRole("button", { name: "Dismiss" }).click();
  expect(await page.getByTestId("problem").count()).toBe(0);
  expect(await reading(page)).toEqual(before);
  await leave(open);
});

test("a scan that fails on the way says why", async () => {
  const problem = { title: "The model ran out of memory", status: 500, detail: "asked for 9 GB" };
  const open = await visit(browser, { behaviour: { problem } });
  const { page } = open;
  await settled(page);
  await page.fill("#prompt", PROMPT);
  await page.press("#prompt", "Enter");
  await page
    .getByTestId("problem")
    .filter({ hasText: "ran out of memory: asked for 9 GB" })
    .waitFor();
  await leave(open);
});

test("a prompt of several lines stands on one, and keeps its lines", async () => {
  const fragment = new URLSearchParams({ prompt: "one\ntwo" }).toString();
  const open = await visit(browser, { fragment });
  const { page } = open;
  await settled(page);
  expect(await page.inputValue("#prompt")).toBe("one⏎two");
  await page.focus("#prompt");
  await page.keyboard.press("End");
  await page.keyboard.type("!");
  expect(await page.inputValue("#prompt")).toBe("one⏎two!");
  await page.waitForFunction(() => location.hash.includes("%21"));
  expect(new URLSearchParams(new URL(page.url()).hash.slice(1)).get("prompt")).toBe("one\ntwo!");
  await leave(open);
});

test("every prompt keeps the lines that are pasted into it, or come with the address", async () => {
  const fragment = new URLSearchParams({
    seq: "fMRI",
    hang: "prior",
    "prior.prompt": "p\nq",
    corrupt: "r\ns",
    focus: "blocks.3.mlp",
    panel: "stimulate",
  }).toString();
  const open = await visit(browser, { fragment });
  const { page } = open;
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  const field = (name: string) => page.getByTestId(name);
  const pasted = async (into: Locator, before: string) => {
    await into.focus();
    expect(await into.inputValue()).toBe(before);
    await page.keyboard.press("End");
    await page.evaluate(() => navigator.clipboard.writeText("one\r\ntwo"));
    await page.keyboard.press("Control+V");
    await expect.poll(() => into.inputValue()).toBe(`${before}one⏎two`);
  };
  await pasted(page.locator("#prompt"), "");
  await pasted(field("prior-prompt"), "p⏎q");
  await pasted(field("patching-corrupt"), "r⏎s");
  await page.getByRole("button", { name: "Patch…" }).click();
  await pasted(field("patch-source"), "");
  await page.getByRole("button", { name: "Add the patch" }).click();
  await page.waitForFunction(() => location.hash.includes("do="));
  const fields = new URLSearchParams(new URL(page.url()).hash.slice(1));
  expect(fields.get("prompt")).toBe("one\ntwo");
  expect(fields.get("prior.prompt")).toBe("p\nqone\ntwo");
  expect(fields.get("corrupt")).toBe("r\nsone\ntwo");
  expect(fields.get("do")).toMatch(/~one\ntwo$/);
  await leave(open);
});

test("without the service the viewer says so, and tries again when told", async () => {
  const open = await visit(browser, { behaviour: { down: true } });
  const { page } = open;
  await page.getByRole("alert").filter({ hasText: "The service cannot be reached" }).waitFor();
  open.server.behaviour.down = false;
  await page.getByRole("button", { name: "Try again" }).click();
  await settled(page);
  await leave(open);
});

test("a reload shows the same picture from the stored result", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  for (const key of [",", ",", "ArrowUp", "ArrowLeft", "]", "-", "i", "l"]) {
    await page.keyboard.press(key);
  }
  await page.waitForTimeout(400);
  await drawn(page);
  const before = [await reading(page), await pixel(page)];
  const posts = open.server.requests.filter((r) => r === "POST /api/scan/activation").length;
  await page.reload();
  await settled(page);
  await page.getByTestId("chip").first().waitFor();
  await page.locator(".status", { hasText: "fMRI scan complete" }).waitFor();
  await drawn(page);
  expect([await reading(page), await pixel(page)]).toEqual(before);
  expect(await page.inputValue("#prompt")).toBe(PROMPT);
  expect(open.server.requests.filter((r) => r === "POST /api/scan/activation")).toHaveLength(posts);
  await leave(open);
});

test("while a scan runs that the address names, the address follows what is done", async () => {
  const open = await visit(browser, { behaviour: { pause: 100 } });
  const { page, server } = open;
  await settled(page);
  await page.fill("#prompt", PROMPT);
  await page.press("#prompt", "Enter");
  await page.waitForFunction(() => location.hash.includes("job="));
  await page.reload();
  await page.getByRole("button", { name: "CANCEL" }).waitFor();
  await page.getByTestId("axial").focus();
  await page.keyboard.press("l");
  await page.waitForFunction(() => location.hash.includes("layout="));
  expect(server.requests.filter((r) => r === "GET /api/login")).toHaveLength(2);
  // It counts as any other that ends here.
  server.behaviour.pause = 1;
  await page.locator(".status", { hasText: "fMRI scan complete" }).waitFor();
  expect((await reading(page)).column).toBe(FRAMES.texts.length - 1);
  await leave(open);
});

test("an address with a scan that is gone says so, and still shows T1", async () => {
  const open = await visit(browser, {
    fragment: "seq=fMRI&job=01930000-0000-7000-8000-0000000000ff",
  });
  const { page } = open;
  await page
    .getByTestId("problem")
    .filter({ hasText: "The scan in this address is gone" })
    .waitFor();
  await page.keyboard.press("1");
  await settled(page);
  await leave(open);
});

test("a scan that was computed before is shown without an event stream", async () => {
  const open = await visit(browser, { behaviour: { cached: true } });
  await scan(open.page);
  expect(open.server.requests.some((request) => request.endsWith("/events"))).toBe(false);
  await leave(open);
});

test("a head's attention is measured when asked for", async () => {
  const open = await visit(browser, { fragment: "focus=blocks.14.attn.head_4" });
  const { page } = open;
  await scan(page);
  expect(open.server.requests.some((request) => request.includes("/attention/"))).toBe(false);
  await page.getByRole("button", { name: "Measure the pattern" }).click();
  const image = page.getByTestId("attention");
  await image.waitFor();
  expect(await image.evaluate((canvas) => (canvas as HTMLCanvasElement).width)).toBe(
    FRAMES.texts.length,
  );
  await leave(open);
});

/** The stored activations as a scan has them that was asked for some places in the prompt alone. */
function activationsAt(positions: readonly number[]): Buffer {
  const path = new URL("../fixtures/data/activations.arrow", import.meta.url);
  const table = tableFromIPC(readFileSync(path));
  const rows = [...(table.getChild("value") ?? [])] as Iterable<number>[];
  const values = rows.flatMap((row) => positions.map((position) => [...row][position] ?? NaN));
  const type = new FixedSizeList(positions.length, new Field("item", new Float32()));
  const child = makeData({ type: new Float32(), data: Float32Array.from(values) });
  const data = makeData({ type, length: rows.length, child });
  const said = JSON.parse(table.schema.metadata.get("neural_mri") ?? "{}") as object;
  const metadata = new Map([["neural_mri", JSON.stringify({ ...said, positions })]]);
  const fields = table.schema.fields.map((own) =>
    own.name === "value" ? new Field("value", type) : own,
  );
  const columns = Object.fromEntries(
    fields.map(({ name }) => [
      name,
      name === "value" ? makeVector(data) : (table.getChild(name) ?? []),
    ]),
  );
  const schema = new Schema(fields, metadata);
  return Buffer.from(tableToIPC(new Table(schema, columns as never), "file"));
}

test("attention is read by the tokens' places in the prompt, also where a scan has only some of them", async () => {
  const open = await visit(browser, {
    behaviour: { cached: true },
    fragment: "focus=blocks.14.attn.head_4",
  });
  const { page } = open;
  await page.route("**/result/activations", (route) =>
    route.fulfill({
      contentType: "application/vnd.apache.arrow.file",
      body: activationsAt([3, 4]),
    }),
  );
  await scan(page);
  expect(await page.getByTestId("chip").allInnerTexts()).toEqual(["·Tower", "·is"]);
  await page.getByRole("button", { name: "Measure the pattern" }).click();
  const image = page.getByTestId("attention");
  await image.waitFor();
  const looked = page.getByRole("region", { name: "Attention pattern" }).locator("li > span");
  // " is" looks at the first token, at " Tower" and at the second.
  expect(await looked.allInnerTexts()).toEqual(["0", "·Tower", "1"]);
  const click = (row: number) => image.click({ position: { x: 50, y: (row + 0.5) * 11.2 } });
  await click(3);
  expect((await reading(page)).column).toBe(0);
  await click(4);
  expect((await reading(page)).column).toBe(1);
  await click(0);
  expect((await reading(page)).column).toBe(1);
  await leave(open);
});
