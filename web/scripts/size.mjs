/**
 * Fails when the JavaScript that a build loads at first, compressed, is over a budget, or the empty page that
 * saved pages are made of over another: `size.mjs FOLDER KILOBYTES KILOBYTES`. What is fetched later, with
 * the first scan that needs it, is told beside it.
 */
import process from "node:process";

import { sizes } from "./sizes.mjs";

const [folder = "dist", budget = "70", pageBudget = "150"] = process.argv.slice(2);
const { first, later, parts, page } = await sizes(folder);
console.log(
  `JavaScript, compressed: ${first.toFixed(1)} kB at first of ${budget} kB allowed, ` +
    `${later.toFixed(1)} kB in ${parts} parts when needed`,
);
console.log(
  `The page that opens from a disk: ${page.toFixed(1)} kB of ${pageBudget} kB allowed, and its data`,
);
if (first > Number(budget) || page > Number(pageBudget)) process.exit(1);
