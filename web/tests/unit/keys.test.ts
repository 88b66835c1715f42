import { expect, test } from "vitest";

import { SEQUENCES } from "../../src/model/sequences";
import { KEY_MAPS, keyMap, keysOf, unreachable } from "../../src/state/keymaps";
import { BINDINGS, REPEATED, actionOf, keyCap, type Pressed } from "../../src/state/keys";

function press(key: string, modifiers: Partial<Pressed> = {}): Pressed {
  return { key, shiftKey: false, ctrlKey: false, altKey: false, metaKey: false, ...modifiers };
}

test("no key means two things", () => {
  const keys = BINDINGS.flatMap((binding) => binding.keys);
  expect(new Set(keys).size).toBe(keys.length);
});

test("every listed key does what the list says", () => {
  for (const { keys, action } of BINDINGS) {
    for (const key of keys) {
      const shifted = key.startsWith("Shift+");
      const pressed = shifted ? press(key.slice(6).toUpperCase(), { shiftKey: true }) : press(key);
      expect(actionOf(pressed)).toBe(action);
    }
  }
});

test("every sequence has its key", () => {
  for (const { id, key } of SEQUENCES) expect(actionOf(press(key))).toBe(`sequence:${id}`);
});

test("chords belong to the browser", () => {
  expect(actionOf(press("r", { ctrlKey: true }))).toBeNull();
  expect(actionOf(press("r", { metaKey: true }))).toBeNull();
  expect(actionOf(press("ArrowLeft", { altKey: true }))).toBeNull();
});

test("a key that is held moves on and on, and does anything else once", () => {
  const moving = BINDINGS.flatMap(({ action }) => (REPEATED.test(action) ? action : []));
  expect(moving).toContain("left");
  expect(moving).toContain("next-token");
  expect(moving).toContain("wider");
  for (const once of ["save", "mark", "play", "note", "map", "next-protocol", "sequence:T1"]) {
    expect(moving).not.toContain(once);
  }
});

test("letters of another script mean what stands in their place, and nothing else does", () => {
  expect(actionOf(press("р", { code: "KeyH" }))).toBe("hottest");
  expect(actionOf(press("Р", { code: "KeyH", shiftKey: true }))).toBe("strongest-head");
  expect(actionOf(press("σ", { code: "KeyS" }))).toBe("scale");
  expect(actionOf(press("ㅔ", { code: "KeyP" }))).toBe("stimulate");
  // A Latin letter means itself wherever it stands, and so do signs.
  expect(actionOf(press("a", { code: "KeyQ" }))).toBe("automatic");
  expect(actionOf(press("/", { code: "KeyQ" }))).toBe("prompt");
  expect(actionOf(press("é", { code: "Digit2" }))).toBeNull();
  expect(actionOf(press("Dead", { code: "KeyH" }))).toBeNull();
});

test("signs that need Shift on some keyboards work either way", () => {
  expect(actionOf(press("?", { shiftKey: true }))).toBe("help");
  expect(actionOf(press("/"))).toBe("prompt");
});

test("keys are shown as they are printed", () => {
  expect(keyCap(" ")).toBe("Space");
  expect(keyCap("Shift+o")).toBe("Shift O");
  expect(keyCap("ArrowUp")).toBe("↑");
});

test("every action has a key in every key map, and no key two meanings", () => {
  for (const map of KEY_MAPS) {
    expect(unreachable(map), map.id).toEqual([]);
    const keys = BINDINGS.flatMap((binding) => keysOf(binding, map));
    expect(new Set(keys).size, map.id).toBe(keys.length);
  }
});

test("a reading room's keys: up and down scroll the stack, c plays, Shift moves the crosshair", () => {
  const { differs } = keyMap("ohif");
  const press = (key: string, shiftKey = false) =>
    actionOf({ key, shiftKey, ctrlKey: false, altKey: false, metaKey: false }, differs);
  expect(press("ArrowDown")).toBe("next-token");
  expect(press("ArrowDown", true)).toBe("down");
  expect(press("c")).toBe("play");
  expect(press("1")).toBe("sequence:T1");
});
