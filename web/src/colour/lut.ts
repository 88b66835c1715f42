/** Colour maps as tables of 256 colours. Sequential maps rise in lightness without a reversal. */
import maps from "virtual:colour-maps";

/** `[index * 3 + channel]`, 0 to 255. */
export type Lut = Uint8ClampedArray;

export const LUT_SIZE = 256;

export type MapName = "grey" | "inferno" | "magma" | "viridis" | "cividis" | "cool-hot";

export const MAP_NAMES: readonly MapName[] = [
  "grey",
  "inferno",
  "magma",
  "viridis",
  "cividis",
  "cool-hot",
];

/** What each map is called where a person picks it. */
export const MAP_TITLES: Readonly<Record<MapName, string>> = {
  grey: "Grey",
  inferno: "Inferno",
  magma: "Magma",
  viridis: "Viridis",
  cividis: "Cividis",
  "cool-hot": "Cool-hot (not uniform)",
};

type Rgb = readonly [red: number, green: number, blue: number];

const colours: Readonly<Record<MapName, (t: number) => Rgb>> = {
  // Starts well above the background, so that the least component is still seen.
  grey: (t) => {
    const v = 84 + t * 160;
    return [v, v, v + 10];
  },
  inferno: tabulated(maps.inferno),
  magma: tabulated(maps.magma),
  viridis: tabulated(maps.viridis),
  cividis: tabulated(maps.cividis),
  // The specification's three pieces. It jumps at 0.3 and 0.6: offered for its look, not for reading.
  "cool-hot": (t) => {
    if (t < 0.3) return [30 + t * 80, 30 + t * 100, 80 + t * 120];
    if (t <= 0.6) return [t * 200, t * 160, 40 + t * 60];
    return [200 + t * 55, t * 120, t * 30];
  },
};

const made = new Map<string, Lut>();

export function lut(name: MapName, inverted = false): Lut {
  const key = `${name}${inverted ? " inverted" : ""}`;
  let table = made.get(key);
  if (table === undefined) {
    table = new Uint8ClampedArray(LUT_SIZE * 3);
    for (let index = 0; index < LUT_SIZE; index++) {
      const t = index / (LUT_SIZE - 1);
      table.set(colours[name](inverted ? 1 - t : t), index * 3);
    }
    made.set(key, table);
  }
  return table;
}

/** The table index of a position from 0 to 1. */
export function lutIndex(t: number): number {
  return Math.round(Math.min(1, Math.max(0, t)) * (LUT_SIZE - 1));
}

export function css(table: Lut, t: number): string {
  const at = lutIndex(t) * 3;
  return `rgb(${table[at] ?? 0} ${table[at + 1] ?? 0} ${table[at + 2] ?? 0})`;
}

function tabulated(base64: string): (t: number) => Rgb {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return (t) => {
    const at = lutIndex(t) * 3;
    return [bytes[at] ?? 0, bytes[at + 1] ?? 0, bytes[at + 2] ?? 0];
  };
}
