import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";

import { colourMaps } from "./scripts/colour-maps.mjs";
import { early } from "./scripts/early.mjs";
import { savedPage } from "./scripts/saved-page.mjs";
import { standIns } from "./scripts/stand-ins.mjs";

// The API that `npm run dev` talks to; the port is the service's default.
const api = process.env["NEURAL_MRI_API"] ?? "http://127.0.0.1:8642";

const EARLY = /src\/(early|api\/(foresight|requests)|state\/first)\.ts/;
const FIRST =
  /node_modules\/(svelte|d3-|internmap|esm-env)|virtual:colour-maps|src\/(main|App|theme|state|model|api|colour|words|render\/(ScanRenderer|hit|paint|tracts)|ui\/(Axial|ColourBar|Corners|ModelPicker|PromptBar|SidePanel|TopBar|Views|format|lines)\.)/;
const LATER =
  /src\/(words\/ko|model\/modes)\/|comparison|difference|api\/events|model\/(cards|operations|section)|keymaps|number-format/;

/** Whether a module belongs to what every visit loads at first. */
function isFirst(id: string): boolean {
  return FIRST.test(id) && !LATER.test(id);
}

export default defineConfig({
  plugins: [colourMaps(), svelte(), early(), savedPage()],
  resolve: { alias: standIns },
  build: {
    target: "es2022",
    // Nothing is inlined as a data: URL, so that the page runs under `default-src 'self'`.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    // One sheet of 10 kB, once, is sooner there than one more request for every part that comes later.
    cssCodeSplit: false,
    reportCompressedSize: false,
    rolldownOptions: {
      output: {
        // What the first picture needs compresses better in one piece than in twenty, and comes sooner.
        codeSplitting: {
          groups: [
            { name: "early", test: EARLY, priority: 1 },
            { name: "viewer", test: isFirst },
          ],
        },
      },
    },
  },
  server: { proxy: { "/api": { target: api, changeOrigin: false } } },
  test: {
    projects: [
      {
        extends: true,
        test: { name: "unit", include: ["tests/unit/**/*.test.ts"], environment: "node" },
      },
      {
        extends: true,
        test: {
          name: "e2e",
          include: ["tests/e2e/**/*.test.ts"],
          environment: "node",
          globalSetup: "tests/e2e/build.ts",
          // A browser mostly waits: two keep two cores busy. They begin once the unit tests are through.
          maxWorkers: 2,
          sequence: { groupOrder: 1 },
          testTimeout: 60_000,
          hookTimeout: 60_000,
        },
      },
    ],
  },
});
