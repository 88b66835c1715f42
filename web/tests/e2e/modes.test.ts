/** T2, DTI, FLAIR and stimulation, on tables that the service's scanner measured on SmolLM2. */
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";

import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";

import { lut, lutIndex, type MapName } from "../../src/colour/lut";
import { position, type Scale } from "../../src/colour/window";
import {
  PROMPT,
  counts,
  drawn,
  launch,
  leave,
  pixel,
  reading,
  rested,
  violations,
  visit,
} from "./browser";

let browser: Browser;
beforeAll(async () => {
  browser = await launch();
});
afterAll(() => browser.close());

type Rows = Readonly<Record<string, Readonly<Record<string, unknown[]>>>>;

function oracle(mode: string): Rows {
  const file = new URL(`../fixtures/data/${mode}/pyarrow.json`, import.meta.url);
  return JSON.parse(readFileSync(file, "utf8"), (_, value: unknown) =>
    value === "NaN" ? NaN : value,
  ) as Rows;
}

const QUESTION = new URLSearchParams({
  prompt: PROMPT,
  answer: "Paris",
  foil: "London",
  corrupt: "The Big Ben Tower is located in the city of",
}).toString();

/** Takes the shown sequence's scan with the keyboard alone. */
async function take(page: Page, id: string): Promise<void> {
  await page.getByTestId("axial").waitFor();
  await page.keyboard.press("/");
  await page.keyboard.press("Enter");
  await page.locator(".status", { hasText: `${id} scan complete` }).waitFor();
  await page.keyboard.press("Escape");
}

async function address(page: Page): Promise<URLSearchParams> {
  await page.waitForFunction(() => location.hash.includes("job="));
  await page.waitForTimeout(350);
  return new URLSearchParams(new URL(page.url()).hash.slice(1));
}

/** Moves the crosshair by the address, and waits until the picture has followed. */
async function look(page: Page, there: URLSearchParams, component: string): Promise<void> {
  there.set("focus", component);
  await page.evaluate((fragment) => (location.hash = fragment), there.toString());
  await page.locator(`[data-testid=corner-value][data-component="${component}"]`).waitFor();
  await drawn(page);
}

interface Case {
  readonly id: string;
  readonly fragment: string;
  readonly map: MapName;
  /** The table and column the first picture is painted from, and the row a component has there. */
  readonly stored: () => ReadonlyMap<string, number>;
}

function byComponent(rows: Rows, table: string, name: string): ReadonlyMap<string, number> {
  const components = rows[table]?.["component"] as string[];
  return new Map(components.map((one, row) => [one, rows[table]?.[name]?.[row] as number]));
}

const CASES: readonly Case[] = [
  {
    id: "T2",
    fragment: "seq=T2",
    map: "steel",
    stored: () => byComponent(oracle("T2"), "weights", "rms"),
  },
  {
    id: "DTI",
    fragment: `seq=DTI&${QUESTION}`,
    map: "green-violet",
    stored: () => byComponent(oracle("DTI"), "effects", "effect"),
  },
  {
    id: "FLAIR",
    fragment: `seq=FLAIR&${QUESTION}`,
    map: "lesion",
    stored: () => {
      const nodes = oracle("FLAIR")["nodes"] ?? {};
      const z = (nodes["component"] as string[]).flatMap((one, row) => {
        if (nodes["quantity"]?.[row] !== "z") return [];
        return [[one, (nodes["value"]?.[row] as number[]).at(-1) ?? NaN] as const];
      });
      return new Map(z);
    },
  },
];

