/** Fails when the JavaScript of a build, compressed, is over a budget: `size.mjs FOLDER KILOBYTES`. */
import { readFile, readdir } from "node:fs/promises";
import { extname, join } from "node:path";
import { gzipSync } from "node:zlib";

const [folder = "dist", budget = "70"] = process.argv.slice(2);
let total = 0;
for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
  if (!entry.isFile() || extname(entry.name) !== ".js") continue;
  total += gzipSync(await readFile(join(entry.parentPath, entry.name)), { level: 9 }).length;
}
const kilobytes = total / 1000;
console.log(`JavaScript: ${kilobytes.toFixed(1)} kB compressed of ${budget} kB allowed`);
if (kilobytes > Number(budget)) process.exit(1);
