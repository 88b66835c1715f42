import { afterEach, beforeEach, expect, test, vi } from "vitest";

import { Cine, clampFps } from "../../src/state/cine.svelte";

beforeEach(() => vi.useFakeTimers());
afterEach(() => vi.useRealTimers());

test.each([1, 2, 24, 30])("%i frames a second are that many, within 3 %%", (fps) => {
  let shown = 0;
  const cine = new Cine(() => shown++);
  cine.fps = fps;
  cine.play();
  vi.advanceTimersByTime(20_000);
  cine.pause();
  expect(shown / 20).toBeGreaterThan(fps * 0.97 - 0.05);
  expect(shown / 20).toBeLessThan(fps * 1.03 + 0.05);
});

test("no timer is left when it stands still", () => {
  const cine = new Cine(() => undefined);
  cine.play();
  expect(vi.getTimerCount()).toBe(1);
  cine.pause();
  expect(vi.getTimerCount()).toBe(0);
});

test("a cine that has nothing more to show stops, and leaves no timer either", () => {
  let shown = 0;
  const cine = new Cine(() => {
    shown++;
    cine.pause();
  });
  cine.play();
  vi.advanceTimersByTime(500);
  expect(vi.getTimerCount()).toBe(0);
  vi.advanceTimersByTime(5000);
  expect(shown).toBe(1);
  expect(cine.playing).toBe(false);
});

test("playing twice is playing once", () => {
  const cine = new Cine(() => undefined);
  cine.play();
  cine.play();
  expect(vi.getTimerCount()).toBe(1);
  cine.pause();
});

test("a speed nobody can mean becomes one they can", () => {
  expect(clampFps(NaN)).toBe(1);
  expect(clampFps(0)).toBe(1);
  expect(clampFps(500)).toBe(30);
});