test.each(CASES)("$id: the corner says the stored float, the pixel is its colour", async (one) => {
  const open = await visit(browser, { fragment: one.fragment });
  const { page } = open;
  await take(page, one.id);
  const there = await address(page);
  let compared = 0;
  for (const [component, value] of one.stored()) {
    // A whole layer's attention has no node of its own; its heads show it.
    const whole = /^blocks\.\d+\.attn$/.test(component);
    if (Number.isNaN(value) || (whole && one.id !== "FLAIR") || compared >= 14) continue;
    await look(page, there, whole ? `${component}.head_2` : component);
    const said = await reading(page);
    expect(said.value, component).toBe(value);
    const corner = await page.getByTestId("corner-window").evaluate((e) => ({
      ...(e as HTMLElement).dataset,
    }));
    const window = { level: Number(corner["level"]), width: Number(corner["width"]) };
    const at = lutIndex(position(value, window, corner["scale"] as Scale)) * 3;
    expect((await pixel(page)).slice(0, 3), component).toEqual([...lut(one.map).slice(at, at + 3)]);
    compared++;
  }
  expect(compared).toBeGreaterThan(5);
  expect(await violations(page)).toEqual([]);
  expect(open.complaints).toEqual([]);
  // The address alone brings the same picture back, without another scan.
  await look(page, there, "blocks.1.mlp");
  await address(page);
  const before = [await reading(page), await pixel(page)];
  const posts = open.server.requests.filter((request) => request.startsWith("POST")).length;
  await page.reload();
  await page.locator(".status", { hasText: `${one.id} scan complete` }).waitFor();
  await drawn(page);
  expect([await reading(page), await pixel(page)]).toEqual(before);
  // T1 is asked for with every page.
  const again = open.server.requests.filter((request) => request.startsWith("POST")).length;
  expect(again).toBe(posts + 1);
  await leave(open);
});

test.each(["T2", "DTI", "FLAIR"])("axe finds nothing: %s, empty", async (id) => {
  const open = await visit(browser, { fragment: `seq=${id}` });
  await open.page.getByText(`No ${id} scan yet`).waitFor();
  expect(await violations(open.page)).toEqual([]);
  await leave(open);
});

test("DTI paints estimates first, then what was measured, then tracts", async () => {
  const open = await visit(browser, {
    fragment: `seq=DTI&${QUESTION}`,
    behaviour: { pause: 40 },
  });
  const { page } = open;
  await page.getByTestId("axial").waitFor();
  await page.keyboard.press("/");
  await page.keyboard.press("Enter");
  await page.locator(".corner", { hasText: "estimates" }).first().waitFor();
  await page.locator(".status", { hasText: "DTI scan complete" }).waitFor();
  await page.getByTestId("tract-share").waitFor();
  const painted = () =>
    page.getByTestId("tracts").evaluate((canvas) => {
      const own = canvas as HTMLCanvasElement;
      const { data } = own.getContext("2d")?.getImageData(0, 0, own.width, own.height) ?? {
        data: [],
      };
      let pixels = 0;
      for (let i = 3; i < data.length; i += 4) if ((data[i] ?? 0) > 0) pixels++;
      return pixels;
    });
  const many = await painted();
  const share = Number(await page.getByTestId("tract-share").getAttribute("data-share"));
  expect(share).toBeGreaterThan(0);
  const slider = page.getByRole("slider", { name: "Tracts" });
  await slider.focus();
  await page.keyboard.press("Home");
  await drawn(page);
  const fewer = Number(await page.getByTestId("tract-share").getAttribute("data-share"));
  expect(fewer).toBeLessThan(share);
  const few = await painted();
  expect(few).toBeGreaterThan(0);
  expect(few).toBeLessThan(many / 4);
  const asked = open.server.requests.filter((r) => r.startsWith("body")).at(-1) ?? "";
  expect(asked).toContain('"answer":" Paris"');
  expect(asked).toContain('"foil":" London"');
  await leave(open);
});

test("no key moves the middle of a diverging map off 0", async () => {
  const open = await visit(browser, { fragment: `seq=DTI&${QUESTION}` });
  const { page } = open;
  await take(page, "DTI");
  const corner = page.getByTestId("corner-window");
  const width = await corner.getAttribute("data-width");
  for (const key of ["=", "=", "="]) await page.keyboard.press(key);
  expect(await corner.getAttribute("data-level")).toBe("0");
  expect(await corner.getAttribute("data-width")).toBe(width);
  await page.keyboard.press("]");
  await expect.poll(() => corner.getAttribute("data-width")).not.toBe(width);
  expect(await corner.getAttribute("data-level")).toBe("0");
  await leave(open);
});

test("FLAIR says what each layer would answer, in step with the crosshair", async () => {
  const open = await visit(browser, { fragment: `seq=FLAIR&${QUESTION}` });
  const { page } = open;
  await take(page, "FLAIR");
  await page.locator('[data-testid=lens-word][data-row="30"]', { hasText: "Paris" }).waitFor();
  await page.keyboard.press("Home");
  await page.getByText("not measured at the first token").first().waitFor();
  expect((await reading(page)).value).toBeNaN();
  await page.keyboard.press("End");
  await page.keyboard.press("h");
  expect(await page.getByTestId("announcement").innerText()).toMatch(/ordinary σ, rank 1 of 60/);
  await leave(open);
});

