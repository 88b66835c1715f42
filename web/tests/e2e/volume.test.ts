/** The volume, its hangings and what is done beside reading: regions, key images, waiting, signing in. */
import { readFileSync } from "node:fs";

import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";

import { topologyOf } from "../../src/model/topology";
import { SMOLLM2 } from "../unit/architectures";
import {
  FRAMES,
  PROMPT,
  drawn,
  launch,
  leave,
  reading,
  scan,
  settled,
  violations,
  visit,
} from "./browser";

let browser: Browser;
beforeAll(async () => {
  browser = await launch();
});
afterAll(() => browser.close());

const topology = topologyOf(SMOLLM2);
const LAST = FRAMES.texts.length - 1;

async function number(page: Page, id: string): Promise<number> {
  return Number(await page.getByTestId(id).getAttribute("data-value"));
}

/** A place in an element, as shares of its size. */
async function at(page: Page, id: string, x: number, y: number): Promise<[number, number]> {
  const box = await page.getByTestId(id).boundingBox();
  if (box === null) throw new Error(`${id} is not on the screen`);
  return [box.x + x * box.width, box.y + y * box.height];
}

test("three planes are cut where the one crosshair is, and each says the stored float", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  // In the sagittal image: layer 12, the third token.
  await page.mouse.click(...(await at(page, "sagittal-image", 2.5 / (LAST + 1), 12.5 / 30)));
  await drawn(page);
  let seen = await reading(page);
  expect(seen.component).toMatch(/^blocks\.12\./);
  expect(seen.column).toBe(2);
  expect(await number(page, "sagittal-value")).toBe(FRAMES.values[seen.component]?.[2]);
  // In the coronal one: the layer's second row is head 1.
  await page.mouse.click(...(await at(page, "coronal-image", 5.5 / (LAST + 1), 1.5 / 10)));
  await page.mouse.move(5, 5);
  await drawn(page);
  seen = await reading(page);
  expect(seen).toMatchObject({ component: "blocks.12.attn.head_1", column: 5 });
  expect(seen.value).toBe(FRAMES.values[seen.component]?.[5]);
  expect(await number(page, "coronal-value")).toBe(seen.value);
  expect(await violations(page)).toEqual([]);
  expect(open.complaints).toEqual([]);
  await leave(open);
});

/** A box drawn over the axial plane, its button still held. */
async function boxed(page: Page): Promise<void> {
  await page.keyboard.press("d");
  await page.mouse.move(...(await at(page, "axial", 0.05, 0.4)));
  await page.mouse.down();
  await page.mouse.move(...(await at(page, "axial", 0.5, 0.5)), { steps: 4 });
}

test("a box that the system takes away while it is drawn is not measured", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await boxed(page);
  const box = page.getByTestId("axial").locator("rect.region");
  expect(await box.count()).toBe(1);
  await page.getByTestId("axial").dispatchEvent("pointercancel");
  expect(await box.count()).toBe(0);
  await page.mouse.up();
  await drawn(page);
  expect(await page.getByTestId("statistics").count()).toBe(0);
  await leave(open);
});

test("a region's numbers are those of the floats in it", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await boxed(page);
  await page.mouse.up();
  await page.getByTestId("statistics").waitFor();
  const xs = await page.getByTestId("region").boundingBox();
  expect(xs?.width).toBeGreaterThan(20);
  // The tool draws its own outline, and leaves the letters of the axes as they are.
  const strokes = (selector: string) =>
    page
      .locator(selector)
      .first()
      .evaluate((element) => getComputedStyle(element).strokeDasharray);
  expect(await strokes("[data-testid=axial] text")).toBe("none");
  expect(await strokes("[data-testid=region]")).not.toBe("none");
  // By key the region is the crosshair's layer: what is in it is known without looking.
  await page.keyboard.press("Escape");
  await page.keyboard.press("e");
  const { component } = await reading(page);
  const layer = /^blocks\.(\d+)\./.exec(component)?.[1] ?? "";
  const inside = topology.addresses.filter((address) => address.startsWith(`blocks.${layer}.`));
  const values = inside.map((address) => FRAMES.values[address]?.[LAST] ?? NaN);
  const mean = values.reduce((a, b) => a + b) / values.length;
  const sd = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
  expect(await number(page, "mean")).toBeCloseTo(mean, 9);
  expect(await number(page, "sd")).toBeCloseTo(sd, 9);
  expect(await number(page, "min")).toBe(Math.min(...values));
  expect(await number(page, "max")).toBe(Math.max(...values));
  expect(await page.getByTestId("announcement").innerText()).toContain("standard deviation");
  expect(await violations(page)).toEqual([]);
  await leave(open);
});

