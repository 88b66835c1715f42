/** The viewer in Korean: every message, by its English text. Clinic words are the specification's. */
import { details } from "./details";
import { frame } from "./frame";
import { keys } from "./keys";
import { sequences } from "./sequences";
import { told } from "./told";

export const korean = { ...details, ...frame, ...keys, ...sequences, ...told };

export type Korean = typeof korean;
