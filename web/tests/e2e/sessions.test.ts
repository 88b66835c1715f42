import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

import type { Browser, BrowserContext, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";

import { PROMPT, drawn, launch, reading, scan, settled, violations } from "./browser";
import { serve, type Service } from "./service";

let browser: Browser;
let service: Service;
let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "neural-mri-sessions-"));
  [browser, service] = await Promise.all([launch(), serve()]);
});
afterAll(async () => {
  await browser.close();
  await service.close();
  await rm(folder, { recursive: true });
});

/** A person who was never here: no storage, no cookie. Every refusal of the page's own is a failure. */
async function stranger(): Promise<{ context: BrowserContext; page: Page; complaints: string[] }> {
  const context = await browser.newContext({ viewport: { width: 1280, height: 720 } });
  const page = await context.newPage();
  page.setDefaultTimeout(8000);
  const complaints: string[] = [];
  page.on("pageerror", (error) => complaints.push(error.message));
  return { context, page, complaints };
}

function go(page: Page, fragment = "", origin = service.origin): Promise<unknown> {
  return page.goto(`${origin}/${fragment === "" ? "" : `#${fragment}`}`);
}

/** Scans, looks somewhere in particular, notes it, marks it. */
async function work(page: Page, prompt = PROMPT, note = "It writes the city"): Promise<void> {
  await scan(page, prompt);
  await page.keyboard.press("h");
  await page.keyboard.press(",");
  await page.keyboard.press("k");
  await page.keyboard.press("y");
  await page.getByRole("textbox", { name: "New note" }).fill(note);
  await page.getByRole("button", { name: "Note it" }).click();
}

/** Saves under a name, and gives the session's id. */
async function save(page: Page, name: string): Promise<string> {
  await page.getByTestId("session-name").fill(name);
  await page.getByTestId("save-session").click();
  await told(page, "Saved as revision");
  await page.waitForFunction(() => location.hash.includes("session="));
  return idIn(page);
}

/** Waits until the panel says so. */
function told(page: Page, text: string): Promise<void> {
  return page.getByTestId("session-told").filter({ hasText: text }).waitFor();
}

function idIn(page: Page): string {
  return new URLSearchParams(new URL(page.url()).hash.slice(1)).get("session") ?? "";
}

async function listing(page: Page): Promise<void> {
  await page.getByTestId("open-session").click();
  await page.getByTestId("sessions").waitFor();
}

async function opened(page: Page): Promise<void> {
  await page.getByTestId("session-standing").waitFor({ state: "attached" });
  await settled(page);
}

/** A file let go over the window. */
async function drop(page: Page, path: string): Promise<void> {
  const bytes = (await readFile(path)).toString("base64");
  const transfer = await page.evaluateHandle((text) => {
    const dropped = new DataTransfer();
    const body = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    dropped.items.add(new File([body], "dropped.nmri"));
    return dropped;
  }, bytes);
  await page.dispatchEvent("body", "drop", { dataTransfer: transfer });
}

async function notes(page: Page): Promise<string[]> {
  const fields = page.getByTestId("session-notes").locator("textarea");
  return fields.evaluateAll((all) => all.map((field) => (field as HTMLTextAreaElement).value));
}

test("saved, forgotten and opened by its ID: complete in three requests, and no worker lives", async () => {
  const first = await stranger();
  await go(first.page);
  await work(first.page);
  const id = await save(first.page, "Eiffel");
  expect(await first.page.getByTestId("open-session").innerText()).toContain("Eiffel");
  expect(await first.page.getByTestId("unsaved").count()).toBe(0);
  await first.page.getByTestId("axial").focus();
  const seen = await reading(first.page);
  await first.context.close();

  await service.worker("off");
  const second = await stranger();
  let asked = 0;
  const answered: string[] = [];
  await second.page.route("**/api/**", (route) => {
    if (++asked > 3) return route.abort();
    answered.push(new URL(route.request().url()).pathname);
    return route.continue();
  });
  await go(second.page, `session=${id}`);
  await opened(second.page);
  await drawn(second.page);
  expect(await reading(second.page)).toEqual(seen);
  for (const sequence of ["T1", "fMRI"]) {
    await second.page.locator(`#tab-${sequence} .ready`).waitFor();
  }
  expect(await notes(second.page)).toEqual(["It writes the city"]);
  expect(await second.page.getByTestId("images").locator("li").count()).toBe(1);
  expect(await second.page.getByTestId("session-name").inputValue()).toBe("Eiffel");
  expect(await second.page.getByTestId("unsaved").count()).toBe(0);
  expect(answered.slice(0, 2).sort()).toEqual([
    `/api/sessions/${id}`,
    `/api/sessions/${id}/export`,
  ]);
  await second.page.getByRole("button", { name: /Show key image 1/ }).click();
  expect(second.complaints).toEqual([]);
  await second.context.close();
  await service.worker("on");
});

test("what a program saved, and nobody has looked at, opens at its last token", async () => {
  const { context, page } = await stranger();
  await go(page);
  await scan(page);
  const seen = await reading(page);
  await page.waitForFunction(() => location.hash.includes("job="));
  const job = new URLSearchParams(await page.evaluate(() => location.hash.slice(1))).get("job");
  const made = await page.request.post(`${service.origin}/api/sessions`, {
    data: { name: "From a script", scans: [{ job }] },
  });
  expect(made.status(), await made.text()).toBe(201);
  const { id } = (await made.json()) as { id: string };
  await go(page, `session=${id}`);
  await page.reload();
  await page.getByTestId("open-session").filter({ hasText: "From a script" }).waitFor();
  await settled(page);
  expect(seen.column).toBeGreaterThan(0);
  expect(await reading(page)).toEqual(seen);
  await context.close();
});

test("an address with an open session in it shows the same again, unsaved notes among it", async () => {
  const { context, page } = await stranger();
  await go(page);
  await work(page);
  await save(page, "To be continued");
  await page.keyboard.press("y");
  await page.getByRole("textbox", { name: "New note" }).fill("not saved");
  await page.getByRole("button", { name: "Note it" }).click();
  await page.getByTestId("unsaved").waitFor();
  await page.getByTestId("axial").focus();
  await page.keyboard.press("ArrowUp");
  const seen = await reading(page);
  await page.waitForFunction(
    (at) => location.hash.includes(encodeURIComponent(at)),
    seen.component,
  );
  await page.reload();
  await opened(page);
  expect(await reading(page)).toEqual(seen);
  expect(await notes(page)).toEqual(["It writes the city", "not saved"]);
  await page.getByTestId("unsaved").waitFor();
  await context.close();
});

test("who saves over another's save is told, and keeps what is theirs as a fork", async () => {
  const { context, page } = await stranger();
  await go(page);
  await work(page);
  const id = await save(page, "Disputed");
  const other = await stranger();
  await go(other.page, `session=${id}`);
  await opened(other.page);
  for (const [who, text] of [
    [page, "mine"],
    [other.page, "theirs"],
  ] as const) {
    await who.keyboard.press("y");
    await who.getByRole("textbox", { name: "New note" }).fill(text);
    await who.getByRole("button", { name: "Note it" }).click();
  }
  await other.page.getByTestId("save-session").click();
  await told(other.page, "Saved as revision 2.");
  await page.getByTestId("save-session").click();
  const conflict = page.getByTestId("session-conflict");
  await conflict.waitFor();
  expect(await conflict.innerText()).toMatch(/saved revision 2 meanwhile/);
  expect(await violations(page)).toEqual([]);
  await conflict.getByRole("button", { name: "Keep mine as a fork" }).click();
  await told(page, "Saved as revision 2");
  await page.waitForFunction((old) => !location.hash.includes(old), id);
  expect(await notes(page)).toEqual(["It writes the city", "mine"]);
  await go(other.page, `session=${idIn(page)}`);
  await opened(other.page);
  await told(other.page, "Opened “Disputed”.");
  expect(await notes(other.page)).toEqual(["It writes the city", "mine"]);
  await Promise.all([context.close(), other.context.close()]);
});

test("scans of somebody else in the same session arrive", async () => {
  const { context, page } = await stranger();
  await go(page);
  await work(page);
  const id = await save(page, "Together");
  const other = await stranger();
  await go(other.page, `session=${id}`);
  await opened(other.page);
  await other.page.getByRole("tab", { name: "Session" }).click();
  await other.page.getByRole("checkbox", { name: "My scans join it as they finish" }).check();
  await scan(other.page, "Rome is the capital of");
  const list = page.getByTestId("session-scans");
  await list.getByText("“Rome is the capital of”").waitFor();
  await list.getByText("arrived").waitFor();
  // Who took it has it once, and nothing left to save.
  const own = other.page.getByTestId("session-scans");
  await own.getByText("arrived").waitFor();
  expect(await own.getByText("“Rome is the capital of”").count()).toBe(1);
  expect(await other.page.getByTestId("unsaved").count()).toBe(0);
  expect(await page.getByTestId("unsaved").count()).toBe(0);
  const row = list.locator("li", { hasText: "Rome" });
  await row.getByRole("button", { name: /^Show scan/ }).click();
  await page.locator(".corner", { hasText: "Rome is the capital of" }).first().waitFor();
  await Promise.all([context.close(), other.context.close()]);
});

test("a file opens without a service, and comes back from it byte for byte", async () => {
  const { context, page } = await stranger();
  await go(page);
  await work(page);
  await save(page, "On the road");
  await page.getByTestId("axial").focus();
  const seen = await reading(page);
  const path = join(folder, "road.nmri");
  const exported = async () => {
    const [file] = await Promise.all([
      page.waitForEvent("download"),
      page.getByRole("button", { name: ".nmri" }).click(),
    ]);
    expect(file.suggestedFilename()).toBe("On-the-road.nmri");
    await file.saveAs(path);
    return readFile(path);
  };
  const bytes = await exported();
  await context.close();

  const away = await stranger();
  await away.page.route("**/api/**", (route) => route.abort());
  await go(away.page);
  await away.page.getByText("The service cannot be reached").first().waitFor();
  await listing(away.page);
  await away.page.getByTestId("nmri").setInputFiles(path);
  await away.page.getByTestId("sessions").waitFor({ state: "detached" });
  await opened(away.page);
  await drawn(away.page);
  expect(await reading(away.page)).toEqual(seen);
  expect(await away.page.getByTestId("session-standing").innerText()).toContain("road.nmri");
  expect(await away.page.getByTestId("session-notes").innerText()).toContain("It writes the city");
  expect(await violations(away.page)).toEqual([]);
  // A part that was changed on the way is named, and what is open stays.
  const broken = Buffer.from(bytes);
  const at = broken.indexOf("ARROW1") + 200;
  broken[at] = (broken[at] ?? 0) ^ 1;
  await writeFile(join(folder, "broken.nmri"), broken);
  await drop(away.page, join(folder, "broken.nmri"));
  await away.page
    .getByTestId("session-problem")
    .filter({ hasText: /The file was not opened\. chunks\/[0-9a-f]{64}\.arrow is damaged/ })
    .waitFor();
  expect(await reading(away.page)).toEqual(seen);
  // With the service there again it is taken in, and is the same.
  await away.page.unroute("**/api/**");
  await away.page.getByTestId("fork-session").click();
  await away.page.waitForFunction(() => location.hash.includes("session="));
  const [file] = await Promise.all([
    away.page.waitForEvent("download"),
    away.page.getByRole("button", { name: ".nmri" }).click(),
  ]);
  await file.saveAs(path);
  expect(Buffer.compare(await readFile(path), bytes)).toBe(0);
  await away.context.close();
});

test("two sessions hang beside each other, and what differs is listed", async () => {
  const { context, page } = await stranger();
  await go(page);
  await scan(page);
  await page.keyboard.press("j");
  await save(page, "Before");
  await page.getByRole("button", { name: "Close it" }).click();
  await scan(page, "Rome is the capital of");
  await page.keyboard.press("j");
  await save(page, "After");
  await listing(page);
  await page.getByRole("button", { name: "Compare with “Before”" }).first().click();
  await page.getByTestId("compare").waitFor();
  await page.getByTestId("corner-value-prior").waitFor();
  const difference = page.getByTestId("session-difference");
  await difference.getByText("changed").waitFor();
  expect(await difference.innerText()).toContain(`prompt: “${PROMPT}” → “Rome is the capital of”`);
  const value = async (side: string) =>
    Number(await page.getByTestId(`corner-value-${side}`).getAttribute("data-value"));
  const lies = (await value("current")) - (await value("prior"));
  expect(await value("difference")).toBeCloseTo(lies, 5);
  expect(await page.getByTestId("unsaved").count()).toBe(0);
  expect(await violations(page)).toEqual([]);
  await context.close();
});

test("sessions are found, pinned, renamed, forked and deleted, by key", async () => {
  const { context, page } = await stranger();
  await go(page);
  await scan(page, "Lisbon is the capital of");
  await page.keyboard.press("u");
  await told(page, "Saved as revision 1.");
  await page.getByTestId("axial").focus();
  await page.keyboard.press("Shift+S");
  const dialog = page.getByTestId("sessions");
  await dialog.waitFor();
  await page.keyboard.type("lisbon");
  const rows = dialog.getByTestId("session-list").locator("li[data-id]");
  await expect.poll(() => rows.count()).toBe(1);
  expect(await rows.first().innerText()).toContain("Lisbon is the capital of");
  expect(await violations(page)).toEqual([]);
  await dialog.getByRole("button", { name: /^Pin/ }).press("Enter");
  await dialog.getByRole("button", { name: /^Pin/, pressed: true }).waitFor();
  await dialog.getByRole("button", { name: /^Rename/ }).press("Enter");
  await page.keyboard.type("Lisbon, looked at again");
  await page.keyboard.press("Enter");
  await dialog.getByRole("button", { name: "Lisbon, looked at again", exact: true }).waitFor();
  await dialog.getByRole("button", { name: /^Fork/ }).press("Enter");
  await expect.poll(() => rows.count()).toBe(2);
  await dialog
    .getByRole("button", { name: /^Delete/ })
    .last()
    .press("Enter");
  await dialog.getByRole("button", { name: "Delete", exact: true }).press("Enter");
  await expect.poll(() => rows.count()).toBe(1);
  await dialog.getByTestId("find").fill("nothing has this word");
  await dialog.getByText("No session has all of these words").waitFor();
  await page.keyboard.press("Escape");
  await dialog.waitFor({ state: "detached" });
  await context.close();
});

test("an older revision opens as it was, and can be the latest again", async () => {
  const { context, page } = await stranger();
  await go(page);
  await work(page, PROMPT, "first");
  await save(page, "With a past");
  await page.getByRole("textbox", { name: "New note" }).fill("second");
  await page.getByRole("button", { name: "Note it" }).click();
  await page.keyboard.press("Escape");
  await page.getByTestId("save-session").click();
  await told(page, "Saved as revision 2.");
  await page.getByText("History", { exact: true }).click();
  const revisions = page.getByTestId("revisions").locator("li");
  await expect.poll(() => revisions.count()).toBe(2);
  await revisions.nth(1).getByRole("button").click();
  await page.getByText("An older revision than the latest").waitFor();
  await expect.poll(() => notes(page)).toEqual(["first"]);
  await page.getByRole("button", { name: "Save as the latest" }).click();
  await told(page, "Saved as revision 3.");
  expect(await notes(page)).toEqual(["first"]);
  await context.close();
});

test("what is not saved is asked about before another session is opened", async () => {
  const { context, page } = await stranger();
  await go(page);
  await work(page);
  const id = await save(page, "First");
  await page.getByRole("textbox", { name: "New note" }).fill("unsaved");
  await page.getByRole("button", { name: "Note it" }).click();
  await listing(page);
  await page.getByTestId("session-id").fill(`${service.origin}/#session=${id}`);
  await page.keyboard.press("Enter");
  await page.getByTestId("unsaved-question").waitFor();
  await page.getByRole("button", { name: "Save it first" }).click();
  await page.getByTestId("sessions").waitFor({ state: "detached" });
  await told(page, "Opened “First”.");
  expect(await notes(page)).toEqual(["It writes the city", "unsaved"]);
  await context.close();
});

test("neither a second click nor another address throws away what is not saved", async () => {
  const { context, page } = await stranger();
  await go(page);
  await work(page);
  const first = await save(page, "First");
  await page.getByRole("button", { name: "Close it" }).click();
  await page.waitForFunction(() => !location.hash.includes("session="));
  const second = await save(page, "Second");
  await page.getByRole("textbox", { name: "New note" }).fill("unsaved");
  await page.getByRole("button", { name: "Note it" }).click();
  await listing(page);
  const name = page.getByTestId("session-list").locator(`li[data-id="${first}"] .name`);
  await name.click();
  const question = page.getByTestId("unsaved-question");
  await question.waitFor();
  await name.click();
  await drawn(page);
  await question.getByRole("button", { name: "Stay" }).click();
  await page.keyboard.press("Escape");
  await page.getByTestId("sessions").waitFor({ state: "detached" });
  expect(await notes(page)).toEqual(["unsaved"]);

  for (const elsewhere of [`session=${first}`, "seq=T1"]) {
    await page.evaluate((fragment) => (location.hash = fragment), elsewhere);
    await question.waitFor();
    await page.waitForFunction((id) => location.hash.includes(id), second);
    await page.keyboard.press("Escape");
    await page.getByTestId("sessions").waitFor({ state: "detached" });
    expect(await notes(page)).toEqual(["unsaved"]);
  }
  // The address goes along with what is looked at, as before.
  await page.getByTestId("axial").focus();
  await page.keyboard.press("2");
  await page.waitForFunction(() => location.hash.includes("seq=T2"));
  await page.evaluate((fragment) => (location.hash = fragment), `session=${first}`);
  await question.getByRole("button", { name: "Open without saving" }).click();
  await page.getByTestId("sessions").waitFor({ state: "detached" });
  await page.waitForFunction((id) => location.hash.includes(id), first);
  expect(await notes(page)).toEqual(["It writes the city"]);
  await context.close();
});

test("an ID that is none, or nobody's, is told in words", async () => {
  const { context, page } = await stranger();
  const nobodys = "01a208e5-620a-7f6d-98da-3f510d18b436";
  await go(page, `session=${nobodys}`);
  await page
    .getByTestId("session-problem")
    .filter({ hasText: `There is no session ${nobodys} of yours` })
    .waitFor();
  await settled(page);
  await go(page, "shared=AAAAAAAAAAAAAAAAAAAAAA");
  await page
    .getByTestId("session-problem")
    .filter({ hasText: "This link leads nowhere" })
    .waitFor();
  await listing(page);
  await page.getByTestId("session-id").fill("my session");
  await page.keyboard.press("Enter");
  await page
    .getByRole("alert")
    .filter({ hasText: "“my session” is no session's ID" })
    .first()
    .waitFor();
  await context.close();
});

test("nothing is cut off at 1280 by 720: the tabs, the open session's name, the panel", async () => {
  const { context, page } = await stranger();
  await go(page);
  await work(page);
  await save(page, "A name that is much longer than the window has any room for, as names are");
  for (const language of ["en", "ko"]) {
    if (language === "ko") await page.getByRole("button", { name: "한국어" }).click();
    const cut = await page.evaluate(() => {
      const wide = ["header", "aside .tabs", "aside .panel", "[data-testid=session]"];
      return wide.filter((selector) => {
        const element = document.querySelector(selector);
        return element === null || element.scrollWidth > element.clientWidth;
      });
    });
    expect(cut, language).toEqual([]);
    const { right } = await page
      .locator(".app > header > :last-child")
      .evaluate((element) => element.getBoundingClientRect());
    expect(right).toBeLessThanOrEqual(1280);
  }
  await context.close();
});

test("a link shows the session to who has no key, and a copy takes one", async () => {
  const closed = await serve("--keys");
  try {
    const { context, page } = await stranger();
    await go(page, "", closed.origin);
    const key = await closed.key("ada");
    await page.getByLabel("API key").fill(key);
    await page.keyboard.press("Enter");
    await work(page);
    await save(page, "For the eyes of others");
    await page.getByText("Share", { exact: true }).click();
    const links: string[] = [];
    const made = async () => {
      await page.getByTestId("make-link").click();
      await expect.poll(() => page.getByTestId("link").inputValue()).not.toBe(links.at(-1) ?? "");
      links.push(await page.getByTestId("link").inputValue());
    };
    await page.getByLabel("Allows to").selectOption("fork");
    await page.getByTestId("make-link").click();
    await page.getByTestId("link").waitFor();
    links.push(await page.getByTestId("link").inputValue());
    await page.getByLabel("Take prompts out").check();
    await made();
    expect(await violations(page)).toEqual([]);

    const [link = "", redacted = ""] = links;
    const guest = await stranger();
    await guest.page.goto(link);
    await opened(guest.page);
    expect(await guest.page.getByTestId("login").count()).toBe(0);
    await guest.page.locator(".corner", { hasText: PROMPT }).first().waitFor();
    await guest.page.getByRole("tab", { name: "Session" }).click();
    expect(await guest.page.getByTestId("save-session").count()).toBe(0);
    expect(await guest.page.getByTestId("session-notes").innerText()).toContain("the city");
    await guest.page.getByTestId("fork-session").click();
    await guest.page.getByLabel("API key").fill(await closed.key("grace"));
    await guest.page.keyboard.press("Enter");
    await guest.page.getByTestId("login").waitFor({ state: "detached" });
    await guest.page.getByTestId("fork-session").click();
    await guest.page.waitForFunction(() => location.hash.includes("session="));
    await guest.page.getByTestId("save-session").waitFor();
    await guest.context.close();

    const blind = await stranger();
    await blind.page.goto(redacted);
    await opened(blind.page);
    await blind.page.getByText("prompts taken out").waitFor({ state: "attached" });
    expect(await blind.page.content()).not.toContain("Eiffel");
    await blind.context.close();

    const revoke = page.getByTestId("links").getByRole("button", { name: /^Revoke/ });
    await revoke.first().click();
    await expect.poll(() => revoke.count()).toBe(1);
    const late = await stranger();
    await late.page.goto(redacted);
    await late.page
      .getByTestId("session-problem")
      .filter({ hasText: "This link leads nowhere" })
      .waitFor();
    await late.context.close();
    await context.close();
  } finally {
    await closed.close();
  }
});
