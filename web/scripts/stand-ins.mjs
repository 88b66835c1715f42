/**
 * What stands in for parts of d3 behind d3-scale: it interpolates anything, colours included, and formats
 * ticks in every way; ours map numbers to numbers, and the rest would be a tenth of what the browser loads.
 */
import { fileURLToPath } from "node:url";

const own = (/** @type {string} */ name) =>
  fileURLToPath(new URL(`../src/model/${name}`, import.meta.url));

export const standIns = {
  "d3-interpolate": own("interpolate.ts"),
  "d3-format": own("number-format.ts"),
};
