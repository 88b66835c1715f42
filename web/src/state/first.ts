/** What the first picture takes, known from the address alone. */
import { MODELS, submission, type Asked } from "../api/client";
import { sequence } from "../model/sequences";
import { PATIENCE_SECONDS, structural } from "./study.svelte";
import type { Place } from "./url";

/** The models and T1, as `Study.begin` asks for them; nothing where a session is to be opened. */
export function firstAsked(place: Place): readonly Asked[] {
  if (place.session !== null || place.shared !== null) return [];
  return [
    submission(sequence("T1").endpoint, structural(place.model), PATIENCE_SECONDS),
    { path: MODELS },
  ];
}
