/** The two grounds a figure is drawn on: the screen's, and a paper's. */
import { LUT_SIZE, type Lut } from "../colour/lut";

export type Ground = "paper" | "screen";

export interface Ink {
  readonly ground: string;
  readonly text: string;
  readonly quiet: string;
  readonly line: string;
  readonly socket: string;
  readonly missing: string;
  readonly mark: string;
}

export const INKS: Readonly<Record<Ground, Ink>> = {
  paper: {
    ground: "#ffffff",
    text: "#111418",
    quiet: "#4a525c",
    line: "#c3c9d1",
    socket: "#8a929c",
    missing: "#8a929c",
    mark: "#c2185b",
  },
  screen: {
    ground: "#0a0c10",
    text: "#e8f0f2",
    quiet: "#93a1b0",
    line: "#2a323c",
    socket: "#39434f",
    missing: "#4d5967",
    mark: "#ff8fab",
  },
};

/**
 * The map on its ground. A diverging map is dark where nothing happens, which is what recedes on the
 * screen and what stands out on paper: there each half goes from white to a deep shade of its hue.
 */
export function onGround(lut: Lut, signed: boolean, ground: Ground): Lut {
  if (!signed || ground === "screen") return lut;
  const table = new Uint8ClampedArray(LUT_SIZE * 3);
  for (let index = 0; index < LUT_SIZE; index++) {
    const t = (2 * index) / (LUT_SIZE - 1) - 1;
    // The most saturated shade of each half lies half way out.
    const deep = Math.round(((1 + Math.sign(t) * 0.5) / 2) * (LUT_SIZE - 1)) * 3;
    for (let channel = 0; channel < 3; channel++) {
      const hue = lut[deep + channel] ?? 0;
      table[index * 3 + channel] = 255 + (hue * 0.86 - 255) * Math.abs(t) ** 0.8;
    }
  }
  return table;
}