test("a layout, folded or enlarged, keeps the selection, and the address brings it back", async () => {
  const open = await visit(browser, { fragment: "focus=blocks.17.attn.head_4" });
  const { page } = open;
  await settled(page);
  for (const name of ["network", "radial", "stack", "brain"]) {
    await page.keyboard.press("l");
    expect(await page.getByTestId("layout").inputValue()).toBe(name);
    expect((await reading(page)).component).toBe("blocks.17.attn.head_4");
  }
  await page.keyboard.press("x");
  expect(await reading(page)).toMatchObject({ component: "blocks.17.attn", value: 885_312 });
  await page.getByText("attn 885,312", { exact: true }).waitFor();
  await page.keyboard.press("x");
  expect((await reading(page)).component).toBe("blocks.17.attn.head_0");
  await page.keyboard.press("z");
  await page.keyboard.press("z");
  await page.getByTestId("scout-sight").waitFor();
  const place = () =>
    page.getByTestId("crosshair").evaluate((c) => [c.getAttribute("cx"), c.getAttribute("cy")]);
  const before = await place();
  await page.waitForFunction(() => location.hash.includes("zoom="));
  await page.reload();
  await settled(page);
  await page.getByTestId("scout-sight").waitFor();
  expect(await place()).toEqual(before);
  await leave(open);
});

test("prior, current and difference hang side by side, and the difference is exact", async () => {
  const open = await visit(browser, { fragment: `seq=fMRI&prompt=${encodeURIComponent(PROMPT)}` });
  const { page } = open;
  await page.getByTestId("axial").waitFor();
  await page.keyboard.press("/");
  await page.keyboard.press("Enter");
  await page.locator(".status", { hasText: "fMRI scan complete" }).waitFor();
  await page.keyboard.press("Escape");
  await page.keyboard.press("h");
  await page.keyboard.press("p");
  await page.locator(":focus", { hasText: "Zero" }).waitFor();
  await page.keyboard.press("Enter");
  await page.getByRole("button", { name: "Run" }).click();
  await page.locator(".status", { hasText: "Stimulation complete" }).waitFor();
  await page.keyboard.press("9");
  await page.getByTestId("compare").waitFor();
  expect(await page.getByTestId("prior-kind").inputValue()).toBe("stimulation");
  const file = new URL("../fixtures/data/perturbation/pyarrow.json", import.meta.url);
  const rows = JSON.parse(readFileSync(file, "utf8")) as Readonly<
    Record<string, Readonly<Record<string, unknown[]>>>
  >;
  const component = "blocks.1.mlp";
  const row = rows["activations"]?.["component"]?.indexOf(component) ?? -1;
  const before = (rows["activations"]?.["value"]?.[row] as number[]).at(-1) ?? NaN;
  const after = (rows["activations_after"]?.["value"]?.[row] as number[]).at(-1) ?? NaN;
  // The address follows a moment later.
  await page.waitForFunction(() => /token=9.*hang=prior|hang=prior.*token=9/.test(location.hash));
  const there = new URLSearchParams(new URL(page.url()).hash.slice(1));
  there.set("focus", component);
  there.set("hang", "prior");
  there.set("prior", "stimulation");
  await page.evaluate((fragment) => (location.hash = fragment), there.toString());
  await page.locator(`[data-testid=corner-value-prior][data-component="${component}"]`).waitFor();
  expect(await number(page, "corner-value-prior")).toBe(before);
  expect(await number(page, "corner-value-current")).toBe(after);
  expect(await number(page, "corner-value-difference")).toBe(after - before);
  expect(await violations(page)).toEqual([]);
  expect(open.complaints).toEqual([]);
  await leave(open);
});

