/** A real browser on the built viewer, with a stand-in for the service behind it. */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

import type { Browser, Page } from "playwright-core";

import { serveFixtures } from "../fixtures/server.mjs";

export { launch } from "../../scripts/chromium.mjs";

export const PROMPT = "The Eiffel Tower is located in the city of";
export const FRAMES = JSON.parse(
  readFileSync(new URL("../fixtures/data/frames.json", import.meta.url), "utf8"),
) as { readonly texts: readonly string[]; readonly values: Readonly<Record<string, number[]>> };

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

type Server = Awaited<ReturnType<typeof serveFixtures>>;
export type Behaviour = Server["behaviour"];

export interface Visit {
  readonly page: Page;
  readonly server: Server;
  /** Errors the page logged or threw, policy violations among them. */
  readonly complaints: string[];
  /** Every address the page asked for. */
  readonly requests: string[];
}

export interface VisitOptions {
  readonly behaviour?: Behaviour;
  readonly fragment?: string;
  readonly width?: number;
  readonly height?: number;
  readonly zoom?: number;
  readonly reducedMotion?: "reduce" | "no-preference";
}

/** Opens the viewer, counting animation frames and timers from the first. */
export async function visit(browser: Browser, options: VisitOptions = {}): Promise<Visit> {
  const server = await serveFixtures({ pause: 2, ...options.behaviour });
  const page = await browser.newPage({
    viewport: { width: options.width ?? 1280, height: options.height ?? 720 },
    deviceScaleFactor: options.zoom ?? 1,
    reducedMotion: options.reducedMotion ?? "no-preference",
  });
  const complaints: string[] = [];
  const requests: string[] = [];
  page.on("console", (message) => {
    // The browser logs every refused request itself; the viewer shows those to the person.
    const refused = message.text().startsWith("Failed to load resource");
    if (message.type() === "error" && !refused) complaints.push(message.text());
  });
  page.on("pageerror", (error) => complaints.push(error.message));
  page.on("request", (request) => requests.push(request.url()));
  await page.addInitScript(() => {
    const counts = { frames: 0, timers: 0 };
    const frame = window.requestAnimationFrame.bind(window);
    window.requestAnimationFrame = (callback) => {
      counts.frames++;
      return frame(callback);
    };
    const timeout = window.setTimeout.bind(window);
    window.setTimeout = ((handler: () => void, delay?: number) => {
      counts.timers++;
      return timeout(handler, delay);
    }) as typeof window.setTimeout;
    Object.assign(window, { counts });
  });
  const fragment = options.fragment === undefined ? "" : `#${options.fragment}`;
  await page.goto(`${server.origin}/${fragment}`);
  return { page, server, complaints, requests };
}

export async function leave({ page, server }: Visit): Promise<void> {
  await page.close();
  await server.close();
}

export async function counts(page: Page): Promise<{ frames: number; timers: number }> {
  return page.evaluate(() => ({
    ...(window as unknown as { counts: { frames: number; timers: number } }).counts,
  }));
}

/**
 * Waits until no frame is asked for, no timer set, and nothing moves. What moves must end by itself in so many
 * milliseconds; that is read, and its end not waited for.
 */
export async function rested(page: Page, within = 6000): Promise<void> {
  for (let before = await counts(page), waited = 0; ; waited += 400) {
    if (waited > within) throw new Error("The viewer does not come to rest");
    const moving = await page.evaluate((limit) => {
      const animations = document.getAnimations();
      for (const animation of animations) {
        const end = Number(animation.effect?.getComputedTiming().endTime);
        if (end > limit) throw new Error(`An animation of ${end} ms`);
        animation.finish();
      }
      return animations.length;
    }, within);
    await page.waitForTimeout(400);
    const { frames, timers } = await counts(page);
    if (moving === 0 && frames === before.frames && timers === before.timers) return;
    before = { frames, timers };
  }
}

/** Waits for the first true picture: T1, with its numbers. */
export async function settled(page: Page): Promise<void> {
  await page.getByTestId("corner-value").waitFor();
}

/** Types a prompt, scans it and waits for the stored table. */
export async function scan(page: Page, prompt = PROMPT): Promise<void> {
  await settled(page);
  await page.fill("#prompt", prompt);
  await page.press("#prompt", "Enter");
  await page.locator(".status", { hasText: "fMRI scan complete" }).waitFor();
  await page.getByTestId("axial").focus();
}

export interface Reading {
  readonly component: string;
  readonly column: number;
  readonly value: number;
}

/** What the corner of the axial viewport says, in full precision. */
export async function reading(page: Page): Promise<Reading> {
  const data = await page.getByTestId("corner-value").evaluate((element) => ({
    ...(element as HTMLElement).dataset,
  }));
  return {
    component: data["component"] ?? "",
    column: Number(data["column"]),
    value: Number(data["value"]),
  };
}

/** The colour of the node under the crosshair, read off the canvas. */
export function pixel(page: Page): Promise<number[]> {
  return page.getByTestId("nodes").evaluate((canvas) => {
    const own = canvas as HTMLCanvasElement;
    const circle = own.parentElement?.querySelector("[data-testid=crosshair]");
    const ratio = own.width / own.clientWidth;
    const at = (name: string) => Math.round(Number(circle?.getAttribute(name)) * ratio);
    const context = own.getContext("2d");
    return [...(context?.getImageData(at("cx"), at("cy"), 1, 1).data ?? [])];
  });
}

/** Waits until everything asked to be drawn has been. */
export function drawn(page: Page): Promise<void> {
  return page.evaluate(
    () =>
      new Promise<void>((resolve) =>
        requestAnimationFrame(() => requestAnimationFrame(() => resolve())),
      ),
  );
}

export interface Violation {
  readonly rule: string;
  readonly where: readonly string[];
}

/** What axe finds against WCAG 2.2 AA and good practice. */
export async function violations(page: Page): Promise<Violation[]> {
  if (!(await page.evaluate(() => "axe" in window))) await page.evaluate(AXE);
  return page.evaluate(async () => {
    const { axe } = window as unknown as {
      axe: {
        run(options: unknown): Promise<{
          violations: { id: string; nodes: { target: string[]; failureSummary: string }[] }[];
        }>;
      };
    };
    const found = await axe.run({
      runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
      resultTypes: ["violations"],
    });
    return found.violations.map(({ id, nodes }) => ({
      rule: id,
      where: nodes.map((node) => `${node.target.join(" ")}: ${node.failureSummary}`),
    }));
  });
}
