/** How large a build is, in kilobytes: what is loaded at first and later, compressed, and the saved page. */
import { readFile, readdir, stat } from "node:fs/promises";
import { basename, join } from "node:path";
import { gzipSync } from "node:zlib";

/** @param {string} folder */
export async function sizes(folder) {
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
  const waiting = [...page.matchAll(/["']([^"']+\.js)["']/g)].map(([, path]) =>
    basename(path ?? ""),
  );
  for (let name = waiting.pop(); name !== undefined; name = waiting.pop()) {
    const script = scripts.get(name);
    if (script === undefined || first.has(name)) continue;
    first.add(name);
    waiting.push(...script.imports);
  }
  if (first.size === 0) throw new Error(`${folder}/index.html loads no script`);
  const kilobytes = (/** @type {Iterable<string>} */ names) =>
    [...names].reduce((sum, name) => sum + (scripts.get(name)?.size ?? 0), 0) / 1000;
  return {
    first: kilobytes(first),
    later: kilobytes(scripts.keys()) - kilobytes(first),
    parts: scripts.size - first.size,
    page: (await stat(join(folder, "page.html"))).size / 1000,
  };
}
