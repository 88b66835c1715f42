/**
 * Results that sessions keep, read whole and held here. The viewer asks for scans by their jobs; a kept one is
 * asked for by its hash, and answered without the service: it may have neither the job any more nor a worker.
 */
import { readTable } from "../api/arrow";
import { ARROW_FILE } from "../api/requests";
import type { Architecture, JobView, ModelInfo } from "../api/schema";
import { t } from "../words/words.svelte";
import { alone, type KeptResult, type NmriFile } from "./nmri";
import type { SavedScan } from "./wire";

interface Kept {
  readonly scan: SavedScan;
  readonly result: KeptResult;
}

const OURS = /^\/api\/jobs\/([0-9a-f]{64})(?:\/(manifest|result|attention)(?:\/(.+))?)?$/;

export function isKept(job: string): boolean {
  return /^[0-9a-f]{64}$/.test(job);
}

export class Shelf {
  readonly #kept = new Map<string, Kept>();
  /** Jobs whose results a session names by now, and that the service still has. */
  readonly #jobs = new Map<string, string>();

  take({ document, results }: NmriFile): void {
    for (const scan of document.scans) {
      const result = results.get(scan.result);
      if (result !== undefined) this.#kept.set(scan.result, { scan, result });
    }
  }

  /** A result that has just been saved: its tables are where its job has them. */
  name(result: string, job: string): void {
    this.#jobs.set(result, job);
  }

  /** Whether a result can be shown: it is held here, or its job is known. */
  has(result: string): boolean {
    return this.#kept.has(result) || this.#jobs.has(result);
  }

  /** The job that the service still has of a result, as far as it is known. */
  jobOf(result: string): string | null {
    return this.#jobs.get(result) ?? null;
  }

  /** What the service would answer; where else to ask; or null for what is no matter of a session. */
  answer(path: string, init: RequestInit | undefined): Response | string | null {
    if (path === "/api/scan/structural" && init?.method === "POST") return this.#structure(init);
    const [, digest = "", what, rest = ""] = OURS.exec(path) ?? [];
    const kept = this.#kept.get(digest);
    if (kept === undefined) {
      const job = this.#jobs.get(digest);
      return job === undefined ? null : path.replace(digest, job);
    }
    if (what === undefined) return Response.json(jobOf(kept));
    if (what === "manifest") return new Response(kept.result.body);
    const name = what === "attention" ? `attention.${rest}` : decodeURIComponent(rest);
    const body = chunk(kept.result, name);
    return body === null
      ? refusal(t("The session holds no table {name} of this scan", { name }))
      : new Response(body, { headers: { "Content-Type": ARROW_FILE } });
  }

  /** T1 of a model, where a session keeps it. */
  #structure({ body }: RequestInit): Response | null {
    const { model } = JSON.parse(typeof body === "string" ? body : "{}") as { model?: string };
    const found = [...this.#kept.values()].find(
      ({ scan }) => scan.kind === "T1" && scan.model === model,
    );
    return found === undefined ? null : Response.json(jobOf(found));
  }

  /** The models whose scans are kept, as far as their scans tell. */
  models(): readonly ModelInfo[] {
    const found = new Map<string, ModelInfo>();
    const told = (kept: Kept) => kept.scan.kind === "T1";
    // T1 knows the whole shape; what another scan knows of it is what its rows are.
    const kept = [...this.#kept.values()].sort((a, b) => Number(told(b)) - Number(told(a)));
    for (const each of kept) {
      if (found.has(each.scan.model)) continue;
      const info = modelOf(each);
      if (info !== null) found.set(each.scan.model, info);
    }
    return [...found.values()];
  }
}

function chunk({ manifest, chunks }: KeptResult, name: string): ArrayBuffer | null {
  const ref = manifest.tables.find((table) => table.name === name);
  const body = ref === undefined ? undefined : chunks.get(ref.chunk);
  return body === undefined ? null : alone(body);
}

function refusal(title: string): Response {
  const headers = { "Content-Type": "application/problem+json" };
  return new Response(JSON.stringify({ title, status: 404 }), { status: 404, headers });
}

function jobOf({ scan, result }: Kept): JobView {
  return {
    id: scan.result,
    kind: "scan",
    state: "succeeded",
    model: scan.model,
    revision: scan.revision,
    request: { ...scan.request, scan_mode: scan.kind },
    cached: true,
    attempt: 1,
    created_at: result.manifest.created_at,
    started_at: null,
    finished_at: result.manifest.created_at,
    problem: null,
    links: {},
  };
}

/** What a scan tells of its model: T1 everything, another one how many layers and heads it has. */
function modelOf({ scan, result }: Kept): ModelInfo | null {
  const { manifest } = result;
  const known = scan.kind === "T1" ? told(result) : null;
  const architecture = known?.architecture ?? counted(result);
  if (architecture === null) return null;
  return {
    name: scan.model,
    source: "session",
    revision: scan.revision,
    architecture,
    n_parameters: known?.n_parameters ?? NaN,
    weights_bytes: 0,
    quantization: null,
    numerics: manifest.numerics,
    state: "available",
    default: false,
    memory_bytes: manifest.memory_bytes,
  };
}

interface Told {
  readonly architecture: Architecture | null;
  readonly n_parameters: number;
}

function told(result: KeptResult): Told | null {
  const body = chunk(result, "topology");
  if (body === null) return null;
  const said = JSON.parse(readTable(body).metadata.get("neural_mri") ?? "{}") as {
    readonly parameters?: Partial<Told>;
  };
  const { architecture, n_parameters } = said.parameters ?? {};
  return architecture == null ? null : { architecture, n_parameters: n_parameters ?? NaN };
}

/** Layers and heads, counted in the first table that has components. */
function counted(result: KeptResult): Architecture | null {
  let [layers, heads] = [0, 0];
  for (const { name } of result.manifest.tables) {
    const body = chunk(result, name);
    const column = body === null ? undefined : readTable(body).columns.get("component");
    if (column?.kind !== "texts") continue;
    for (const component of column.values) {
      const place = /^blocks\.(\d+)\.(?:attn\.head_(\d+))?/.exec(component);
      layers = Math.max(layers, Number(place?.[1] ?? -1) + 1);
      heads = Math.max(heads, Number(place?.[2] ?? -1) + 1);
    }
  }
  return layers === 0 || heads === 0 ? null : bare(layers, heads);
}

/** A shape of which nothing else is known. */
function bare(layers: number, heads: number): Architecture {
  return {
    family: "",
    n_layers: layers,
    n_heads: heads,
    n_kv_heads: heads,
    d_model: NaN,
    d_head: NaN,
    d_mlp: NaN,
    d_vocab: NaN,
    n_ctx: NaN,
    activation: "",
    gated_mlp: false,
    norm: "",
    parallel_blocks: false,
    tied_embeddings: false,
    positions: "",
  };
}
