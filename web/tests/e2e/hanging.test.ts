/** Two models of different shapes under one crosshair, from the real service. */
import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";

import { launch, scan, violations } from "./browser";
import { serve, type Service } from "./service";

let browser: Browser;
let service: Service;
beforeAll(async () => {
  [browser, service] = await Promise.all([launch(), serve()]);
});
afterAll(async () => {
  await browser.close();
  await service.close();
});

/** Layers and heads of the two; the smaller is called so. */
const LARGE = { layers: 30, heads: 9 };
const SMALL = { name: "tiny", layers: 2, heads: 4 };

/** Which component a picture's corner reads. */
async function component(page: Page, picture: "prior" | "current"): Promise<string> {
  return (
    (await page.getByTestId(`corner-value-${picture}`).getAttribute("data-component")) ?? "none"
  );
}

/** Clicks on the midline of a picture, at a share of the way down. */
async function clickMidline(
  page: Page,
  picture: "prior" | "current",
  share: number,
): Promise<void> {
  const box = await page.getByTestId(`axial-${picture}`).boundingBox();
  if (box === null) throw new Error(`There is no picture ${picture}`);
  await page.mouse.click(box.x + box.width / 2, box.y + box.height * share);
}

test("the same relative place is read in both, either way round, and no difference is made up", async () => {
  const page = await browser.newPage({ viewport: { width: 1280, height: 720 } });
  page.setDefaultTimeout(15_000);
  const complaints: string[] = [];
  page.on("pageerror", (error) => complaints.push(error.message));
  await page.goto(service.origin);
  await scan(page);
  await page.getByTestId("protocol").selectOption("models");
  await page.getByTestId("prior-model").selectOption(SMALL.name);
  await page.getByRole("button", { name: "Scan it with the same prompt" }).click();
  await page.getByTestId("corner-value-prior").waitFor();
  await page.getByText("The two models differ in shape").waitFor();
  await page.getByText("Windows are linked").waitFor();
  expect(await page.getByTestId("axial-difference").count()).toBe(0);
  expect(await page.getByText("crosshair at the same relative depth").count()).toBe(1);
  expect(await violations(page)).toEqual([]);

  const visited = new Set<string>();
  await page.getByTestId("axial-current").focus();
  for (let step = 0; step < LARGE.layers + 2; step++) {
    await page.keyboard.press("ArrowUp");
  }
  expect(await component(page, "prior")).toBe("embed");
  for (let layer = 0; layer < LARGE.layers; layer++) {
    await page.keyboard.press("ArrowDown");
    expect(await component(page, "current")).toBe(`blocks.${layer}.mlp`);
    const there = Math.round((layer / (LARGE.layers - 1)) * (SMALL.layers - 1));
    expect(await component(page, "prior")).toBe(`blocks.${there}.mlp`);
    visited.add(await component(page, "prior"));
  }
  expect(visited.size).toBe(SMALL.layers);

  // The other way round several layers of the larger share one of the smaller: what is clicked is read.
  await page.locator("#model").selectOption(SMALL.name);
  await page.getByTestId("prior-model").selectOption({ index: 0 });
  await page.keyboard.press("1");
  await page.getByTestId("corner-value-prior").waitFor();
  const clicked = new Set<string>();
  for (const share of [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]) {
    await clickMidline(page, "prior", share);
    await page.mouse.move(5, 5);
    clicked.add(await component(page, "prior"));
    expect(await component(page, "current")).toMatch(/^blocks\.[01]\./);
  }
  expect(clicked.size).toBe(6);
  expect(complaints).toEqual([]);
  await page.close();
});
