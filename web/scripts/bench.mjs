/**
 * How fast the viewer is, in a headless browser without a GPU: frames a second while every node changes
 * colour, and how long a key press takes to be on the screen. Needs a built viewer.
 */
import { fileURLToPath } from "node:url";

import { createServer } from "vite";

import { serveFixtures } from "../tests/fixtures/server.mjs";
import { launch } from "./chromium.mjs";

/** Layers and heads that make about 302, 2,000 and 10,000 nodes. */
const SIZES = [
  [30, 9],
  [62, 31],
  [100, 99],
];
const MEASURED_MILLISECONDS = 4000;
const REPEATS = 40;
const PROMPT = "The Eiffel Tower is located in the city of";

const browser = await launch();

const root = fileURLToPath(new URL("..", import.meta.url));
const sources = await createServer({ root, logLevel: "error", server: { port: 0 } });
await sources.listen();
const page = await browser.newPage({ viewport: { width: 1000, height: 700 } });
await page.goto(`${sources.resolvedUrls?.local[0] ?? ""}bench/index.html`);
await page.waitForFunction(() => "recolour" in window);
for (const [layers, heads] of SIZES) {
  const measured = await page.evaluate(
    ([nLayers, nHeads, milliseconds]) =>
      /** @type {any} */ (window).recolour(nLayers, nHeads, milliseconds),
    [layers, heads, MEASURED_MILLISECONDS],
  );
  print(
    `recolouring ${measured.nodes} nodes`,
    `${measured.framesPerSecond.toFixed(1)} frames/s, ${measured.scriptMilliseconds.toFixed(2)} ms script a frame`,
  );
}
await page.close();
await sources.close();

const { origin, close } = await serveFixtures({ cached: true });
const viewer = await browser.newPage({ viewport: { width: 1280, height: 720 } });
const began = performance.now();
await viewer.goto(origin);
await viewer.getByTestId("corner-value").waitFor();
print("navigation to the first picture", `${(performance.now() - began).toFixed(0)} ms`);
await viewer.fill("#prompt", PROMPT);
await viewer.press("#prompt", "Enter");
await viewer.getByTestId("chip").first().waitFor();
await viewer.getByTestId("axial").focus();

print("token step", await latency(["ArrowRight", ",", "."]));
print("sequence switch, first new frame", await latency(["1", "3"]));
print("window, by key", await latency(["[", "]"]));

const CINE_FPS = 30;
await viewer.getByRole("spinbutton").fill(String(CINE_FPS));
await viewer.getByRole("spinbutton").press("Tab");
const shown = await viewer.evaluate(async () => {
  const corner = document.querySelector("[data-testid=corner-token]");
  let changes = 0;
  const watch = new MutationObserver(() => changes++);
  if (corner !== null)
    watch.observe(corner, { attributes: true, attributeFilter: ["data-column"] });
  const play = () =>
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: " ", bubbles: true }));
  play();
  await new Promise((resolve) => setTimeout(resolve, 4000));
  play();
  return changes / 4;
});
print(`cine, ${CINE_FPS} tokens a second asked`, `${shown.toFixed(1)} shown`);

const session = await viewer.context().newCDPSession(viewer);
const before = await heap();
await viewer.evaluate(async () => {
  const press = (/** @type {string} */ key) =>
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  for (let i = 0; i < 1000; i++) {
    press(i % 2 === 0 ? "1" : "3");
    for (let step = 0; step < 10; step++) press(step % 2 === 0 ? "," : ".");
    if (i % 20 === 0) await new Promise((resolve) => requestAnimationFrame(resolve));
  }
});
print("heap after 1,000 switches, 10,000 steps", `${((await heap()) - before).toFixed(2)} MB more`);

await viewer.waitForTimeout(6000);
const idle = await viewer.evaluate(async () => {
  let frames = 0;
  const own = window.requestAnimationFrame;
  window.requestAnimationFrame = (callback) => {
    frames++;
    return own.call(window, callback);
  };
  await new Promise((resolve) => setTimeout(resolve, 2000));
  window.requestAnimationFrame = own;
  return frames;
});
print("animation frames in 2 idle seconds", String(idle));

await browser.close();
await close();

async function heap() {
  await session.send("HeapProfiler.collectGarbage");
  const { usedSize } = await session.send("Runtime.getHeapUsage");
  return usedSize / 1e6;
}

/**
 * From a key press to the end of the frame that shows it: median and 95th percentile.
 * @param {readonly string[]} keys
 */
async function latency(keys) {
  const times = await viewer.evaluate(async ([pressed, repeats]) => {
    const taken = [];
    for (let i = 0; i < repeats; i++) {
      const key = pressed[i % pressed.length] ?? "";
      await new Promise((resolve) => setTimeout(resolve, 350));
      const start = performance.now();
      document.activeElement?.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      // The frame in which the renderer draws, then the one that shows that it has.
      await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
      taken.push(performance.now() - start);
    }
    return taken.sort((a, b) => a - b);
  }, /** @type {[readonly string[], number]} */ ([keys, REPEATS]));
  const at = (/** @type {number} */ share) => times[Math.floor((times.length - 1) * share)] ?? NaN;
  return `median ${at(0.5).toFixed(1)} ms, p95 ${at(0.95).toFixed(1)} ms`;
}

/** @param {string} what @param {string} figure */
function print(what, figure) {
  console.log(`${what.padEnd(36)} ${figure}`);
}
