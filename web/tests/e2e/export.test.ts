import { mkdtemp, readFile, rm, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";

import { bytes } from "../unit/fixtures";
import { FRAMES, launch, leave, reading, scan, settled, visit } from "./browser";

let browser: Browser;
let folder: string;
beforeAll(async () => {
  browser = await launch();
  folder = await mkdtemp(join(tmpdir(), "neural-mri-export-"));
});
afterAll(async () => {
  await browser.close();
  await rm(folder, { recursive: true });
});

/** Opens the export, presses one of its buttons and returns the file's path. */
async function exported(page: Page, button: string, nth = 0): Promise<string> {
  if ((await page.getByRole("dialog").count()) === 0) {
    await page.getByTestId(/^axial(-current)?$/).focus();
    await page.keyboard.press("Shift+E");
  }
  const control = page
    .getByRole("dialog")
    .getByRole("button", { name: button, exact: true })
    .nth(nth);
  const [file] = await Promise.all([page.waitForEvent("download"), control.click()]);
  const path = join(folder, file.suggestedFilename());
  await file.saveAs(path);
  return path;
}

/** The address, once it names a scan. */
async function fragment(page: Page): Promise<string> {
  await page.waitForFunction(() => location.hash.includes("job="));
  return new URL(page.url()).hash.slice(1);
}

test("a figure is vectors with axes, legend, names and how it was taken", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  const svg = await readFile(await exported(page, "SVG"), "utf8");
  // The viewer's own page makes no document of a text; a blank one may.
  const blank = await browser.newPage();
  const parsed = await blank.evaluate((text) => {
    const { documentElement: root } = new DOMParser().parseFromString(text, "image/svg+xml");
    return {
      name: root.nodeName,
      circles: root.querySelectorAll("circle").length,
      texts: [...root.querySelectorAll("text")].map((element) => element.textContent),
      images: root.querySelectorAll("image").length,
      sizes: [...root.querySelectorAll("text")].map((element) =>
        Number(element.getAttribute("font-size")),
      ),
    };
  }, svg);
  await blank.close();
  expect(parsed.name).toBe("svg");
  expect(parsed.images).toBe(0);
  expect(parsed.circles).toBeGreaterThanOrEqual(302);
  for (const said of ["fMRI · Activity", "L2 norm (log)", "E", "U", "H0", "29"]) {
    expect(parsed.texts).toContain(said);
  }
  expect(Math.min(...parsed.sizes)).toBeGreaterThanOrEqual(10);
  const pixels = await readFile(await exported(page, "PNG"));
  expect(pixels.subarray(1, 4).toString()).toBe("PNG");
  const [, width = ""] = /width="([\d.]+)"/.exec(svg) ?? [];
  expect(pixels.readUInt32BE(16)).toBe(2 * Math.round(Number(width)));
  await leave(open);
});

test("data leave as they came: Arrow byte for byte, rows with every digit", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  const arrow = await readFile(await exported(page, "activations.arrow"));
  expect(Buffer.compare(arrow, Buffer.from(bytes("activations")))).toBe(0);
  const rows = (await readFile(await exported(page, "CSV"), "utf8")).trimEnd().split("\r\n");
  const [, ...values] = rows.map((row) => row.split(","));
  expect(values).toHaveLength(Object.keys(FRAMES.values).length * FRAMES.texts.length);
  for (const row of values) {
    const value = FRAMES.values[row[0] ?? ""]?.[Number(row[4])];
    expect(Number(row.at(-2))).toBe(value);
  }
  await leave(open);
});

test("a cine leaves as a film of WebM", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await page.getByRole("spinbutton").first().fill("20");
  await page.getByRole("spinbutton").first().press("Tab");
  const film = await readFile(await exported(page, "WebM"));
  // EBML's magic number, then the name of the one kind of document it is here.
  expect(film.subarray(0, 4).toString("hex")).toBe("1a45dfa3");
  expect(film.subarray(0, 64).toString("latin1")).toContain("webm");
  const seen = await page.evaluate(async (base64) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const bitmap = new Blob([bytes], { type: "video/webm" });
    return bitmap.size;
  }, film.toString("base64"));
  expect(seen).toBeGreaterThan(10_000);
  await leave(open);
});

/** The first frame of a film: its size, and how far from the right edge its head's words end. */
async function firstFrame(path: string) {
  const blank = await browser.newPage();
  const film = `data:video/webm;base64,${(await readFile(path)).toString("base64")}`;
  const found = await blank.evaluate(async (source) => {
    const video = Object.assign(document.createElement("video"), { src: source, muted: true });
    await new Promise((resolve) => video.addEventListener("loadeddata", resolve));
    const { videoWidth: width, videoHeight: height } = video;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const brush = canvas.getContext("2d");
    brush?.drawImage(video, 0, 0);
    const head = brush?.getImageData(0, 0, width, 30).data ?? [];
    let right = 0;
    for (let at = 0; at < head.length; at += 4) {
      if ((head[at] ?? 0) > 90) right = Math.max(right, (at / 4) % width);
    }
    return { width, height, room: width - right };
  }, film);
  await blank.close();
  return found;
}

