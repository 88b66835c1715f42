/** The viewer in Korean: every message, by its English text. Clinic words are the specification's. */
import { frame } from "./frame";
import { keys } from "./keys";
import { sequences } from "./sequences";

export const korean = { ...frame, ...keys, ...sequences };

export type Korean = typeof korean;
