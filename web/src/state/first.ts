/**
 * What the first picture takes, known from the address alone. It is asked for by itself, before the rest of the
 * viewer has been fetched: hence it knows of places no more than their names in an address.
 */
import type { Foreseen } from "../api/foresight";
import { MODELS, jobPath, manifestPath, structural, table } from "../api/requests";
import type { JobView, Manifest } from "../api/schema";

/** The tables that a picture is drawn from. T2's are large, and drawn one after another. */
const DRAWN: Readonly<Record<string, readonly string[]>> = {
  T1: ["topology", "parameters"],
  fMRI: ["activations", "tokens", "neurons", "predictions"],
  DTI: ["effects", "metric", "edges"],
  FLAIR: ["tokens", "predictions", "nodes"],
};

/** The models and T1, as `Study.begin` asks for them, and the scans of the address; nothing of a session's. */
export function firstAsked(fragment: string): readonly Foreseen[] {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  if (fields.has("session") || fields.has("shared")) return [];
  return [
    { ...structural(fields.get("model")), leads: finished },
    { path: MODELS },
    ...fields.getAll("job").flatMap(stored),
  ];
}

/** A scan that is finished already has a manifest. */
function finished(answer: unknown): readonly Foreseen[] {
  const { id, state } = answer as JobView;
  if (state !== "succeeded") return [];
  const tables = (DRAWN["T1"] ?? []).map((name) => table(id, name));
  return [{ path: manifestPath(id) }, ...tables];
}

function stored(id: string): readonly Foreseen[] {
  const leads = (answer: unknown) => {
    const { kind, tables } = answer as Manifest;
    const drawn = DRAWN[kind] ?? [];
    return tables.filter(({ name }) => drawn.includes(name)).map(({ name }) => table(id, name));
  };
  return [{ path: jobPath(id) }, { path: manifestPath(id), leads, isGuess: true }];
}
