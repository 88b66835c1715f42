/** The first requests. This module is fetched beside the viewer, is smaller, and so is done long before it. */
import { foreseeing } from "./api/foresight";
import { firstAsked } from "./state/first";

/** A fetch that has begun them. */
export const early = foreseeing(firstAsked(location.hash), (input, init) => fetch(input, init));
