/** Prompts to begin with. */

/** Of each pair, both prompts have as many tokens in the models that are bundled. */
export interface Example {
  readonly prompt: string;
  readonly corrupt: string;
  readonly answer: string;
  readonly foil: string;
}

export const EIFFEL: Example = {
  prompt: "The Eiffel Tower is located in the city of",
  corrupt: "The Big Ben Tower is located in the city of",
  answer: "Paris",
  foil: "London",
};

export const EXAMPLES: readonly Example[] = [
  EIFFEL,
  {
    prompt: "When Mary and John went to the store, John gave a drink to",
    corrupt: "When Mary and John went to the store, Mary gave a drink to",
    answer: "Mary",
    foil: "John",
  },
];
