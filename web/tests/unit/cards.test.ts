import { expect, test } from "vitest";

import { FIRST_QUANTITY, cardOf } from "../../src/model/cards";
import { SEQUENCES } from "../../src/model/sequences";

test("every sequence says what it measures, by which formula, and where", () => {
  for (const { id, needsPrompt } of SEQUENCES) {
    const card = cardOf(id, FIRST_QUANTITY[id]);
    expect(card?.measures, id).toBeTruthy();
    expect(card?.formula, id).toBeTruthy();
    // What reads a prompt runs the model, and so has a place in it.
    expect(card?.hook !== "", id).toBe(needsPrompt);
  }
});
