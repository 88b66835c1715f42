/** Colour maps as tables of 256 colours. Sequential maps rise in lightness without a reversal. */
import maps from "virtual:colour-maps";

/** `[index * 3 + channel]`, 0 to 255. */
export type Lut = Uint8ClampedArray;

export const LUT_SIZE = 256;

export type MapName =
  | "grey"
  | "steel"
  | "inferno"
  | "magma"
  | "viridis"
  | "cividis"
  | "lesion"
  | "cool-hot"
  | "green-violet"
  | "blue-orange";

/** For values that have a direction: dark where nothing happens, lighter towards either end. */
export const DIVERGING_MAPS: readonly MapName[] = ["green-violet", "blue-orange"];

export const SEQUENTIAL_MAPS: readonly MapName[] = [
  "grey",
  "steel",
  "inferno",
  "magma",
  "viridis",
  "cividis",
  "lesion",
  "cool-hot",
];

export const MAP_NAMES: readonly MapName[] = [...SEQUENTIAL_MAPS, ...DIVERGING_MAPS];

/** What each map is called where a person picks it. */
export const MAP_TITLES: Readonly<Record<MapName, string>> = {
  grey: "Grey",
  steel: "Steel",
  inferno: "Inferno",
  magma: "Magma",
  viridis: "Viridis",
  cividis: "Cividis",
  lesion: "Lesion",
  "green-violet": "Green-violet",
  "blue-orange": "Blue-orange",
  "cool-hot": "Cool-hot (not uniform)",
};

type Rgb = readonly [red: number, green: number, blue: number];

const colours: Readonly<Record<MapName, (t: number) => Rgb>> = {
  // Starts well above the background, so that the least component is still seen.
  grey: (t) => {
    const v = 84 + t * 160;
    return [v, v, v + 10];
  },
  steel: through([30, 42, 88], [68, 136, 204], [170, 204, 238], [238, 246, 255]),
  inferno: tabulated(maps.inferno),
  magma: tabulated(maps.magma),
  viridis: tabulated(maps.viridis),
  cividis: tabulated(maps.cividis),
  // Ordinary tissue keeps 3:1 against the background; what stands out is redder and lighter at once.
  lesion: through([88, 95, 107], [203, 66, 104], [255, 160, 178]),
  "green-violet": through(
    [150, 246, 208],
    [38, 152, 116],
    [44, 50, 61],
    [130, 102, 245],
    [216, 198, 255],
  ),
  "blue-orange": through(
    [160, 212, 255],
    [54, 128, 212],
    [44, 50, 61],
    [200, 98, 36],
    [255, 194, 128],
  ),
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

/** Straight lines between colours at equal steps. */
function through(...stops: readonly Rgb[]): (t: number) => Rgb {
  return (t) => {
    const place = Math.min(stops.length - 2, Math.floor(t * (stops.length - 1)));
    const share = t * (stops.length - 1) - place;
    const [from, to] = [stops[place], stops[place + 1]];
    const mix = (channel: 0 | 1 | 2) =>
      (from?.[channel] ?? 0) * (1 - share) + (to?.[channel] ?? 0) * share;
    return [mix(0), mix(1), mix(2)];
  };
}

function tabulated(base64: string): (t: number) => Rgb {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stops = Array.from({ length: bytes.length / 3 }, (_, stop): Rgb => {
    const [red = 0, green = 0, blue = 0] = bytes.subarray(stop * 3, stop * 3 + 3);
    return [red, green, blue];
  });
  return through(...stops);
}
