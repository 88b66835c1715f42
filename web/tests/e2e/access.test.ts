import type { Browser } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";

import { SEQUENCES, type SequenceId } from "../../src/model/sequences";
import {
  FRAMES,
  PROMPT,
  launch,
  leave,
  reading,
  scan,
  settled,
  violations,
  visit,
  type Visit,
  type VisitOptions,
} from "./browser";

let browser: Browser;
beforeAll(async () => {
  browser = await launch();
});
afterAll(() => browser.close());

const PROBLEM = { title: "The model ran out of memory", status: 500, detail: "asked for 9 GB" };

interface Case {
  readonly name: string;
  readonly options: VisitOptions;
  readonly reach: (open: Visit) => Promise<unknown>;
}

/** Presses the sequence's key and takes its scan. */
async function take({ page }: Visit, id: SequenceId): Promise<void> {
  await settled(page);
  await page.getByTestId("axial").focus();
  await page.keyboard.press(String(SEQUENCES.findIndex((sequence) => sequence.id === id) + 1));
  if (id === "T1") return;
  await page.fill("#prompt", PROMPT);
  await page.getByRole("button", { name: `SCAN ${id}` }).click();
}

async function complete(open: Visit, id: SequenceId): Promise<void> {
  await take(open, id);
  await open.page.locator(".status", { hasText: `${id} scan complete` }).waitFor();
}

/** Every sequence, where there is nothing, while it comes, with its scan, refused, and beside a prior. */
const STATES: readonly Case[] = SEQUENCES.flatMap(({ id }): Case[] => [
  id === "T1"
    ? {
        name: "T1, empty",
        options: { behaviour: { bare: true } },
        reach: ({ page }) => page.getByText("no model is registered").waitFor(),
      }
    : {
        name: `${id}, empty`,
        options: { fragment: `seq=${id}` },
        reach: ({ page }) => page.getByText(`No ${id} scan yet`).waitFor(),
      },
  id === "T1"
    ? {
        name: "T1, loading",
        options: { behaviour: { silent: true } },
        reach: ({ page }) => page.getByText("Asking the service").waitFor(),
      }
    : {
        name: `${id}, loading`,
        options: { behaviour: { pause: 200 } },
        reach: async (open) => {
          await take(open, id);
          await open.page.getByRole("button", { name: "CANCEL" }).waitFor();
        },
      },
  { name: `${id}, scan`, options: {}, reach: (open) => complete(open, id) },
  id === "T1"
    ? {
        name: "T1, error",
        options: { behaviour: { down: true } },
        reach: ({ page }) => page.getByText("The service cannot be reached").first().waitFor(),
      }
    : {
        name: `${id}, error`,
        options: { behaviour: { problem: PROBLEM } },
        reach: async (open) => {
          await take(open, id);
          await open.page.getByTestId("problem").waitFor();
        },
      },
  {
    name: `${id}, compare`,
    options: {},
    reach: async (open) => {
      await complete(open, id);
      await open.page.getByTestId("axial").focus();
      await open.page.keyboard.press("9");
      await open.page.getByTestId("compare").waitFor();
    },
  },
]);

const OTHERS: readonly Case[] = [
  {
    name: "fMRI, no worker holds the model",
    options: { fragment: "seq=fMRI", behaviour: { modelState: "available" } },
    reach: ({ page }) => page.getByRole("button", { name: "Load" }).waitFor(),
  },
  {
    name: "fMRI, table",
    options: {},
    reach: async ({ page }) => {
      await scan(page);
      await page.keyboard.press("t");
      await page.getByRole("table").waitFor();
    },
  },
  {
    name: "fMRI, attention pattern",
    options: { fragment: "focus=blocks.14.attn.head_4" },
    reach: async ({ page }) => {
      await scan(page);
      await page.getByRole("button", { name: "Measure the pattern" }).click();
      await page.getByTestId("attention").waitFor();
    },
  },
  {
    name: "log",
    options: { fragment: "panel=log" },
    reach: ({ page }) => page.getByText("T1 scan complete").first().waitFor(),
  },
  {
    name: "help",
    options: {},
    reach: async ({ page }) => {
      await settled(page);
      await page.keyboard.press("?");
      await page.getByRole("dialog").waitFor();
    },
  },
  ...["radial", "network"].map((layout): Case => ({
    name: `fMRI, ${layout}`,
    options: { fragment: `layout=${layout}` },
    reach: ({ page }) => scan(page),
  })),
  {
    name: "fMRI, heads folded",
    options: { fragment: "fold=true" },
    reach: ({ page }) => scan(page),
  },
  {
    name: "five sequences at once",
    options: { fragment: "hang=five" },
    reach: async ({ page }) => {
      await page.getByTestId("corner-value-T1").waitFor();
      await page.getByTestId("strip").waitFor();
    },
  },
  {
    name: "T1 at 200 %",
    options: { width: 640, height: 360, zoom: 2 },
    reach: ({ page }) => settled(page),
  },
];

test("there are 25 states", () => {
  expect(new Set(STATES.map(({ name }) => name)).size).toBe(25);
});

test.each([...STATES, ...OTHERS])("axe finds nothing: $name", async ({ options, reach }) => {
  const open = await visit(browser, options);
  await reach(open);
  expect(await violations(open.page)).toEqual([]);
  await leave(open);
});

