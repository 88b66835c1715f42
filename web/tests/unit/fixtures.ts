import { readFileSync } from "node:fs";

const DATA = new URL("../fixtures/data/", import.meta.url);

/** The stored bytes of a table, as the service would send them. */
export function bytes(name: string): ArrayBuffer {
  const buffer = readFileSync(new URL(`${name}.arrow`, DATA));
  return buffer.buffer.slice(buffer.byteOffset, buffer.byteOffset + buffer.byteLength);
}

export function json(name: string): unknown {
  return JSON.parse(readFileSync(new URL(`${name}.json`, DATA), "utf8"));
}

/** Numbers that look random and are the same in every run (mulberry32). */
export function chance(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
