/** Where a session comes from: what it is called there, and what it means that it is not to be had. */
import { Refusal, explain } from "../api/refusals";
import { t } from "../words/words.svelte";
import type { Where } from "./wire";

/** Where a session comes from, which says what may be done with it. */
export type Origin =
  | { readonly kind: "new" }
  /** One's own; `revision` where an older one than the latest is looked at. */
  | { readonly kind: "own"; readonly id: string; readonly revision: string | null }
  | { readonly kind: "shared"; readonly token: string }
  | { readonly kind: "file"; readonly file: string; readonly bytes: ArrayBuffer };

/** As the service names it. */
export function whereOf(origin: Origin): Where {
  if (origin.kind === "own") return { id: origin.id, revision: origin.revision };
  return { token: origin.kind === "shared" ? origin.token : "" };
}

/** Why a session could not be opened, as where it comes from has it. */
export function whyNot(origin: Origin, error: unknown): string {
  const status = error instanceof Refusal ? error.status : 0;
  if (origin.kind === "own" && status === 404) {
    return origin.revision === null
      ? t(
          "There is no session {id} of yours: it was deleted, or it is somebody else's. Ask for a link to it.",
          { id: origin.id },
        )
      : t("There is no session {id} of yours with this revision.", { id: origin.id });
  }
  if (origin.kind === "shared" && (status === 404 || status === 400)) {
    return t("This link leads nowhere: it has expired, was revoked, or is not whole.");
  }
  return explain(error);
}
