/** Writes a .gz beside every text file of a build, so that a server need not compress at each request. */
import { readFile, readdir, writeFile } from "node:fs/promises";
import { extname, join } from "node:path";
import { gzipSync } from "node:zlib";

const [folder = "dist"] = process.argv.slice(2);
const TEXT = new Set([".html", ".js", ".css", ".svg", ".json"]);

for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
  if (!entry.isFile() || !TEXT.has(extname(entry.name))) continue;
  const file = join(entry.parentPath, entry.name);
  await writeFile(`${file}.gz`, gzipSync(await readFile(file), { level: 9 }));
}
