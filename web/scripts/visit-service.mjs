/**
 * Visits a running service as a person would: takes a scan, walks the crosshair over it by keyboard, takes
 * the other modalities and a stimulation, and prints what the screen says as one JSON object, for somebody
 * else to hold against the stored floats.
 *
 *     node scripts/visit-service.mjs ORIGIN PROMPT STEPS [FOLDER FOR PICTURES]
 */
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";

import { launch } from "./chromium.mjs";

const [origin = "", prompt = "", steps = "0", pictures] = process.argv.slice(2);
const KEYS = ["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", ",", ".", "h", "Home", "End"];
const SMALL = { width: 1280, height: 720 };
/** A model is calibrated before its first scan of some kinds, which takes minutes on a slow machine. */
const LONG = 300_000;
const LARGE = { width: 1920, height: 1080 };

/** The address follows the picture after a moment's rest. @param {{component: string | undefined, column: number}} seen */
function isAddressOf(seen) {
  const fields = new URLSearchParams(location.hash.slice(1));
  return fields.get("focus") === seen.component && Number(fields.get("token") ?? 0) === seen.column;
}

/** The same walk each time: a small linear congruential generator. */
let state = 7;
function chance(/** @type {number} */ below) {
  state = (state * 1_103_515_245 + 12_345) % 2 ** 31;
  return Math.floor((state / 2 ** 31) * below);
}

const browser = await launch();
try {
  const page = await browser.newPage({ viewport: SMALL });
  /** @type {string[]} */
  const complaints = [];
  /** @type {Set<string>} */
  const origins = new Set();
  page.on("console", (message) => {
    if (message.type() === "error") complaints.push(message.text());
  });
  page.on("pageerror", (error) => complaints.push(error.message));
  page.on("request", (request) => origins.add(new URL(request.url()).origin));

  await page.goto(origin);
  await page.getByTestId("corner-value").waitFor();
  const structure = await corner();
  await picture("T1");
  await page.fill("#prompt", prompt);
  await page.press("#prompt", "Enter");
  await page.locator(".status", { hasText: "fMRI scan complete" }).waitFor();
  await page.getByTestId("axial").focus();
  const readings = [await corner()];
  for (let step = 0; step < Number(steps); step++) {
    await page.keyboard.press(KEYS[chance(KEYS.length)] ?? "h");
    readings.push(await corner());
  }
  const told = await page.getByTestId("announcement").textContent();
  await page.keyboard.press("h");
  await picture("fMRI");

  // The address alone brings the same picture back, in another window.
  const before = await corner();
  const again = await browser.newPage({ viewport: SMALL });
  await page.waitForFunction(isAddressOf, { component: before.component, column: before.column });
  const fragment = new URLSearchParams(new URL(page.url()).hash.slice(1));
  await again.goto(page.url());
  await again.locator(`[data-testid=corner-value][data-component="${before.component}"]`).waitFor();
  await again.locator(`[data-testid=corner-value][data-value="${before.value}"]`).waitFor();

  const modes = {
    T2: await modality("2", "T2"),
    DTI: await modality("4", "DTI", () => ask("Paris", "London")),
    FLAIR: await modality("5", "FLAIR"),
    perturbation: await stimulation(),
  };

  process.stdout.write(
    JSON.stringify({
      job: fragment.get("job"),
      modes,
      structure,
      readings,
      told,
      complaints,
      origins: [...origins],
    }),
  );

  /**
   * Takes a scan by keyboard, and reads its picture in a few places.
   * @param {string} key @param {string} id @param {() => Promise<void>} [prepare]
   */
  async function modality(key, id, prepare) {
    await page.getByTestId("axial").focus();
    await page.keyboard.press(key);
    await prepare?.();
    await page.locator("#prompt").press("Enter");
    await page.locator(".status", { hasText: `${id} scan complete` }).waitFor({ timeout: LONG });
    await page.getByTestId("axial").focus();
    await page.keyboard.press("h");
    await picture(id);
    return { readings: await walk(), ...(await lastJob(id)) };
  }

  async function ask(/** @type {string} */ answer, /** @type {string} */ foil) {
    await page.getByTestId("answer").fill(answer);
    await page.getByTestId("foil").fill(foil);
  }

  /** Silences the component looked at, and reads what that changed. */
  async function stimulation() {
    await page.getByTestId("axial").focus();
    await page.keyboard.press("3");
    await page.keyboard.press("h");
    const { component } = await corner();
    await page.keyboard.press("p");
    await page.getByRole("button", { name: "Zero" }).click();
    await page.getByRole("button", { name: "Run" }).click();
    await page.locator(".status", { hasText: "Stimulation complete" }).waitFor({ timeout: LONG });
    const after = await page.getByTestId("metric").getAttribute("data-after");
    await page.getByTestId("axial").focus();
    await picture("stimulation");
    return { component, after, readings: await walk(), ...(await lastJob("stimulation")) };
  }

  /** From the largest value downwards. */
  async function walk() {
    const seen = [await corner()];
    for (const key of ["n", "n", "n", "ArrowUp", "ArrowLeft", "n"]) {
      await page.keyboard.press(key);
      seen.push(await corner());
    }
    return seen;
  }

  /** The job that the corner names in full. */
  async function lastJob(/** @type {string} */ id) {
    const job = await page.getByTestId("scan-id").getAttribute("title");
    if (job === null) throw new Error(`${id} does not say which scan it is`);
    return { job };
  }

  async function corner() {
    await page.evaluate(
      () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))),
    );
    const data = await page
      .getByTestId("corner-value")
      .evaluate((element) => ({ .../** @type {HTMLElement} */ (element).dataset }));
    return {
      component: data["component"],
      column: Number(data["column"]),
      // As text: JSON has no NaN, and a number would be rounded once more on its way.
      value: data["value"],
    };
  }

  async function picture(/** @type {string} */ name) {
    if (pictures === undefined) return;
    mkdirSync(pictures, { recursive: true });
    for (const screen of [SMALL, LARGE]) {
      await page.setViewportSize(screen);
      await page.waitForTimeout(600);
      await page.screenshot({
        path: join(pictures, `${name}-${screen.width}x${screen.height}.png`),
      });
    }
    await page.setViewportSize(SMALL);
    await page.waitForTimeout(300);
  }
} finally {
  await browser.close();
}
