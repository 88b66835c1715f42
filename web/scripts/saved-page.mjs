/**
 * The empty page of which saved pages are made: the whole viewer in one HTML file, compressed, with a place
 * for a viewing. It is built beside the viewer, from the same sources, and opens from a disk.
 */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

import { svelte } from "@sveltejs/vite-plugin-svelte";
import { build } from "vite";

import { colourMaps } from "./colour-maps.mjs";
import { dense, densely } from "./dense.mjs";
import { standIns } from "./stand-ins.mjs";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const NAME = "page.html";

/** What a page without a service has no use for. */
const ABSENT =
  /\/(Login|QuestionForm|StimulusForm|TraceForm|Waiting|Tour)\.svelte$|\/api\/events\.ts$|\/export\/(film|page)\.ts$|\/words\/ko\/index\.ts$|\/sessions\/(Listing|Beside|sessions)\.svelte(\.ts)?$/;

/** @returns {import("vite").Plugin} */
export function savedPage() {
  let folder = "dist";
  return {
    name: "saved-page",
    apply: "build",
    configResolved: (config) => {
      folder = join(config.root, config.build.outDir);
    },
    closeBundle: async () => {
      await writeFile(join(folder, NAME), await page());
    },
  };
}

async function page() {
  const { code, style } = await bundled();
  const icon = await readFile(join(ROOT, "public/icon.svg"), "base64");
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; media-src blob:">
<title>Neural MRI</title>
<link rel="icon" href="data:image/svg+xml;base64,${icon}">
</head>
<body>
<div id="viewer"></div>
<noscript>The Neural MRI viewer draws scans with JavaScript; please switch it on.</noscript>
<script type="text/plain" id="style">${packed(style)}</script>
<script type="text/plain" id="code">${packed(code)}</script>
<script type="text/plain" id="viewing"></script>
<script>
${dense}
(async () => {
  const text = async (id) => {
    const bytes = dense(document.getElementById(id).textContent);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  for (const [id, name] of [["style", "style"], ["code", "script"]]) {
    const made = document.createElement(name);
    if (name === "script") made.type = "module";
    made.textContent = await text(id);
    document.head.append(made);
  }
})();
</script>
</body>
</html>
`;
}

async function bundled() {
  const result = await build({
    root: ROOT,
    configFile: false,
    logLevel: "error",
    plugins: [absent(), colourMaps(), svelte(), atOnce()],
    resolve: { alias: standIns },
    build: {
      write: false,
      target: "es2022",
      cssCodeSplit: false,
      modulePreload: false,
      reportCompressedSize: false,
      rollupOptions: {
        input: join(ROOT, "src/export/offline.ts"),
        output: { codeSplitting: false },
      },
    },
  });
  if (!("output" in result)) throw new Error("One bundle was expected");
  const chunk = result.output.find((part) => part.type === "chunk");
  const sheet = result.output.find((part) => part.fileName.endsWith(".css"));
  if (chunk?.type !== "chunk" || sheet?.type !== "asset") throw new Error("No script or no style");
  // The face is as large as a third of the page: the reader's own monospace stands in for it.
  const style = String(sheet.source).replace(/@font-face\s*{[^}]*}/g, "");
  return { code: chunk.code, style };
}

/** @returns {import("vite").Plugin} */
function absent() {
  const NOTHING = "\0nothing";
  return {
    name: "absent",
    enforce: "pre",
    resolveId: async function (source, importer) {
      const found = await this.resolve(source, importer, { skipSelf: true });
      return found !== null && ABSENT.test(found.id) ? NOTHING : null;
    },
    load: (id) =>
      id === NOTHING
        ? "export default function Nothing() {}\nexport const follow = Nothing, record = Nothing, canFilm = () => false, pageOf = Nothing, gather = Nothing, viewingIn = Nothing, Sessions = Nothing, korean = null;"
        : null,
  };
}

/**
 * What is fetched later elsewhere stands in the page from the beginning: a bundle in one piece would keep
 * every such module, and all that it might use of Svelte, apart and whole.
 * @returns {import("vite").Plugin}
 */
function atOnce() {
  return {
    name: "at-once",
    enforce: "post",
    transform: (code, id) => {
      if (!id.startsWith(join(ROOT, "src"))) return null;
      /** @type {string[]} */
      const imports = [];
      const changed = code.replaceAll(/\bimport\((["'])([^"']+)\1\)/g, (_, quote, path) => {
        const name = `__later${imports.length}`;
        imports.push(`import * as ${name} from ${quote}${path}${quote};`);
        return `Promise.resolve(${name})`;
      });
      return imports.length === 0 ? null : { code: `${imports.join("\n")}\n${changed}`, map: null };
    },
  };
}

/** @param {string} text */
function packed(text) {
  return densely(gzipSync(text, { level: 9 }));
}