test("two prompts are compared, and one address brings both scans back", async () => {
  const open = await visit(browser);
  const { page } = open;
  // NaN stands there until both are known.
  const measured = '[data-testid=corner-value-difference]:not([data-value="NaN"])';
  await scan(page);
  await page.keyboard.press("9");
  await page.getByTestId("prior-prompt").fill("The Big Ben Tower is located in the city of");
  await page.keyboard.press("Enter");
  await page.locator(measured).waitFor();
  const asked = open.server.requests.filter((r) => r.startsWith("body")).at(-1) ?? "";
  expect(asked).toContain("Big Ben");
  // The stand-in measures the same whatever it reads, so nothing differs.
  expect(await number(page, "corner-value-difference")).toBe(0);
  await page.waitForFunction(() => location.hash.includes("prior.job="));
  await page.reload();
  await page.locator(measured).waitFor();
  expect(await number(page, "corner-value-difference")).toBe(0);
  // A pointer in one picture moves the crosshair in all, within the frame.
  await page.getByTestId("axial-prior").click({ position: { x: 120, y: 300 } });
  await drawn(page);
  const where = async (name: string) =>
    page.getByTestId(`corner-value-${name}`).getAttribute("data-component");
  expect(await where("current")).toBe(await where("prior"));
  expect(await where("difference")).toBe(await where("prior"));
  await page.keyboard.press("8");
  await page.getByTestId("five").waitFor();
  expect(await page.getByTestId("axial-FLAIR").count()).toBe(1);
  expect(await violations(page)).toEqual([]);
  await leave(open);
});

test("a key image is marked, annotated, and shown again as it was", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await page.keyboard.press("h");
  await page.keyboard.press(",");
  const marked = await reading(page);
  await page.keyboard.press("k");
  await page.getByText("Key image 1 marked.").waitFor({ state: "attached" });
  await page.getByRole("tab", { name: "Session" }).click();
  await page.getByRole("textbox", { name: "Note on key image 1" }).fill("the first one");
  await page.getByTestId("axial").focus();
  await page.keyboard.press("ArrowUp");
  await page.keyboard.press("Home");
  expect(await reading(page)).not.toEqual(marked);
  await page.getByRole("button", { name: /Show key image 1/ }).click();
  await drawn(page);
  expect(await reading(page)).toEqual(marked);
  await page.reload();
  await page.getByRole("tab", { name: "Session" }).click();
  expect(await page.getByRole("textbox", { name: "Note on key image 1" }).inputValue()).toBe(
    "the first one",
  );
  expect(await violations(page)).toEqual([]);
  await leave(open);
});

test("a scan in the queue says its place and when it starts; held, the picture stands still", async () => {
  const open = await visit(browser, { behaviour: { place: 3 } });
  const { page, server } = open;
  await settled(page);
  await page.fill("#prompt", PROMPT);
  await page.press("#prompt", "Enter");
  await page.getByTestId("queue").filter({ hasText: "Place 3 in the queue" }).waitFor();
  expect(await page.getByTestId("queue").innerText()).toContain("about 12 seconds");
  server.behaviour.place = 1;
  await page.getByTestId("queue").filter({ hasText: "Next in the queue" }).waitFor();
  await page.getByRole("button", { name: "PAUSE" }).click();
  // The stream ends meanwhile: what it brought waits until somebody lets it be shown.
  server.behaviour.place = 0;
  const ended = () => server.requests.some((request) => request.startsWith("ended "));
  await expect.poll(ended, { timeout: 10_000 }).toBe(true);
  await page.waitForTimeout(500);
  expect(await page.locator(".status", { hasText: "fMRI scan complete" }).count()).toBe(0);
  await page.getByRole("button", { name: "GO ON" }).click();
  await page.locator(".status", { hasText: "fMRI scan complete" }).waitFor();
  await leave(open);
});

