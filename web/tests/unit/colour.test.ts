import { describe, expect, test } from "vitest";

import { DIVERGING_MAPS, LUT_SIZE, SEQUENTIAL_MAPS, lut, lutIndex } from "../../src/colour/lut";
import {
  automatic,
  bounds,
  coordinates,
  histogram,
  moved,
  position,
  quantile,
  symmetric,
  widened,
} from "../../src/colour/window";
import { planePixels } from "../../src/render/plane";
import { paintNodes } from "../../src/render/paint";

/** CIE L* of an sRGB colour. */
function lightness(table: Uint8ClampedArray, index: number): number {
  const linear = [0, 1, 2].map((channel) => {
    const c = (table[index * 3 + channel] ?? 0) / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  const y = 0.2126 * (linear[0] ?? 0) + 0.7152 * (linear[1] ?? 0) + 0.0722 * (linear[2] ?? 0);
  return y > 0.008856 ? 116 * Math.cbrt(y) - 16 : 903.3 * y;
}

describe.each(SEQUENTIAL_MAPS.filter((name) => name !== "cool-hot"))("map %s", (name) => {
  test("gets lighter from end to end without a reversal", () => {
    const table = lut(name);
    for (let index = 8; index < LUT_SIZE; index += 8) {
      expect(lightness(table, index)).toBeGreaterThan(lightness(table, index - 8));
    }
  });

  test("inverted is the same colours the other way round", () => {
    const [table, inverted] = [lut(name), lut(name, true)];
    for (let index = 0; index < LUT_SIZE; index++) {
      for (let channel = 0; channel < 3; channel++) {
        expect(inverted[(LUT_SIZE - 1 - index) * 3 + channel]).toBe(table[index * 3 + channel]);
      }
    }
  });
});

describe.each(DIVERGING_MAPS)("map %s", (name) => {
  test("gets lighter from the middle to either end, and is darkest where nothing happens", () => {
    const table = lut(name);
    for (let step = 8; step < LUT_SIZE / 2; step += 8) {
      const [below, above] = [LUT_SIZE / 2 - step, LUT_SIZE / 2 + step - 1];
      expect(lightness(table, below)).toBeGreaterThan(lightness(table, below + 8));
      expect(lightness(table, above)).toBeGreaterThan(lightness(table, above - 8));
    }
  });

  test("is as light at one end as at the other, so that no sign weighs more", () => {
    const table = lut(name);
    expect(Math.abs(lightness(table, 0) - lightness(table, LUT_SIZE - 1))).toBeLessThan(8);
  });
});

test("ordinary tissue of a FLAIR scan keeps 3:1 against the background", () => {
  const luminance = (l: number) => (l > 8 ? ((l + 16) / 116) ** 3 : l / 903.3);
  const background = luminance(lightness(Uint8ClampedArray.of(10, 12, 16), 0));
  const ordinary = luminance(lightness(lut("lesion"), 0));
  expect((ordinary + 0.05) / (background + 0.05)).toBeGreaterThanOrEqual(3);
});

test("a signed value of 0 stands in the middle of its window, whatever the values", () => {
  const sorted = coordinates([-9, -1, 0, 2, 3], "linear");
  expect(position(0, symmetric(sorted, 0), "linear")).toBe(0.5);
  expect(position(-9, symmetric(sorted, 0), "linear")).toBe(0);
});

test("what did not change at all leaves the window to what did", () => {
  const sorted = Float64Array.from([...Array<number>(98).fill(0), -4, 2]).sort();
  expect(symmetric(sorted, 0.02).width).toBeGreaterThan(7);
  expect(symmetric(new Float64Array(5), 0.02).width).toBe(2);
});

test("on a scale of sizes both signs are one colour", () => {
  const window = { level: 2, width: 4 };
  expect(position(-3, window, "size")).toBe(position(3, window, "size"));
  expect(position(0, window, "size")).toBe(0);
});

test("the inferno table is d3's", () => {
  expect([...lut("inferno").slice(0, 3)]).toEqual([0, 0, 4]);
  expect([...lut("inferno").slice(-3)]).toEqual([252, 255, 164]);
});

test("a window places values as DICOM's LINEAR_EXACT does", () => {
  const window = { level: 10, width: 4 };
  expect(position(8, window, "linear")).toBe(0);
  expect(position(10, window, "linear")).toBe(0.5);
  expect(position(11, window, "linear")).toBe(0.75);
  expect(position(99, window, "linear")).toBe(1);
  expect(position(-99, window, "linear")).toBe(0);
  expect(position(NaN, window, "linear")).toBeNaN();
});

test("on a log scale equal factors are equal steps, and zero is darkest", () => {
  const window = { level: 1, width: 2 };
  expect(position(1, window, "log")).toBe(0);
  expect(position(10, window, "log")).toBe(0.5);
  expect(position(100, window, "log")).toBe(1);
  expect(position(0, window, "log")).toBe(0);
  expect(bounds(window, "log")).toEqual([1, 100]);
});

test("a sink a thousand times the rest does not black the scan out", () => {
  const values = Array.from({ length: 990 }, (_, i) => 1 + i / 990);
  const window = automatic(coordinates([...values, ...Array(10).fill(5000)], "linear"), 0.02);
  const ts = values.map((value) => position(value, window, "linear"));
  expect(Math.max(...ts) - Math.min(...ts)).toBeGreaterThan(0.95);
});

test("values all alike stand in the middle of their window", () => {
  expect(position(7, automatic(Float64Array.of(7, 7, 7), 0.02), "linear")).toBe(0.5);
  expect(automatic(new Float64Array(0), 0.02).width).toBeGreaterThan(0);
});

test("what is not measured, and what a log scale has no place for, is not counted", () => {
  expect([...coordinates([NaN, 0, 10, 1], "log")]).toEqual([0, 1]);
  expect([...coordinates([NaN, 0, 10], "linear")]).toEqual([0, 10]);
});

test("quantiles are numpy's", () => {
  const sorted = Float64Array.of(1, 2, 4, 8);
  expect(quantile(sorted, 0)).toBe(1);
  expect(quantile(sorted, 1)).toBe(8);
  expect(quantile(sorted, 0.5)).toBe(3);
  expect(quantile(sorted, 0.1)).toBeCloseTo(1.3, 12);
});

test("widening and moving never leave a window without width", () => {
  let window = { level: 1, width: 1 };
  for (let i = 0; i < 500; i++) window = moved(widened(window, 0.8), 0.1);
  expect(window.width).toBeGreaterThan(0);
  expect(Number.isFinite(window.level)).toBe(true);
});

test("a histogram counts every value of its span once", () => {
  const sorted = Float64Array.of(0, 0.1, 0.5, 0.5, 1, 3);
  const counts = histogram(sorted, 0, 1, 10);
  expect(counts.reduce((a, b) => a + b, 0)).toBe(5);
  expect(counts[5]).toBe(2);
  expect(counts[9]).toBe(1);
});

test("a node's colour is the table's at its value's place in the window", () => {
  const values = Float64Array.of(1, 2.5, 4, NaN, 100);
  const window = { level: 2.5, width: 3 };
  const table = lut("inferno");
  const paint = paintNodes({
    values,
    window,
    scale: "linear",
    lut: table,
    radius: 10,
    marks: Float64Array.of(0, 0, 1, 1, 0),
    halos: "largest",
    signed: false,
  });
  values.forEach((value, node) => {
    if (Number.isNaN(value)) {
      expect(paint.missing[node]).toBe(1);
      return;
    }
    const at = lutIndex(position(value, window, "linear")) * 3;
    expect([...paint.rgb.slice(node * 3, node * 3 + 3)]).toEqual([...table.slice(at, at + 3)]);
  });
  expect([...paint.ring]).toEqual([0, 0, 1, 0, 0]);
  expect(paint.halo[0]).toBe(0);
  expect(paint.halo[4]).toBe(1);
  expect(paint.radius[0] ?? 0).toBeLessThan(paint.radius[4] ?? 0);
});

test("a loss as large as a gain is as large a node, with as strong a halo", () => {
  const paint = paintNodes({
    values: Float64Array.of(-4, 0, 4),
    window: { level: 0, width: 8 },
    scale: "linear",
    lut: lut("blue-orange"),
    radius: 10,
    marks: new Float64Array(3),
    halos: "largest",
    signed: true,
  });
  expect([...paint.halo]).toEqual([1, 0, 1]);
  expect(paint.radius[0]).toBe(paint.radius[2]);
  expect(paint.radius[1]).toBeLessThan(paint.radius[0] ?? 0);
});

test("an image's pixels are the table's colours; what is not measured is transparent", () => {
  const plane = { width: 3, height: 1, values: Float32Array.of(0, 1, NaN) };
  const pixels = planePixels(plane, { level: 0.5, width: 1 }, "linear", lut("grey"));
  expect([...pixels.slice(0, 4)]).toEqual([...lut("grey").slice(0, 3), 255]);
  expect([...pixels.slice(4, 8)]).toEqual([...lut("grey").slice(-3), 255]);
  expect(pixels[11]).toBe(0);
});