test("a film's words end before its edge, however long the prompt is", async () => {
  const filmed = async (prompt: string) => {
    const open = await visit(browser);
    const { page } = open;
    await scan(page, prompt);
    await page.getByRole("spinbutton").first().fill("20");
    await page.getByRole("spinbutton").first().press("Tab");
    const frame = await firstFrame(await exported(page, "WebM"));
    await leave(open);
    return frame;
  };
  const short = await filmed("One two three");
  const long = await filmed("One two three four five six seven eight ".repeat(5));
  expect(long.width).toBe(short.width);
  // One more line of the prompt, and none of them over the picture.
  expect(long.height).toBe(short.height + 18);
  expect(long.room).toBeGreaterThan(8);
});

test("a film that is stopped is no failure", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await page.keyboard.press("Shift+E");
  const dialog = page.getByRole("dialog");
  await dialog.getByRole("button", { name: "WebM" }).click();
  await dialog.getByRole("button", { name: "Stop", exact: true }).first().click();
  await dialog.getByRole("button", { name: "WebM" }).waitFor();
  await expect.poll(() => dialog.getByRole("button", { name: "WebM" }).isEnabled()).toBe(true);
  expect(await dialog.getByRole("alert").count()).toBe(0);
  await leave(open);
});

test("one page opens from a disk without a network, and is the same again when it comes back", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await page.keyboard.press("Home");
  await page.keyboard.press("h");
  const before = await reading(page);
  const path = await exported(page, "HTML");
  const told = await page.getByTestId("export-told").innerText();
  const [, hash = ""] = /State ([0-9a-f]{16})/.exec(told) ?? [];
  expect(hash).not.toBe("");

  const away = await browser.newContext({ offline: true });
  const saved = await away.newPage();
  const asked: string[] = [];
  const complaints: string[] = [];
  saved.on("request", (request) => asked.push(request.url()));
  saved.on("pageerror", (error) => complaints.push(error.message));
  saved.on("console", (message) => {
    if (message.type() === "error") complaints.push(message.text());
  });
  await saved.goto(pathToFileURL(path).href);
  await settled(saved);
  await saved.getByTestId("chip").first().waitFor();
  expect(await reading(saved)).toEqual(before);
  await saved.getByTestId("axial").focus();
  await saved.keyboard.press("Shift+E");
  const known = saved.getByTestId("state-hash");
  expect(await known.getAttribute("data-hash")).toMatch(new RegExp(`^${hash}`));
  // It is alive: another view of it is another state.
  await saved.keyboard.press("Escape");
  await saved.getByRole("dialog").waitFor({ state: "hidden" });
  await saved.getByTestId("axial").focus();
  await saved.keyboard.press(".");
  await expect.poll(async () => (await reading(saved)).column).toBe(before.column + 1);
  await saved.keyboard.press("Shift+E");
  expect(await known.getAttribute("data-hash")).not.toMatch(new RegExp(`^${hash}`));
  expect(asked).toEqual([pathToFileURL(path).href]);
  expect(complaints).toEqual([]);
  await away.close();

  // Back in another viewer, the same.
  const other = await visit(browser);
  await settled(other.page);
  await other.page.getByTestId("axial").focus();
  await other.page.keyboard.press("Shift+E");
  await other.page.locator("input[type=file]").setInputFiles(path);
  await other.page.getByTestId("chip").first().waitFor();
  expect(await reading(other.page)).toEqual(before);
  await other.page.getByTestId("axial").focus();
  await other.page.keyboard.press("Shift+E");
  const again = await other.page.getByTestId("state-hash").getAttribute("data-hash");
  expect(again).toMatch(new RegExp(`^${hash}`));
  await leave(other);

  const { size } = await stat(path);
  const data = size - (await stat(new URL("../../dist/page.html", import.meta.url))).size;
  expect(size - data).toBeLessThanOrEqual(150_000);
  await leave(open);
});

test("what hangs beside the picture is saved with it", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await page.getByTestId("protocol").selectOption("prior");
  await page.getByTestId("prior-prompt").fill("The Big Ben is in the city of");
  await page.getByRole("button", { name: "Scan the prior" }).click();
  const prior = (on: Page) =>
    on
      .getByTestId("corner-value-prior")
      .evaluate((corner) => ({ ...(corner as HTMLElement).dataset }));
  // It is shown while it comes in; what is saved is whole.
  await page.getByRole("button", { name: "Scanning…" }).waitFor();
  await page.getByRole("button", { name: "Scan the prior" }).waitFor();
  await page.getByTestId("corner-value-difference").waitFor();
  const before = await prior(page);
  const path = await exported(page, "HTML");

  const away = await browser.newContext({ offline: true });
  const saved = await away.newPage();
  await saved.goto(pathToFileURL(path).href);
  await saved.getByTestId("corner-value-difference").waitFor();
  await expect.poll(() => prior(saved), { timeout: 10_000 }).toEqual(before);
  await away.close();
  await leave(open);
});

