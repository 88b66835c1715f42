import { fileURLToPath } from "node:url";

import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";

import { colourMaps } from "./scripts/colour-maps.mjs";

// The API that `npm run dev` talks to; the port is the service's default.
const api = process.env["NEURAL_MRI_API"] ?? "http://127.0.0.1:8642";

export default defineConfig({
  plugins: [colourMaps(), svelte()],
  resolve: {
    // d3-scale interpolates anything, colours included; ours map numbers to numbers, and the rest of
    // d3-interpolate with d3-color would be a tenth of what the browser loads.
    alias: {
      "d3-interpolate": fileURLToPath(new URL("src/model/interpolate.ts", import.meta.url)),
    },
  },
  build: {
    target: "es2022",
    // Nothing is inlined as a data: URL, so that the page runs under `default-src 'self'`.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
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
          fileParallelism: false,
          testTimeout: 60_000,
          hookTimeout: 60_000,
        },
      },
    ],
  },
});
