import { expect, test } from "vitest";

import { Log } from "../../src/state/log.svelte";

test("the end of the T1 that comes with every page hides nothing that is looked at", () => {
  const log = new Log();
  log.add("FLAIR scan complete.", "note", "FLAIR");
  log.add("T1 scan complete.", "note", "T1");
  expect(log.latest("FLAIR")?.text).toBe("FLAIR scan complete.");
  expect(log.latest("T1")?.text).toBe("T1 scan complete.");
  expect(log.latest(null)?.text).toBe("T1 scan complete.");
  log.add("The connection was lost.", "error");
  expect(log.latest("FLAIR")?.text).toBe("The connection was lost.");
});

test("where nothing else was told, the end of T1 is told", () => {
  const log = new Log();
  expect(log.latest("fMRI")).toBeUndefined();
  log.add("T1 scan complete.", "note", "T1");
  expect(log.latest("fMRI")?.text).toBe("T1 scan complete.");
});