test("while a scan runs, a page is saved of what stands", async () => {
  const open = await visit(browser);
  const { page, server } = open;
  await scan(page);
  const [stands] = new URLSearchParams(await fragment(page)).getAll("job");
  // It never ends; the service has no result of it, and says so.
  server.behaviour.place = 1;
  await page.getByTestId("protocol").selectOption("prior");
  await page.getByTestId("prior-prompt").fill("The Big Ben is in the city of");
  await page.getByRole("button", { name: "Scan the prior" }).click();
  await page.locator("#tab-DTI").click();
  await page.fill("#prompt", "One two three");
  await page.press("#prompt", "Enter");
  await page.getByTestId("status").filter({ hasText: "queued, place 1" }).waitFor();
  await page.waitForFunction(() => /job=.*&job=.*prior\.job=/.test(location.hash));
  const fields = new URLSearchParams(await fragment(page));
  const running = [...fields.getAll("job"), ...fields.getAll("prior.job")];
  running.splice(running.indexOf(stands ?? ""), 1);
  expect(running).toHaveLength(2);
  for (const job of running) {
    await page.route(`**/api/jobs/${job}/manifest`, (route) =>
      route.fulfill({ status: 409, json: { title: "No result yet", status: 409 } }),
    );
  }
  const path = await exported(page, "HTML");
  await page
    .getByTestId("export-told")
    .filter({ hasText: "What still runs is not in it." })
    .waitFor();

  const away = await browser.newContext({ offline: true });
  const saved = await away.newPage();
  await saved.goto(pathToFileURL(path).href);
  await saved.getByRole("tab", { name: /^fMRI/ }).click();
  await saved.getByTestId("corner-value-current").waitFor();
  expect(new URLSearchParams(await fragment(saved)).getAll("job")).toEqual([stands]);
  expect(await saved.getByTestId("problem").count()).toBe(0);
  await away.close();
  await leave(open);
});

test("what is not a saved page is refused in words", async () => {
  const open = await visit(browser);
  const { page } = open;
  await settled(page);
  await page.getByTestId("axial").focus();
  await page.keyboard.press("Shift+E");
  await page.locator("input[type=file]").setInputFiles({
    name: "other.html",
    mimeType: "text/html",
    buffer: Buffer.from("<p>something else</p>"),
  });
  await page.getByText("not a page that was saved here").waitFor();
  await leave(open);
});

test("an exploration is recorded, and played as it was", async () => {
  const open = await visit(browser);
  const { page } = open;
  await scan(page);
  await page.keyboard.press("Shift+E");
  await page.getByRole("button", { name: "Record", exact: true }).click();
  await page.getByTestId("axial").focus();
  for (const key of ["Home", "h", "."]) {
    await page.keyboard.press(key);
    await page.waitForTimeout(80);
  }
  const last = await reading(page);
  await page.keyboard.press("Shift+E");
  await page.getByRole("button", { name: "Stop", exact: true }).click();
  await page.keyboard.press("Escape");
  await page.getByRole("dialog").waitFor({ state: "hidden" });
  // A dialog that closes gives the focus back in its own time.
  const gone = async () => {
    await page.getByTestId("axial").focus();
    await page.keyboard.press("End");
    return reading(page);
  };
  await expect.poll(gone, { timeout: 10_000 }).not.toEqual(last);
  await page.keyboard.press("Shift+E");
  await page.getByRole("button", { name: "Play", exact: true }).click();
  await expect.poll(() => reading(page), { timeout: 10_000 }).toEqual(last);
  await leave(open);
});

test("a stranger finds the head that moves Paris most in at most five actions", async () => {
  const open = await visit(browser);
  const { page } = open;
  await settled(page);
  let actions = 0;
  const press = async (name: string) => {
    actions++;
    await page.getByRole("button", { name, exact: true }).click();
  };
  await press("Tour");
  for (let stage = 0; stage < 3; stage++) {
    await page.getByTestId("tour").getByRole("button", { name: "Next" }).waitFor();
    await press("Next");
  }
  await page.getByTestId("tour-text").filter({ hasText: "Of all heads" }).waitFor();
  expect(actions).toBeLessThanOrEqual(5);
  const { component, value } = await reading(page);
  expect(component).toMatch(/head_\d+$/);
  await page.keyboard.press("t");
  await page.getByRole("table").waitFor();
  const heads = await page
    .locator("tbody tr[data-component*=head]")
    .evaluateAll((rows) => rows.map((row) => Number((row as HTMLElement).dataset["value"])));
  expect(Math.abs(value)).toBe(Math.max(...heads.map(Math.abs)));
  await leave(open);
});
