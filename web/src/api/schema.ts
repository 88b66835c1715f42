/**
 * What the service sends and takes, as `neural_mri/contract` has it. Only what the viewer reads.
 * Names are the wire's; nothing is renamed on the way in.
 */

export interface Architecture {
  readonly family: string;
  readonly n_layers: number;
  readonly n_heads: number;
  readonly n_kv_heads: number;
  readonly d_model: number;
  readonly d_head: number;
  readonly d_mlp: number;
  readonly d_vocab: number;
  readonly n_ctx: number;
  readonly activation: string;
  readonly gated_mlp: boolean;
  readonly norm: string;
  readonly parallel_blocks: boolean;
  readonly tied_embeddings: boolean;
  readonly positions: string;
}

export interface Numerics {
  readonly dtype: string;
  readonly device: string;
  readonly attention: string;
}

export type ModelState = "available" | "loading" | "resident" | "unloading";

export interface ModelInfo {
  readonly name: string;
  readonly source: string;
  readonly revision: string;
  readonly architecture: Architecture;
  readonly n_parameters: number;
  readonly weights_bytes: number;
  readonly quantization: string | null;
  readonly numerics: Numerics;
  readonly state: ModelState;
  readonly default: boolean;
  /** Memory the model takes on its device, where a worker holds it. */
  readonly memory_bytes: number | null;
}

export type JobState =
  | "queued"
  | "claimed"
  | "loading"
  | "running"
  | "storing"
  | "succeeded"
  | "failed"
  | "cancelled"
  | "expired"
  | "quarantined";

/** Where a waiting job stands, as things are. */
export interface QueuePlace {
  /** 1 for the next to be taken. */
  readonly position: number;
  /** From now; null where nobody can tell. */
  readonly estimated_start_seconds: number | null;
}

/** Who a request comes from, as the service sees it. */
export interface Identity {
  readonly user: string;
  readonly scopes: readonly string[];
  /** The id of the key it came with; null where the service asks for none. */
  readonly key: string | null;
  readonly expires_at: string | null;
}

/** RFC 9457 problem details; other members may stand beside these. */
export interface Problem {
  readonly type?: string;
  readonly title: string;
  readonly status?: number;
  readonly detail?: string;
}

export interface JobView {
  readonly id: string;
  readonly kind: "scan" | "load" | "unload";
  readonly state: JobState;
  readonly model: string;
  readonly revision: string;
  readonly request: Readonly<Record<string, unknown>>;
  readonly cached: boolean;
  /** Whether an equal scan that was under way computes, or computed, this result. */
  readonly coalesced?: boolean;
  readonly attempt: number;
  readonly created_at: string;
  readonly started_at: string | null;
  readonly finished_at: string | null;
  /** While it waits. */
  readonly queue?: QueuePlace | null;
  readonly problem: Problem | null;
  readonly links: Readonly<Record<string, string>>;
}

export interface TableRef {
  readonly name: string;
  readonly table: string;
  readonly chunk: string;
  readonly bytes: number;
  readonly rows: number;
  readonly unit: string;
}

export interface Manifest {
  readonly version: number;
  readonly scan_key: string;
  readonly kind: string;
  readonly model: string;
  readonly revision: string;
  readonly numerics: Numerics;
  readonly scanner_version: string;
  readonly request: Readonly<Record<string, unknown>>;
  readonly prompt_tokens: readonly string[];
  readonly tables: readonly TableRef[];
  readonly created_at: string;
  readonly forward_seconds: number;
  readonly compute_seconds: number;
  readonly memory_bytes: number;
}

/** Where a table's numbers come from: JSON in its own Arrow schema metadata, key `neural_mri`. */
export interface Provenance {
  readonly table: string;
  readonly version: string;
  readonly unit: string;
  readonly method: string;
  readonly positions: readonly number[] | null;
  readonly parameters: Readonly<Record<string, unknown>>;
  readonly model: string;
  readonly revision: string;
  readonly scan_key: string;
}

/** A prompt as the model reads it; `texts` merges halves of characters for reading. */
export interface Tokens {
  readonly ids: readonly number[];
  readonly texts: readonly string[];
}

export interface StateChanged {
  readonly type: "state";
  readonly state: JobState;
  readonly attempt: number;
}

/** Where the waiting job stands now; never repeated to who comes later. */
export interface Queued extends QueuePlace {
  readonly type: "queue";
}

export interface Progress {
  readonly type: "progress";
  readonly stage: string;
  readonly done: number;
  readonly total: number;
}

export interface LayerFrame {
  readonly type: "layer_frame";
  readonly layer: number;
  readonly token_idx: number;
  readonly heads: readonly number[];
  readonly mlp: number | null;
  readonly attn: number | null;
  readonly resid_post: number | null;
  readonly unit: string;
}

export interface ActivationFrame {
  readonly type: "activation_frame";
  readonly token_idx: number;
  readonly token: string;
  readonly layers: readonly {
    readonly layer_id: string;
    readonly type: string;
    readonly activations: readonly number[];
  }[];
  readonly unit: string;
}

/** Effects on a circuit scan's metric: estimates of all first, then what was measured. */
export interface EffectsFrame {
  readonly type: "effects_frame";
  readonly exact: boolean;
  readonly components: readonly string[];
  readonly effects: readonly number[];
  readonly unit: string;
}

export interface Artifact {
  readonly type: "artifact";
  readonly table: string;
  readonly url: string;
  readonly bytes: number;
}

export interface Reset {
  readonly type: "reset";
  readonly state: JobState;
  readonly attempt: number;
}

/** The last event of every stream. */
export interface Ended {
  readonly type: "ended";
  readonly state: JobState;
  readonly attempt: number;
  readonly cached: boolean;
  readonly result: string | null;
  readonly problem: Problem | null;
}

export type JobEvent =
  | StateChanged
  | Queued
  | Progress
  | LayerFrame
  | ActivationFrame
  | EffectsFrame
  | Artifact
  | Reset
  | Ended;
