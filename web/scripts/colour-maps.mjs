/**
 * The sequential colour maps of d3-scale-chromatic as tables, made when the viewer is built: the browser
 * gets 64 colours a map, which lie so near each other that straight lines between them are the map, instead of
 * every map and the means to interpolate them.
 */
import {
  interpolateCividis,
  interpolateInferno,
  interpolateMagma,
  interpolateViridis,
} from "d3-scale-chromatic";

const NAME = "virtual:colour-maps";
const SIZE = 64;

const maps = {
  inferno: interpolateInferno,
  magma: interpolateMagma,
  viridis: interpolateViridis,
  cividis: interpolateCividis,
};

/** @returns {import("vite").Plugin} */
export function colourMaps() {
  return {
    name: "colour-maps",
    resolveId: (id) => (id === NAME ? `\0${NAME}` : null),
    load: (id) => {
      if (id !== `\0${NAME}`) return null;
      const tables = Object.entries(maps).map(([name, interpolate]) => [name, table(interpolate)]);
      return `export default ${JSON.stringify(Object.fromEntries(tables))};`;
    },
  };
}

/** @param {(t: number) => string} interpolate @returns {string} Base64 of red, green, blue a colour. */
function table(interpolate) {
  const bytes = Array.from({ length: SIZE }, (_, index) =>
    channels(interpolate(index / (SIZE - 1))),
  );
  return Buffer.from(bytes.flat()).toString("base64");
}

/** @param {string} colour `#rrggbb` or `rgb(r, g, b)`, the two forms the maps come in. */
function channels(colour) {
  if (!colour.startsWith("#")) return (colour.match(/\d+/g) ?? []).map(Number);
  const bits = Number.parseInt(colour.slice(1), 16);
  return [bits >> 16, (bits >> 8) & 255, bits & 255];
}
