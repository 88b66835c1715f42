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

type Reach = (open: Visit) => Promise<unknown>;

/** States that one visit goes through, in this order. */
interface Case {
  readonly options: VisitOptions;
  readonly states: Readonly<Record<string, Reach>>;
}

/** Presses the sequence's key and takes its scan. */
async function take({ page }: Visit, id: SequenceId): Promise<void> {
  await page.getByTestId("axial").focus();
  await page.keyboard.press(String(SEQUENCES.findIndex((sequence) => sequence.id === id) + 1));
  if (id === "T1") return;
  await page.fill("#prompt", PROMPT);
  await page.getByRole("button", { name: `SCAN ${id}` }).click();
}

function complete({ page }: Visit, id: SequenceId): Promise<void> {
  return page.locator(".status", { hasText: `${id} scan complete` }).waitFor();
}

async function compare({ page }: Visit): Promise<void> {
  await page.getByTestId("axial").focus();
  await page.keyboard.press("9");
  await page.getByTestId("compare").waitFor();
}

/** Every sequence, where there is nothing, while it comes, with its scan, refused, and beside a prior. */
const STATES: readonly Case[] = SEQUENCES.flatMap(({ id }): Case[] =>
  id === "T1"
    ? [
        {
          options: { behaviour: { bare: true } },
          states: { "T1, empty": ({ page }) => page.getByText("no model is registered").waitFor() },
        },
        {
          options: { behaviour: { silent: true } },
          states: { "T1, loading": ({ page }) => page.getByText("Asking the service").waitFor() },
        },
        {
          options: {},
          states: { "T1, scan": (open) => complete(open, id), "T1, compare": compare },
        },
        {
          options: { behaviour: { down: true } },
          states: {
            "T1, error": ({ page }) =>
              page.getByText("The service cannot be reached").first().waitFor(),
          },
        },
      ]
    : [
        {
          options: { fragment: `seq=${id}`, behaviour: { pause: 200 } },
          states: {
            [`${id}, empty`]: ({ page }) => page.getByText(`No ${id} scan yet`).waitFor(),
            [`${id}, loading`]: async (open) => {
              await take(open, id);
              await open.page.getByRole("button", { name: "CANCEL" }).waitFor();
            },
            [`${id}, scan`]: async (open) => {
              open.server.behaviour.pause = 1;
              await complete(open, id);
            },
            [`${id}, compare`]: compare,
          },
        },
        {
          options: { behaviour: { problem: PROBLEM } },
          states: {
            [`${id}, error`]: async (open) => {
              await settled(open.page);
              await take(open, id);
              await open.page.getByTestId("problem").waitFor();
            },
          },
        },
      ],
);

/** The next layout, by its key. */
function layout(name: string): Reach {
  return async ({ page }) => {
    await page.getByTestId("axial").focus();
    await page.keyboard.press("l");
    await expect.poll(() => page.getByTestId("layout").inputValue()).toBe(name);
  };
}

const OTHERS: readonly Case[] = [
  {
    options: { fragment: "seq=fMRI", behaviour: { modelState: "available" } },
    states: {
      "fMRI, no worker holds the model": ({ page }) =>
        page.getByRole("button", { name: "Load" }).waitFor(),
    },
  },
  {
    options: { fragment: "layout=brain&focus=blocks.14.attn.head_4" },
    states: {
      "fMRI, attention pattern": async ({ page }) => {
        await scan(page);
        await page.getByRole("button", { name: "Measure the pattern" }).click();
        await page.getByTestId("attention").waitFor();
      },
      "fMRI, network": layout("network"),
      "fMRI, radial": layout("radial"),
      "fMRI, heads folded": async ({ page }) => {
        await page.keyboard.press("x");
        await page.locator("[data-testid=corner-value][data-component='blocks.14.attn']").waitFor();
      },
    },
  },
  {
    options: {},
    states: {
      "fMRI, table": async ({ page }) => {
        await scan(page);
        await page.keyboard.press("t");
        await page.getByRole("table").waitFor();
      },
    },
  },
  {
    options: { fragment: "hang=five" },
    states: {
      "five sequences at once": async ({ page }) => {
        await page.getByTestId("corner-value-T1").waitFor();
        await page.getByTestId("strip").waitFor();
      },
    },
  },
  {
    options: { fragment: "panel=log" },
    states: {
      log: ({ page }) => page.getByText("T1 scan complete").first().waitFor(),
      help: async ({ page }) => {
        await page.getByTestId("axial").focus();
        await page.keyboard.press("?");
        await page.getByRole("dialog").waitFor();
      },
    },
  },
  {
    options: { width: 640, height: 360, zoom: 2 },
    states: { "T1 at 200 %": ({ page }) => settled(page) },
  },
];

test("there are 25 states", () => {
  expect(new Set(STATES.flatMap(({ states }) => Object.keys(states))).size).toBe(25);
});

test.each(
  [...STATES, ...OTHERS].map((one) => ({ ...one, name: Object.keys(one.states).join("; ") })),
)("axe finds nothing: $name", async ({ options, states }) => {
  const open = await visit(browser, options);
  for (const [name, reach] of Object.entries(states)) {
    await reach(open);
    expect(await violations(open.page), name).toEqual([]);
  }
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
