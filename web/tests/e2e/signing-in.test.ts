/** Who somebody is, told to the real service by keys that its own command line makes. */
import { execFile } from "node:child_process";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import type { Browser, BrowserContext, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";

import { PROMPT, launch, scan, settled } from "./browser";
import { serve, type Service } from "./service";

const ROOT = fileURLToPath(new URL("../../..", import.meta.url));

let browser: Browser;
let service: Service;
beforeAll(async () => {
  [browser, service] = await Promise.all([launch(), serve("--keys")]);
});
afterAll(async () => {
  await browser.close();
  await service.close();
});

interface Made {
  readonly id: string;
  readonly key: string;
}

/** What `neural-mri keys` prints, asked by the holder of a key. */
async function keys(holder: string, ...words: readonly string[]): Promise<Made> {
  const { stdout } = await promisify(execFile)(
    join(ROOT, ".venv/bin/neural-mri"),
    ["keys", ...words, "--json", "--url", service.origin],
    { cwd: ROOT, env: { ...process.env, NMRI_API_KEY: holder } },
  );
  return JSON.parse(stdout) as Made;
}

interface Visitor {
  readonly context: BrowserContext;
  readonly page: Page;
}

async function visitor(fragment = ""): Promise<Visitor> {
  const context = await browser.newContext({ viewport: { width: 1280, height: 720 } });
  const page = await context.newPage();
  page.setDefaultTimeout(15_000);
  await page.goto(`${service.origin}/${fragment}`);
  return { context, page };
}

async function sign(page: Page, key: string): Promise<void> {
  await page.getByLabel("API key").fill(key);
  await page.keyboard.press("Enter");
}

/** Whether the service knows who holds a browser's cookies. */
async function isKnown(cookies: readonly { name: string; value: string }[]): Promise<boolean> {
  const cookie = cookies.map(({ name, value }) => `${name}=${value}`).join("; ");
  const { status } = await fetch(`${service.origin}/api/login`, { headers: { cookie } });
  return status === 200;
}

/** Ends what the browser's cookie stands for, as time does. */
async function expire({ context }: Visitor): Promise<void> {
  const cookies = await context.cookies();
  const cookie = cookies.map(({ name, value }) => `${name}=${value}`).join("; ");
  await fetch(`${service.origin}/api/logout`, { method: "POST", headers: { cookie } });
  expect(await isKnown(cookies)).toBe(false);
}

async function note(page: Page, text: string): Promise<void> {
  await page.keyboard.press("y");
  await page.getByRole("textbox", { name: "New note" }).fill(text);
  await page.getByRole("button", { name: "Note it" }).click();
  // The keys belong to the viewer again.
  await page.getByTestId("axial").focus();
}

function notes(page: Page): Promise<string[]> {
  const fields = page.getByTestId("session-notes").locator("textarea");
  return fields.evaluateAll((all) => all.map((field) => (field as HTMLTextAreaElement).value));
}

/** A session with the shown scan alone, as programs save it: without the model's anatomy. */
async function session(page: Page, name: string): Promise<string> {
  await page.waitForFunction(() => location.hash.includes("job="));
  const job = new URLSearchParams(new URL(page.url()).hash.slice(1)).get("job");
  return page.evaluate(
    async (body) => {
      const headers = { "Content-Type": "application/json" };
      const answer = await fetch("/api/sessions", { method: "POST", headers, body });
      return ((await answer.json()) as { id: string }).id;
    },
    JSON.stringify({ name, scans: [{ job }] }),
  );
}

test("a key opens the service to its holder alone, until they sign out or it is revoked", async () => {
  const own = await service.key("ada");
  const made = await keys(own, "create", "--label", "browser");

  const ada = await visitor();
  await ada.page.getByTestId("login").waitFor();
  const wrong = made.key.replace(/.{6}$/, "aaaaaa");
  await sign(ada.page, wrong);
  await ada.page.getByRole("alert").filter({ hasText: "unknown, expired or revoked" }).waitFor();
  expect(await ada.page.getByTestId("corner-value").count()).toBe(0);
  await sign(ada.page, made.key);
  await scan(ada.page);
  const [cookie, ...others] = await ada.context.cookies();
  expect(others).toEqual([]);
  expect(cookie).toMatchObject({ httpOnly: true, sameSite: "Strict" });
  expect(cookie?.value).not.toContain(made.key);
  expect(await ada.page.evaluate(() => document.cookie)).toBe("");
  await ada.page.waitForFunction(() => location.hash.includes("job="));
  const address = new URL(ada.page.url()).hash;

  // Who comes back by the address is asked once, and then sees the scan.
  const back = await visitor(address);
  await back.page.getByTestId("login").waitFor();
  await sign(back.page, made.key);
  await back.page.getByTestId("corner-value").waitFor();
  await back.page.waitForFunction(() => !document.querySelector('[data-testid="problem"]'));
  expect(await back.page.getByTestId("login").count()).toBe(0);
  await back.context.close();

  // Somebody else with her address sees no more of her scan than that it is none of theirs.
  const bob = await visitor(address);
  await sign(bob.page, await service.key("bob"));
  await bob.page
    .getByTestId("problem")
    .filter({ hasText: "The scan in this address is gone" })
    .waitFor();
  expect(await bob.page.getByTestId("corner-value").count()).toBe(0);
  await bob.page.getByTestId("axial").focus();
  await bob.page.keyboard.press("1");
  await settled(bob.page);

  // Signing out ends his session with the service, not only what he sees of it.
  const held = await bob.context.cookies();
  expect(await isKnown(held)).toBe(true);
  await bob.page.getByTestId("sign-out").click();
  await bob.page.getByTestId("login").waitFor();
  expect(await isKnown(held)).toBe(false);
  expect(await bob.context.cookies()).toEqual([]);
  await bob.context.close();

  // A revoked key ends hers at the next request, with what is on the screen still there to be read.
  await keys(own, "revoke", made.id);
  expect(await ada.page.getByTestId("login").count()).toBe(0);
  await ada.page.fill("#prompt", "One two three");
  await ada.page.press("#prompt", "Enter");
  await ada.page.getByTestId("login").waitFor();
  expect(await ada.page.getByTestId("corner-value").count()).toBe(1);
  await sign(ada.page, made.key);
  await ada.page.getByRole("alert").filter({ hasText: "unknown, expired or revoked" }).waitFor();
  await sign(ada.page, own);
  await ada.page.getByTestId("login").waitFor({ state: "detached" });
  await scan(ada.page);
  await ada.context.close();
});

test("who signs out leaves nothing in the tab for the next, and is told where they cannot", async () => {
  const { context, page } = await visitor();
  await sign(page, await service.key("ada"));
  await scan(page);
  await page.keyboard.press("k");
  await note(page, "Ada thought of this");
  await page.waitForFunction(() => location.hash.includes("job="));

  await page.route("**/api/logout", (route) => route.abort());
  await page.getByTestId("sign-out").click();
  await page
    .getByTestId("status")
    .filter({ hasText: "You are still signed in. The service cannot be reached" })
    .waitFor();
  expect(await page.getByTestId("login").count()).toBe(0);
  await page.unroute("**/api/logout");

  await page.getByTestId("sign-out").click();
  await page.getByTestId("login").waitFor();
  expect(new URL(page.url()).hash).toBe("");
  expect(await page.evaluate(() => ({ ...sessionStorage }))).toEqual({});
  await sign(page, await service.key("bob"));
  await page.getByTestId("login").waitFor({ state: "detached" });
  await settled(page);
  expect(await page.inputValue("#prompt")).toBe("");
  await page.keyboard.press("j");
  await page.getByTestId("session-name").waitFor();
  expect(await page.getByTestId("images").locator("li").count()).toBe(0);
  expect(await notes(page)).toEqual([]);
  expect(await page.content()).not.toContain(PROMPT);
  await context.close();
});

test.each(["", "and the page was loaded again"])(
  "who signs in after another's time is over finds nothing of theirs %s",
  async (reloaded) => {
    const own = await visitor();
    const { page } = own;
    await sign(page, await service.key("ada"));
    await scan(page);
    await page.keyboard.press("k");
    await note(page, "Ada thought of this");
    await page.waitForFunction(() => location.hash.includes("job="));
    await expire(own);
    if (reloaded === "") {
      await page.fill("#prompt", "One two three");
      await page.press("#prompt", "Enter");
    } else await page.reload();
    await page.getByTestId("login").waitFor();

    const bob = await service.key("bob");
    await Promise.all([page.waitForEvent("load"), sign(page, bob)]);
    await page.getByTestId("login").waitFor({ state: "detached" });
    await settled(page);
    expect(new URLSearchParams(new URL(page.url()).hash.slice(1)).has("job")).toBe(false);
    expect(await page.inputValue("#prompt")).toBe("");
    await page.keyboard.press("j");
    await page.getByTestId("session-name").waitFor();
    expect(await page.getByTestId("images").locator("li").count()).toBe(0);
    expect(await notes(page)).toEqual([]);
    expect(await page.content()).not.toContain(PROMPT);
    await own.context.close();
  },
);

test("who signs in again hears of what others save from then on", async () => {
  const key = await service.key("ada");
  const own = await visitor();
  const { page } = own;
  await sign(page, key);
  await scan(page);
  await note(page, "first");
  await page.getByTestId("save-session").click();
  await page.waitForFunction(() => location.hash.includes("session="));
  const address = new URL(page.url()).hash;

  await expire(own);
  await page.getByTestId("login").waitFor();
  const lost = page.getByText("Connection lost; what others add is not seen here.");
  await lost.waitFor();
  const other = await visitor(address);
  await sign(other.page, key);
  await other.page.getByTestId("login").waitFor({ state: "detached" });
  await settled(other.page);
  await note(other.page, "meanwhile");
  await other.page.getByTestId("save-session").click();
  await other.page.getByTestId("session-told").filter({ hasText: "revision 2" }).waitFor();

  await sign(page, key);
  await page.getByTestId("login").waitFor({ state: "detached" });
  await expect.poll(() => notes(page), { timeout: 10_000 }).toEqual(["first", "meanwhile"]);
  expect(await lost.count()).toBe(0);
  await Promise.all([own.context.close(), other.context.close()]);
});

test("who signs in again is where they were, not where they first came", async () => {
  const key = await service.key("ada");
  const own = await visitor();
  const { page } = own;
  await sign(page, key);
  await scan(page);
  const first = await session(page, "First");
  const second = await session(page, "Second");
  await page.goto(`${service.origin}/#session=${first}`);
  await page.reload();
  await page.getByTestId("open-session").filter({ hasText: "First" }).waitFor();
  await page.getByTestId("open-session").click();
  await page.getByTestId("session-id").fill(second);
  await page.keyboard.press("Enter");
  await page.getByTestId("sessions").waitFor({ state: "detached" });
  await page.getByTestId("open-session").filter({ hasText: "Second" }).waitFor();
  await note(page, "in the second");

  await expire(own);
  await page.getByTestId("login").waitFor();
  const again = page.waitForResponse((answer) => answer.url().endsWith("/export"));
  await sign(page, key);
  expect(new URL((await again).url()).pathname).toContain(second);
  await page.getByTestId("login").waitFor({ state: "detached" });
  await page.getByTestId("session-told").filter({ hasText: "Opened “Second”." }).waitFor();
  expect(await notes(page)).toEqual(["in the second"]);
  await own.context.close();
});
