import { expect, test } from "vitest";

import { MAP_NAMES } from "../../src/colour/lut";
import { LAYOUT_NAMES } from "../../src/model/layout";
import { SEQUENCES } from "../../src/model/sequences";
import { PANEL_NAMES, type Views } from "../../src/model/views";
import { START, decode, encode, type Place } from "../../src/state/url";
import { chance } from "./fixtures";

const random = chance(7);

function pick<T>(all: readonly T[]): T {
  return all[Math.floor(random() * all.length)] as T;
}

const PROMPTS = ["", "The Eiffel Tower is in", "a&b=c#d?e%20 +", "에펠탑은 🗼", ' "quoted"\n'];

function place(): Place {
  return {
    sequence: pick(SEQUENCES).id,
    model: pick([null, "smollm2-135m-instruct", "org/name.v1"]),
    job: pick([null, "01930000-0000-7000-8000-00000000000a"]),
    prompt: pick(PROMPTS),
    token: Math.floor(random() * 500),
    focus: pick([null, "embed", "blocks.3.attn.head_7", "blocks.29.mlp"]),
    layout: pick(LAYOUT_NAMES),
    panel: pick(PANEL_NAMES),
    views: Object.fromEntries(
      SEQUENCES.map(({ id }) => [
        id,
        {
          map: pick(MAP_NAMES),
          scale: pick(["log", "linear"] as const),
          inverted: random() < 0.5,
          window:
            random() < 0.3 ? null : { level: (random() - 0.5) * 1e4, width: random() * 1e3 + 1e-7 },
        },
      ]),
    ) as unknown as Views,
  };
}

test("200 random views come back from their addresses as they were", () => {
  for (let i = 0; i < 200; i++) {
    const there = place();
    expect(decode(`#${encode(there)}`)).toEqual(there);
  }
});

test("the view a visitor begins with has an empty address", () => {
  expect(encode(START)).toBe("");
  expect(decode("")).toEqual(START);
});

test("an address that says nonsense shows the default, not an error", () => {
  const nonsense = "seq=T9&token=-3&layout=cube&panel=x&fMRI.map=mud&fMRI.scale=cube&fMRI.wl=0,1";
  expect(decode(nonsense)).toEqual(START);
  expect(decode("fMRI.wl=,").views.fMRI.window).toBeNull();
});
