/** The viewer in Korean: every message, by its English text. Clinic words are the specification's. */
import { details } from "./details";
import { leaving } from "./export";
import { frame } from "./frame";
import { hanging } from "./hanging";
import { keys } from "./keys";
import { sequences } from "./sequences";
import { told } from "./told";
import { tour } from "./tour";

export const korean = {
  ...details,
  ...frame,
  ...hanging,
  ...keys,
  ...leaving,
  ...sequences,
  ...told,
  ...tour,
};

export type Korean = typeof korean;
