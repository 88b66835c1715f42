import process from "node:process";

import { build } from "vite";

/** What the tests look at is what is shipped: the built viewer, not the one for tests that Vite would make. */
export default async function setup(): Promise<void> {
  const { NODE_ENV } = process.env;
  process.env["NODE_ENV"] = "production";
  try {
    await build({ logLevel: "error" });
  } finally {
    if (NODE_ENV !== undefined) process.env["NODE_ENV"] = NODE_ENV;
  }
}
