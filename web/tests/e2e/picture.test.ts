import type { Browser } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";

import { lut, lutIndex } from "../../src/colour/lut";
import { position, type Scale } from "../../src/colour/window";
import { topologyOf } from "../../src/model/topology";
import { SMOLLM2 } from "../unit/architectures";
import { chance } from "../unit/fixtures";
import {
  FRAMES,
  counts,
  drawn,
  launch,
  leave,
  pixel,
  reading,
  rested,
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

const SCREENS = [
  { width: 1280, height: 720, zoom: 1 },
  { width: 1920, height: 1080, zoom: 1 },
  { width: 640, height: 360, zoom: 2 },
];

test("the number in the corner is the stored float, and the pixel its colour", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  const random = chance(3);
  const colours = lut("inferno");
  const start = new URLSearchParams(
    await page
      .waitForFunction(() => location.hash.includes("job=") && location.hash)
      .then(async (handle) => String(await handle.jsonValue()).slice(1)),
  );
  for (let i = 0; i < 60; i++) {
    const node = Math.floor(random() * (topology.size - 1));
    const token = Math.floor(random() * FRAMES.texts.length);
    const component = topology.addresses[node] ?? "";
    start.set("focus", component);
    start.set("token", String(token));
    await page.evaluate((fragment) => (location.hash = fragment), start.toString());
    await page
      .locator(`[data-testid=corner-value][data-component="${component}"][data-column="${token}"]`)
      .waitFor();
    await drawn(page);
    const [{ value }, colour, corner] = await Promise.all([
      reading(page),
      pixel(page),
      page.getByTestId("corner-window").evaluate((e) => ({ ...(e as HTMLElement).dataset })),
    ]);
    expect(value, `${component} at ${token}`).toBe(FRAMES.values[component]?.[token]);
    const window = { level: Number(corner["level"]), width: Number(corner["width"]) };
    const at = lutIndex(position(value, window, corner["scale"] as Scale)) * 3;
    expect(colour.slice(0, 3), component).toEqual([...colours.slice(at, at + 3)]);
  }
  expect(open.complaints).toEqual([]);
  await leave(open);
});

test("changing the sequence moves no node, and fades", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  const place = () =>
    page.getByTestId("crosshair").evaluate((c) => [c.getAttribute("cx"), c.getAttribute("cy")]);
  const before = await place();
  // A busy machine draws fewer frames of a fade; where nothing fades, no try has as many.
  const fade = async () => {
    await page.keyboard.press("3");
    await page.waitForTimeout(450);
    const { frames } = await counts(page);
    await page.keyboard.press("1");
    await page.waitForTimeout(450);
    return (await counts(page)).frames - frames;
  };
  await expect.poll(fade, { timeout: 30_000 }).toBeGreaterThan(6);
  expect(await place()).toEqual(before);
  const { component, value } = await reading(page);
  expect(component).toMatch(/^blocks\./);
  expect(value % 1).toBe(0);
  await leave(open);
});

test("with reduced motion nothing fades or pulses", async () => {
  const open = await visit(browser, { reducedMotion: "reduce" });
  const { page } = open;
  await scan(page);
  await rested(page);
  const frames = (await counts(page)).frames;
  await page.keyboard.press("1");
  await page.waitForTimeout(400);
  expect((await counts(page)).frames - frames).toBeLessThanOrEqual(2);
  const animations = await page.evaluate(() => document.getAnimations().length);
  expect(animations).toBe(0);
  await leave(open);
});

test("an idle viewer asks for no frame and sets no timer", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await rested(page);
  const before = await counts(page);
  await page.waitForTimeout(2000);
  expect(await counts(page)).toEqual(before);
  expect(await page.evaluate(() => document.getAnimations().length)).toBe(0);
  await leave(open);
});

test("dragging changes the window, and never a number", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  const before = { ...(await reading(page)), colour: await pixel(page) };
  const window = () => page.getByTestId("corner-window").getAttribute("data-width");
  const width = await window();
  const box = await page.getByTestId("axial").boundingBox();
  if (box === null) throw new Error("no axial viewport");
  await page.mouse.move(box.x + 60, box.y + 250);
  await page.mouse.down();
  await page.mouse.move(box.x + 100, box.y + 420, { steps: 5 });
  await page.mouse.up();
  await page.mouse.move(box.x + 5, box.y + 250);
  await drawn(page);
  expect(await window()).not.toBe(width);
  expect(await pixel(page)).not.toEqual(before.colour);
  const after = await reading(page);
  expect(after.value).toBe(before.value);
  await page.keyboard.press("a");
  expect(await window()).toBe(width);
  await leave(open);
});

test.each(SCREENS)(
  "at $width x $height, zoom $zoom, every component is in sight",
  async (screen) => {
    const open = await visit(browser, screen);
    const { page } = open;
    await settled(page);
    const box = await page.getByTestId("axial").boundingBox();
    if (box === null) throw new Error("no axial viewport");
    expect(box.y + box.height).toBeLessThanOrEqual(screen.height);
    const radius = Number(await page.getByTestId("axial").getAttribute("data-max-radius"));
    for (const component of [
      "embed",
      "unembed",
      "blocks.15.attn.head_0",
      "blocks.15.attn.head_8",
    ]) {
      await page.evaluate((focus) => (location.hash = `focus=${focus}`), component);
      const mark = page.getByTestId("crosshair");
      await page.locator(`[data-component="${component}"]`).first().waitFor();
      const [x, y] = await mark.evaluate((c) => [
        Number(c.getAttribute("cx")),
        Number(c.getAttribute("cy")),
      ]);
      expect(x ?? 0).toBeGreaterThan(radius);
      expect(x ?? 0).toBeLessThan(box.width - radius);
      expect(y ?? 0).toBeGreaterThan(radius);
      expect(y ?? 0).toBeLessThan(box.height - radius);
    }
    await leave(open);
  },
);

test.each(SCREENS.slice(0, 2))("the picture has the room at $width x $height", async (screen) => {
  const open = await visit(browser, screen);
  await settled(open.page);
  const box = await open.page.getByTestId("viewports").boundingBox();
  const share = ((box?.width ?? 0) * (box?.height ?? 0)) / (screen.width * screen.height);
  expect(share).toBeGreaterThanOrEqual(0.65);
  await leave(open);
});

test("text is 12 px or more, everywhere", async () => {
  const open = await visit(browser);
  await scan(open.page);
  const small = await open.page.evaluate(() =>
    [...document.querySelectorAll("body *")]
      .filter((element) =>
        [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent?.trim()),
      )
      .filter((element) => Number.parseFloat(getComputedStyle(element).fontSize) < 12)
      .map((element) => element.outerHTML.slice(0, 80)),
  );
  expect(small).toEqual([]);
  expect(await violations(open.page)).toEqual([]);
  await leave(open);
});
