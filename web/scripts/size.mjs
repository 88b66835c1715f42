/**
 * Fails when the JavaScript that a build loads at first, compressed, is over a budget, or the empty page that
 * saved pages are made of over another: `size.mjs FOLDER KILOBYTES KILOBYTES`. What is fetched later, with
 * the first scan that needs it, is told beside it.
 */
import { readFile, readdir, stat } from "node:fs/promises";
import { basename, join } from "node:path";
import process from "node:process";
import { gzipSync } from "node:zlib";

const [folder = "dist", budget = "70", pageBudget = "150"] = process.argv.slice(2);
const assets = join(folder, "assets");
/** @type {Map<string, {size: number, imports: string[]}>} */
const scripts = new Map();
for (const name of await readdir(assets)) {
  if (!name.endsWith(".js")) continue;
  const body = await readFile(join(assets, name));
  const imports = [...body.toString().matchAll(/(?:from|import)\s*["']\.\/([^"']+\.js)["']/g)];
  scripts.set(name, {
    size: gzipSync(body, { level: 9 }).length,
    imports: imports.map(([, imported]) => imported ?? ""),
  });
}

const page = await readFile(join(folder, "index.html"), "utf8");
/** @type {Set<string>} */
const first = new Set();
const waiting = [...page.matchAll(/["']([^"']+\.js)["']/g)].map(([, path]) => basename(path ?? ""));
for (let name = waiting.pop(); name !== undefined; name = waiting.pop()) {
  const script = scripts.get(name);
  if (script === undefined || first.has(name)) continue;
  first.add(name);
  waiting.push(...script.imports);
}

/** @param {Iterable<string>} names */
function kilobytes(names) {
  return [...names].reduce((sum, name) => sum + (scripts.get(name)?.size ?? 0), 0) / 1000;
}

const [loaded, all] = [kilobytes(first), kilobytes(scripts.keys())];
if (first.size === 0) throw new Error(`${folder}/index.html loads no script`);
console.log(
  `JavaScript, compressed: ${loaded.toFixed(1)} kB at first of ${budget} kB allowed, ` +
    `${(all - loaded).toFixed(1)} kB in ${scripts.size - first.size} parts when needed`,
);
const saved = (await stat(join(folder, "page.html"))).size / 1000;
console.log(
  `The page that opens from a disk: ${saved.toFixed(1)} kB of ${pageBudget} kB allowed, and its data`,
);
if (loaded > Number(budget) || saved > Number(pageBudget)) process.exit(1);