test("too many requests are told in words, with how long to wait", async () => {
  const problem = { title: "Too many jobs", status: 429, detail: "4 of your jobs are under way" };
  const open = await visit(browser, { behaviour: { refuse: true, problem, retryAfter: 7 } });
  const { page } = open;
  await settled(page);
  await page.fill("#prompt", PROMPT);
  await page.press("#prompt", "Enter");
  await page
    .getByTestId("problem")
    .filter({ hasText: "4 of your jobs are under way. Try again in 7 seconds." })
    .waitFor();
  await leave(open);
});

test("a service that asks for keys is told one, and the page keeps none", async () => {
  const open = await visit(browser, { behaviour: { key: "nmri_right" } });
  const { page } = open;
  await page.getByTestId("login").waitFor();
  expect(await violations(page)).toEqual([]);
  await page.keyboard.type("nmri_wrong");
  await page.keyboard.press("Enter");
  await page.getByText("unknown, expired or revoked").waitFor();
  await page
    .getByRole("textbox", { name: "API key" })
    .or(page.locator("input[name=key]"))
    .fill("nmri_right");
  await page.keyboard.press("Enter");
  await settled(page);
  const kept = await page.evaluate(() => [
    document.cookie,
    JSON.stringify({ ...localStorage }),
    JSON.stringify({ ...sessionStorage }),
    location.href,
  ]);
  expect(kept.join()).not.toContain("nmri_right");
  await page.reload();
  await settled(page);
  await page.getByTestId("sign-out").click();
  await page.getByTestId("login").waitFor();
  await leave(open);
});

test("an injection at chosen tokens is sent as it was typed", async () => {
  const open = await visit(browser, {
    fragment: `seq=fMRI&focus=blocks.3.mlp&panel=stimulate&prompt=${encodeURIComponent(PROMPT)}`,
  });
  const { page } = open;
  await page.getByTestId("target").selectOption("neuron");
  await page.getByTestId("neuron").fill("12");
  await page.getByTestId("positions").fill("1-2");
  await page.getByRole("button", { name: "Inject…" }).click();
  await page.getByTestId("inject-values").fill("1 x");
  await page.getByText("Something here is no number.").waitFor();
  await page.getByTestId("inject-values").fill("-0.5");
  await page.getByTestId("inject-mode").selectOption("replace");
  await page.getByRole("button", { name: "Add the injection" }).click();
  await page.getByTestId("target").selectOption("resid_mid");
  await page.getByRole("button", { name: "Patch…" }).click();
  await page.getByTestId("patch-source").fill("The Big Ben Tower is located in the city of");
  await page.getByRole("button", { name: "Add the patch" }).click();
  expect(await violations(page)).toEqual([]);
  await page.getByRole("button", { name: "Run" }).click();
  await page.locator(".status", { hasText: "Stimulation complete" }).waitFor();
  const body =
    open.server.requests
      .filter((r) => r.startsWith("body"))
      .at(-1)
      ?.slice(5) ?? "";
  expect(JSON.parse(body)).toMatchObject({
    perturbations: [
      {
        operation: "inject",
        component: "blocks.3.mlp.neuron_12",
        mode: "replace",
        values: [-0.5],
        token_positions: [1, 2],
      },
      {
        operation: "patch",
        component: "blocks.3.resid_mid",
        source_prompt: "The Big Ben Tower is located in the city of",
        token_positions: [1, 2],
      },
    ],
  });
  await leave(open);
});