test("FLAIR without sublayers shows and exports its lens, and says why the rest is empty", async () => {
  const open = await visit(browser, { fragment: `seq=FLAIR&${QUESTION}` });
  const { page } = open;
  await page.route("**/manifest", async (route) => {
    const response = await route.fetch();
    const manifest = (await response.json()) as { tables: { name: string }[] };
    const tables = manifest.tables.filter(({ name }) => name !== "nodes");
    await route.fulfill({ response, json: { ...manifest, tables } });
  });
  await take(page, "FLAIR");
  await page.getByText("This FLAIR scan was taken without").waitFor();
  await page.getByText("This scan has no values of single components.").waitFor();
  await page.locator('[data-testid=lens-word][data-row="30"]', { hasText: "Paris" }).waitFor();
  await page.getByTestId("axial").focus();
  await page.keyboard.press("Shift+E");
  const exported = page.getByRole("dialog").getByRole("button", { name: "SVG" });
  expect(await exported.first().isEnabled()).toBe(false);
  const [file] = await Promise.all([page.waitForEvent("download"), exported.last().click()]);
  expect(await readFile(await file.path(), "utf8")).toContain(">Logit lens<");
  await leave(open);
});

test("a matrix's histogram, and a head's singular values", async () => {
  const open = await visit(browser, { fragment: "seq=T2&focus=blocks.3.attn.head_2" });
  const { page } = open;
  await take(page, "T2");
  expect(open.server.requests.some((request) => request.endsWith("/histograms"))).toBe(false);
  await page.getByTestId("circuit-OV").waitFor();
  await page.getByRole("button", { name: "W_O" }).click();
  await page.getByTestId("histogram").waitFor();
  expect(await violations(page)).toEqual([]);
  await leave(open);
});

test("a component is stimulated by keyboard alone, compared, and let go", async () => {
  const open = await visit(browser, { fragment: `seq=fMRI&${QUESTION}` });
  const { page } = open;
  await take(page, "fMRI");
  await page.keyboard.press("h");
  const chosen = (await reading(page)).component;
  await page.keyboard.press("p");
  await page.getByTestId("stimuli").waitFor({ state: "detached" });
  await page.locator(":focus", { hasText: "Zero" }).waitFor();
  await page.keyboard.press("Enter");
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  expect(await page.getByTestId("stimuli").locator("li").count()).toBe(2);
  expect(await violations(page)).toEqual([]);
  await page.getByRole("button", { name: "Run" }).focus();
  await page.keyboard.press("Enter");
  await page.locator(".status", { hasText: "Stimulation complete" }).waitFor();
  const body =
    open.server.requests
      .filter((r) => r.startsWith("body"))
      .at(-1)
      ?.slice(5) ?? "";
  expect(JSON.parse(body)).toMatchObject({
    prompt: PROMPT,
    answer: " Paris",
    perturbations: [
      { operation: "zero", component: chosen },
      { operation: "amplify", component: chosen, factor: 2 },
    ],
  });
  const rows = oracle("perturbation");
  const metric = page.getByTestId("metric");
  expect(Number(await metric.getAttribute("data-after"))).toBe(
    rows["comparison"]?.["metric_after"]?.[0],
  );
  const component = "blocks.1.mlp";
  const row = rows["activations"]?.["component"]?.indexOf(component) ?? -1;
  const before = rows["activations"]?.["value"]?.[row] as number[];
  const after = rows["activations_after"]?.["value"]?.[row] as number[];
  await look(page, await address(page), component);
  expect((await reading(page)).value).toBe((after.at(-1) ?? NaN) - (before.at(-1) ?? NaN));
  await page.getByTestId("axial").focus();
  await page.keyboard.press("f");
  await page.keyboard.press("f");
  expect((await reading(page)).value).toBe(after.at(-1));
  expect(await violations(page)).toEqual([]);
  // What is only spoken, deep in the panel, makes the window scroll no more than what is seen.
  expect(
    await page.evaluate(() => document.documentElement.scrollHeight - window.innerHeight),
  ).toBe(0);
  // Two jobs stand in the address: the scan and the stimulation. Both come back.
  expect((await address(page)).getAll("job")).toHaveLength(2);
  await page.reload();
  await page.getByTestId("comparison").waitFor();
  await page.getByRole("button", { name: "Reset", exact: true }).click();
  await page.getByTestId("comparison").waitFor({ state: "detached" });
  expect(await page.getByTestId("corner-value").count()).toBe(1);
  await leave(open);
});