test("from an empty viewer to the hottest head and back, without a pointer", async () => {
  const open = await visit(browser);
  const { page } = open;
  await settled(page);
  await page.keyboard.press("/");
  await page.keyboard.type(PROMPT);
  await page.keyboard.press("Enter");
  await page.locator(".status", { hasText: "fMRI scan complete" }).waitFor();
  await page.keyboard.press("Escape");
  await page.keyboard.press("Home");
  expect((await reading(page)).column).toBe(0);
  await page.keyboard.press(".");
  await page.keyboard.press("h");
  const { component, column, value } = await reading(page);
  expect(column).toBe(1);
  const inLayers = Object.entries(FRAMES.values).filter(([name]) => /head_|mlp$/.test(name));
  expect(value).toBe(Math.max(...inLayers.map(([, values]) => values[1] ?? 0)));
  expect(component).not.toBe("");
  await page.keyboard.press("1");
  expect(await page.getByRole("tab", { selected: true }).first().innerText()).toContain("T1");
  await page.keyboard.press("PageDown");
  await page.keyboard.press("PageDown");
  await page.keyboard.press(" ");
  await page.getByRole("button", { name: "Pause" }).waitFor();
  await page.keyboard.press(" ");
  await page.getByRole("button", { name: "Play the tokens" }).waitFor();
  await leave(open);
});

test("every move is read out: name, value, unit, rank and token", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await page.keyboard.press("ArrowLeft");
  const { component } = await reading(page);
  const [, layer, head] = /blocks\.(\d+)\.attn\.head_(\d+)/.exec(component) ?? [];
  const spoken = await page.getByTestId("announcement").innerText();
  expect(spoken).toMatch(
    new RegExp(`^L${layer}H${head}, [\\d.]+ L2 norm, rank \\d+ of 302, token 9 of 0–9, of\\.$`),
  );
  await leave(open);
});

test("the table says what the picture says, token for token", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await page.keyboard.press("t");
  await page.getByRole("button", { name: "All 302" }).click();
  await page.getByTestId("axial").focus();
  for (const column of [9, 8, 7]) {
    const rows = await page
      .locator("tbody tr")
      .evaluateAll((all) => all.map((row) => ({ ...(row as HTMLElement).dataset })));
    expect(rows).toHaveLength(302);
    for (const row of rows) {
      expect(Number(row["value"])).toBe(FRAMES.values[row["component"] ?? ""]?.[column]);
    }
    await page.keyboard.press(",");
  }
  await leave(open);
});

test("no more than 25 stops of the Tab key", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await page.evaluate(() => (document.activeElement as HTMLElement).blur());
  const stops = new Set<string>();
  for (let i = 0; i < 40; i++) {
    await page.keyboard.press("Tab");
    const stop = await page.evaluate(() => {
      const { activeElement } = document;
      return activeElement === document.body ? null : activeElement?.outerHTML.slice(0, 160);
    });
    if (stop == null || stops.has(stop)) break;
    stops.add(stop);
  }
  expect(stops.size).toBeGreaterThan(8);
  expect(stops.size).toBeLessThanOrEqual(25);
  await leave(open);
});

test("the side panel scrolls by key, and the crosshair stays where it is", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await page.keyboard.press("t");
  await page.getByRole("button", { name: "All 302" }).press("Enter");
  const before = await reading(page);
  const panel = page.locator("#panel");
  const top = () => panel.evaluate(({ scrollTop }) => scrollTop);
  await panel.focus();
  for (const [forth, back] of [
    ["ArrowDown", "ArrowUp"],
    ["PageDown", "PageUp"],
    ["End", "Home"],
  ] as const) {
    await page.keyboard.press(forth);
    await expect.poll(top, { message: forth }).toBeGreaterThan(0);
    await page.keyboard.press(back);
    await expect.poll(top, { message: back }).toBe(0);
  }
  expect(await reading(page)).toEqual(before);
  expect(await page.getByRole("tab", { selected: true }).first().innerText()).toContain("fMRI");
  // The picture's own keys are the picture's as before.
  await page.getByTestId("axial").focus();
  await page.keyboard.press("Home");
  expect((await reading(page)).column).toBe(0);
  await leave(open);
});

test("Space opens what can be opened, and plays nothing", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  const summary = page.locator("summary", { hasText: "What it measures" });
  const isOpen = () => summary.evaluate(({ parentElement }) => parentElement?.hasAttribute("open"));
  const before = await isOpen();
  await summary.focus();
  await page.keyboard.press(" ");
  await expect.poll(isOpen).toBe(!before);
  expect(await page.getByRole("button", { name: "Pause" }).count()).toBe(0);
  await leave(open);
});

test("a key that is held down saves once", async () => {
  const open = await visit(browser);
  const { page, server } = open;
  await scan(page);
  for (let i = 0; i < 3; i++) await page.keyboard.down("u");
  await page.keyboard.up("u");
  const saves = () => server.requests.filter((request) => request === "POST /api/sessions").length;
  await expect.poll(saves).toBeGreaterThan(0);
  await page.waitForTimeout(500);
  expect(saves()).toBe(1);
  await leave(open);
});

test("single letters can be switched off for people who dictate", async () => {
  const open = await visit(browser);
  const { page } = open;
  await settled(page);
  await page.keyboard.press("?");
  await page.getByRole("checkbox").uncheck();
  await page.keyboard.press("Escape");
  await page.getByRole("dialog").waitFor({ state: "detached" });
  await page.keyboard.press("t");
  expect(await page.getByRole("table").count()).toBe(0);
  await page.keyboard.press("ArrowDown");
  expect((await reading(page)).component).toBe("blocks.1.mlp");
  await leave(open);
});
