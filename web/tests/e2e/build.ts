import { build } from "vite";

/** What the tests look at is what is shipped: the built viewer. */
export default async function setup(): Promise<void> {
  await build({ logLevel: "warn" });
}