test("of a stimulation's two runs that one says the next token which is looked at", async () => {
  const { page, ...open } = await visit(browser, {
    fragment: `seq=fMRI&panel=stimulate&do=zero~blocks.1.mlp~~&${QUESTION}`,
  });
  await page.getByRole("button", { name: "Run" }).click();
  await page.locator(".status", { hasText: "Stimulation complete" }).waitFor();
  await page.getByRole("tab", { name: "Inspect" }).click();
  const next = page.getByRole("region", { name: "Next token" });
  const rows = oracle("perturbation");
  await page.getByTestId("axial").focus();
  for (const key of ["Home", ".", ".", "."]) await page.keyboard.press(key);
  /** The likeliest logits of a run after token 3. */
  const logits = (table: string) => {
    const { position = [], logit = [] } = rows[table] ?? {};
    return logit
      .filter((_, row) => position[row] === 3)
      .slice(0, 6)
      .map((each) => `logit ${(each as number).toFixed(3)}`);
  };
  const said = () =>
    next.locator("li").evaluateAll((all) => all.map((row) => (row as HTMLElement).title));
  expect(logits("predictions")).not.toEqual(logits("predictions_after"));
  for (const [picture, run, table] of [
    ["difference", "stimulated", "predictions_after"],
    ["change", "stimulated", "predictions_after"],
    ["after", "stimulated", "predictions_after"],
    ["before", "clean", "predictions"],
  ] as const) {
    await next.getByText(`· ${run}`).waitFor();
    expect(await said(), picture).toEqual(logits(table));
    await page.keyboard.press("f");
  }
  await leave({ page, ...open });
});

test("a fact is traced, and its map stands in the sagittal plane", async () => {
  const open = await visit(browser, { fragment: `seq=fMRI&panel=stimulate&${QUESTION}` });
  const { page } = open;
  await page.getByText("Name the words of the prompt").waitFor();
  await page.getByTestId("subject").fill("The Eiffel Tower");
  await page.keyboard.press("Enter");
  await page.getByText("Tracing…").waitFor();
  expect(await page.getByText("Patching…").count()).toBe(0);
  await page.locator(".status", { hasText: "Tracing complete" }).waitFor();
  await page.getByTestId("trace").waitFor();
  // There is no fMRI scan beside it, and nothing stands in front of the picture to say so.
  expect(await page.getByText("No fMRI scan yet").count()).toBe(0);
  const { width, height } = await page.getByTestId("sagittal-image").evaluate((canvas) => ({
    width: (canvas as HTMLCanvasElement).width,
    height: (canvas as HTMLCanvasElement).height,
  }));
  expect([width, height]).toEqual([10, 30]);
  const column = page.getByLabel("Sagittal column");
  expect(await column.inputValue()).toBe("resid_post");
  expect(await violations(page)).toEqual([]);
  // Whoever is given the address sees the same map.
  await page.waitForFunction(() => /job=.*cut=resid_post/.test(location.hash));
  await page.reload();
  await page.getByTestId("trace").waitFor();
  expect(await column.inputValue()).toBe("resid_post");
  // A trace has no heads of its own: at one its layer's attention is read.
  await column.selectOption("crosshair");
  await page.keyboard.press("Shift+h");
  await page.getByText("at crosshair: attention").waitFor({ state: "attached" });
  await leave(open);
});

test("going through all five by key moves no node, and what stands still asks for no frame", async () => {
  const open = await visit(browser, { fragment: `seq=DTI&${QUESTION}&focus=blocks.7.attn.head_1` });
  const { page } = open;
  await take(page, "DTI");
  for (const [key, id] of [
    ["5", "FLAIR"],
    ["3", "fMRI"],
    ["2", "T2"],
  ] as const) {
    await page.keyboard.press(key);
    await take(page, id);
  }
  const place = () =>
    page.getByTestId("crosshair").evaluate((c) => [c.getAttribute("cx"), c.getAttribute("cy")]);
  const before = await place();
  for (const key of ["1", "2", "3", "4", "5", "4"]) {
    await page.keyboard.press(key);
    await drawn(page);
    expect(await place()).toEqual(before);
  }
  // DTI's flow and FLAIR's pulse come to rest.
  await rested(page);
  const still = await counts(page);
  await page.waitForTimeout(1500);
  expect(await counts(page)).toEqual(still);
  expect(await page.evaluate(() => document.getAnimations().length)).toBe(0);
  await leave(open);
});
