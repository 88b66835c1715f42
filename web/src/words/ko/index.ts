/** The viewer in Korean: every message, by its English text. Clinic words are the specification's. */
import { cards } from "./cards";
import { details } from "./details";
import { leaving } from "./export";
import { frame } from "./frame";
import { hanging } from "./hanging";
import { keys } from "./keys";
import { sequences } from "./sequences";
import { sessions } from "./sessions";
import { stimulation } from "./stimulation";
import { told } from "./told";
import { tour } from "./tour";

export const korean = {
  ...cards,
  ...details,
  ...frame,
  ...hanging,
  ...keys,
  ...leaving,
  ...sequences,
  ...sessions,
  ...stimulation,
  ...told,
  ...tour,
};

export type Korean = typeof korean;
