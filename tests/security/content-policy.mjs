/**
 * Looks at the service with a real browser, and tries from inside its pages what somebody would who got a
 * script or a frame into one. Prints what the policy let through, as one JSON object.
 *
 *     node tests/security/content-policy.mjs ORIGIN OTHER_ORIGIN
 */
import process from "node:process";

import { launch } from "../../web/scripts/chromium.mjs";

const [origin = "", other = ""] = process.argv.slice(2);
const browser = await launch();
try {
  const seen = {};
  // The other site last: it has no policy, and shows that the ways are ways.
  for (const address of [`${origin}/`, `${origin}/schema`, `${origin}/api/jobs`, `${other}/`]) {
    const page = await browser.newPage();
    const complaints = [];
    const asked = new Set();
    page.on("console", (message) => {
      if (/Content Security Policy|Trusted/i.test(message.text())) complaints.push(message.text());
    });
    page.on("request", (request) => asked.add(new URL(request.url()).origin));
    await page.goto(address, { waitUntil: "load" });
    await page.waitForTimeout(500);
    const quiet = { complaints: [...complaints], origins: [...asked] };
    const tried = await page.evaluate(tryAll, other);
    // Where the page may stand: in no frame of anybody's.
    const framed = await browser.newPage();
    await framed.goto(other);
    await framed.evaluate((within) => {
      const frame = document.createElement("iframe");
      frame.src = within;
      document.body.append(frame);
    }, address);
    await framed.waitForTimeout(500);
    const inside = framed.frames().slice(1).filter((frame) => frame.url() === address);
    seen[address] = { ...quiet, tried, framed: inside.length };
    await framed.close();
    await page.close();
  }
  process.stdout.write(JSON.stringify(seen));
} finally {
  await browser.close();
}

/** Each way in, and whether it was open. */
async function tryAll(/** @type {string} */ other) {
  const tried = {};
  globalThis.ran = [];
  /** @param {string} name @param {() => unknown} way */
  async function attempt(name, way) {
    try {
      const outcome = await way();
      tried[name] = outcome === undefined ? "open" : String(outcome);
    } catch {
      tried[name] = "shut";
    }
  }
  const soon = () => new Promise((done) => setTimeout(done, 150));
  /** @param {string} mark */
  const whetherRan = async (mark) => {
    await soon();
    return globalThis.ran.includes(mark) ? "open" : "shut";
  };
  await attempt("inline script", () => {
    const script = document.createElement("script");
    script.append("globalThis.ran.push('inline')");
    document.documentElement.append(script);
    return whetherRan("inline");
  });
  await attempt("foreign script", () => {
    const script = document.createElement("script");
    script.setAttribute("src", `${other}/script.js`);
    document.documentElement.append(script);
    return whetherRan("foreign");
  });
  await attempt("event handler", () => {
    const element = document.createElement("button");
    element.setAttribute("onclick", "globalThis.ran.push('handler')");
    document.documentElement.append(element);
    element.click();
    return whetherRan("handler");
  });
  await attempt("markup from text", () => {
    const element = document.createElement("p");
    element.innerHTML = "<b>bold</b>";
    return element.children.length ? "open" : "shut";
  });
  await attempt("eval", () => {
    (0, eval)("1");
  });
  await attempt("foreign request", async () => {
    await fetch(`${other}/`, { mode: "no-cors" });
  });
  await attempt("foreign image", async () => {
    const image = new Image();
    image.src = `${other}/image.png`;
    await image.decode();
  });
  await attempt("inline style", () => {
    const style = document.createElement("style");
    style.append("html { --let-in: 1 }");
    document.documentElement.append(style);
    const value = getComputedStyle(document.documentElement).getPropertyValue("--let-in");
    return value ? "open" : "shut";
  });
  await attempt("base address", () => {
    const base = document.createElement("base");
    base.href = other;
    document.documentElement.append(base);
    return document.baseURI.startsWith(other) ? "open" : "shut";
  });
  await attempt("camera", async () => {
    await navigator.mediaDevices.getUserMedia({ video: true });
  });
  return tried;
}
