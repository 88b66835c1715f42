/** Who somebody is, told to the real service by keys that its own command line makes. */
import { execFile } from "node:child_process";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import type { Browser, BrowserContext, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";

import { launch, scan, settled } from "./browser";
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
