import { expect, test } from "vitest";

import { MAP_NAMES } from "../../src/colour/lut";
import { LAYOUT_NAMES } from "../../src/model/layout";
import { WHOLE, clampZoom } from "../../src/model/layout/zoom";
import { PRIOR_KINDS, PROTOCOL_IDS } from "../../src/model/protocols";
import { METHODS } from "../../src/model/question";
import { SEQUENCES } from "../../src/model/sequences";
import type { Stimulus } from "../../src/model/stimulus";
import { PANEL_NAMES, VIEW_IDS, type Views } from "../../src/model/views";
import { SAGITTAL_COLUMNS } from "../../src/state/display.svelte";
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
    jobs: pick([[], ["01930000-0000-7000-8000-00000000000a"], ["a1", "b2", "c3"]]),
    prompt: pick(PROMPTS),
    question: {
      answer: pick(["", "Paris", " Paris"]),
      foil: pick(["", "&="]),
      corrupt: pick(PROMPTS),
      method: pick(METHODS).id,
    },
    stimuli: pick<readonly Stimulus[]>([
      [],
      [
        { operation: "zero", component: "blocks.3.mlp" },
        { operation: "amplify", component: "blocks.0.attn.head_11", factor: -2.5 },
        { operation: "noise", component: "embed", sigma: 0.5, token_positions: [0, 7] },
      ],
      [
        { operation: "noise", component: "blocks.2.resid_mid", sigma: 2, draws: 4, seed: 11 },
        { operation: "inject", component: "blocks.3.mlp.neuron_7", mode: "add", values: [-1.5e-7] },
        {
          operation: "inject",
          component: "blocks.3.attn.head_7",
          mode: "replace",
          values: [0.25, -3, 1e21],
          token_positions: [4],
        },
        { operation: "patch", component: "blocks.1.attn", source_prompt: "a ~ b & c = 에펠" },
      ],
    ]),
    tracts: Math.ceil(random() * 300),
    token: Math.floor(random() * 500),
    focus: pick([null, "embed", "blocks.3.attn.head_7", "blocks.29.mlp"]),
    layout: pick(LAYOUT_NAMES),
    protocol: pick(PROTOCOL_IDS),
    swapped: random() < 0.3,
    sagittal: pick(SAGITTAL_COLUMNS),
    folded: random() < 0.3,
    zoom: random() < 0.5 ? WHOLE : clampZoom({ scale: 1 + random() * 9, x: random(), y: random() }),
    prior: {
      kind: pick(PRIOR_KINDS),
      prompt: pick(PROMPTS),
      model: pick([null, "org/name.v1"]),
      jobs: pick([[], ["01930000-0000-7000-8000-00000000000b"], ["d4", "e5"]]),
    },
    panel: pick(PANEL_NAMES),
    session: pick([null, "01a208e5-620a-7f6d-98da-3f510d18b436"]),
    revision: pick([null, "ab".repeat(32)]),
    shared: pick([null, "AbCd_efGh-1234567890XY"]),
    beside: pick([null, "01a208e5-620a-7f6d-98da-3f510d18b437"]),
    views: Object.fromEntries(
      VIEW_IDS.map((id) => [
        id,
        {
          field: pick([null, "z", "estimate"]),
          map: pick([null, ...MAP_NAMES]),
          scale: pick([null, "log", "linear", "size"] as const),
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
  const nonsense =
    "hang=upside-down&cut=across&zoom=4,x&prior=oracle&do=explode~blocks.1.mlp&do=zero~unembed&do=inject~blocks.1.mlp~add~~x&do=patch~embed&method=magic&tracts=-1&seq=T9&token=-3&layout=cube&panel=x&fMRI.map=mud&fMRI.scale=cube&fMRI.wl=0,1";
  expect(decode(nonsense)).toEqual(START);
  expect(decode("fMRI.wl=,").views.fMRI.window).toBeNull();
});
