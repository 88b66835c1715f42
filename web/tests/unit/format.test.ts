import { expect, test } from "vitest";

import {
  bytes,
  clock,
  percent,
  seconds,
  short,
  shortened,
  spoken,
  token,
  value,
} from "../../src/ui/format";
import { nearest } from "../../src/render/hit";

test("values keep four digits and all before the point, whole numbers all of them", () => {
  expect(value(3.14159)).toBe("3.142");
  expect(value(468.912)).toBe("468.9");
  expect(value(2654784)).toBe("2,654,784");
  expect(value(22661.4)).toBe("22,661");
  expect(value(-1118034.2)).toBe("-1,118,034");
  expect(value(12345678.5)).toBe("1.235e+7");
  expect(value(0.00001234)).toBe("1.234e-5");
  expect(value(NaN)).toBe("not measured");
});

test("short numbers fit beside a colour bar", () => {
  expect(short(28311552)).toBe("28.3M");
  expect(short(0.104)).toBe("0.104");
  expect(short(576)).toBe("576");
  expect([999.4, 999.5, 999.9, -999999, 999.96e6].map(short)).toEqual([
    "999",
    "1.00k",
    "1.00k",
    "-1.00M",
    "1.00B",
  ]);
});

test("times, shares and sizes carry their unit", () => {
  expect(seconds(0.1824)).toBe("182 ms");
  expect(seconds(2.5)).toBe("2.50 s");
  expect(percent(0.7012)).toBe("70.1 %");
  expect(bytes(565182464)).toBe("565 MB");
  expect(clock(74.2)).toBe("01:14");
});

test("white space in tokens is seen, and not read out as a word", () => {
  expect(token(" Paris\n")).toBe("·Paris⏎");
  expect(token("")).toBe("◌");
  expect(spoken(" Paris")).toBe("Paris");
  expect(spoken("\n")).toBe("white space");
});

test("what nobody would see in a token is shown by a sign or a code, and spelled where it has no sound", () => {
  expect(token("\r\n")).toBe("␍⏎");
  expect(["\u00a0", "\u200b", "\u202e", "\ufeff", "\u001b", "\u3000"].map(token)).toEqual([
    "\\u00a0",
    "\\u200b",
    "\\u202e",
    "\\ufeff",
    "\\u001b",
    "\\u3000",
  ]);
  for (const seen of ["한국", "é", "🗼", "�", "◌"]) expect(token(seen)).toBe(seen);
  expect(spoken("\u200b")).toBe("\\u200b");
  expect(spoken("\u200bParis")).toBe("\u200bParis");
  expect(spoken("\u00a0")).toBe("white space");
});

test("a text that is cut says so", () => {
  expect(shortened("Tower", 5)).toBe("Tower");
  expect(shortened("Tower", 4)).toBe("Tow…");
});

test("the pointer means the nearest mark, within reach", () => {
  const x = Float32Array.of(0, 50, 100);
  const y = Float32Array.of(0, 0, 0);
  expect(nearest(x, y, 60, 5)).toBe(1);
  expect(nearest(x, y, 50, 31)).toBe(-1);
  expect(nearest(x, y, 76, 0)).toBe(2);
});
