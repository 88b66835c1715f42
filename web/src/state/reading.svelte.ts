/**
 * What is on the screen now, derived: the series, its values at the token, their ranks, the window and
 * the focused component. Everything that shows a number or a colour reads it here, so that they agree.
 */
import { lut, type Lut } from "../colour/lut";
import { automatic, coordinates, type Window } from "../colour/window";
import type { Token } from "../api/frames";
import type { Series } from "../model/series";
import { sequence, type Sequence } from "../model/sequences";
import type { Topology } from "../model/topology";
import { ranks, type Volume } from "../model/volume";
import type { Crosshair } from "./crosshair.svelte";
import type { Display } from "./display.svelte";
import { shown, type SeriesState, type Study } from "./study.svelte";

export class Reading {
  readonly #study: Study;
  readonly #display: Display;
  readonly #crosshair: Crosshair;

  constructor(study: Study, display: Display, crosshair: Crosshair) {
    this.#study = study;
    this.#display = display;
    this.#crosshair = crosshair;
  }

  readonly sequence: Sequence = $derived.by(() => sequence(this.#display.sequence));
  readonly topology: Topology | null = $derived.by(() => this.#study.topology);
  readonly state: SeriesState = $derived.by(() => this.#study.series[this.#display.sequence]);
  readonly series: Series | null = $derived.by(() => shown(this.state));
  readonly volume: Volume | null = $derived.by(() => this.series?.volume ?? null);
  readonly tokens: readonly Token[] = $derived.by(() => this.series?.tokens ?? []);

  /** Column of the volume that is shown, always one it has. */
  readonly column: number = $derived.by(() => {
    const width = this.volume?.width ?? 0;
    return Math.max(0, Math.min(width - 1, this.#crosshair.token));
  });
  readonly token: Token | null = $derived.by(() => this.tokens[this.column] ?? null);

  /** Each node's value at the token; NaN where nothing was measured. */
  readonly values: Float64Array = $derived.by(() => {
    const addresses = this.topology?.addresses ?? [];
    const volume = this.volume;
    return volume === null
      ? new Float64Array(addresses.length).fill(NaN)
      : volume.slice(addresses, this.column);
  });
  readonly ranks: Uint32Array = $derived.by(() => ranks(this.values));
  readonly measured: number = $derived.by(() => {
    return this.ranks.reduce((count, rank) => count + (rank > 0 ? 1 : 0), 0);
  });

  /** Coordinates of every node at every token but the attention sinks, sorted. */
  readonly distribution: Float64Array = $derived.by(() => {
    const { topology, volume } = this;
    if (topology === null || volume === null) return new Float64Array(0);
    return coordinates(nodeValues(topology, volume, this.tokens), this.#display.view.scale);
  });
  readonly automatic: Window = $derived.by(() => {
    return automatic(this.distribution, this.sequence.tail);
  });
  readonly window: Window = $derived.by(() => this.#display.view.window ?? this.automatic);
  readonly lut: Lut = $derived.by(() => {
    return lut(this.#display.view.map, this.#display.view.inverted);
  });

  /** The node looked at: the one under the pointer, else the locked one; -1 for none. */
  readonly focus: number = $derived.by(() => this.#nodeOf(this.#crosshair.focus));
  readonly locked: number = $derived.by(() => this.#nodeOf(this.#crosshair.locked));

  #nodeOf(component: string | null): number {
    return component === null ? -1 : (this.topology?.indexOf.get(component) ?? -1);
  }

  /**
   * Where the largest value stands among the layers; -1 for none. The ends are not compared with them:
   * an embedding has more parameters, and logits larger norms, whatever is scanned.
   */
  hottest(): number {
    return this.ordered().find((node) => this.#isInside(node)) ?? -1;
  }

  #isInside(node: number): boolean {
    const kind = this.topology?.kinds[node];
    return kind === "head" || kind === "mlp";
  }

  /** The nodes from the largest value down. */
  ordered(): number[] {
    return [...this.ranks.keys()]
      .filter((node) => (this.ranks[node] ?? 0) > 0)
      .sort((a, b) => (this.ranks[a] ?? 0) - (this.ranks[b] ?? 0));
  }
}

/** As many values as tell their distribution; a longer scan is sampled at regular steps. */
const SAMPLE = 20_000;

function* nodeValues(
  topology: Topology,
  volume: Volume,
  tokens: readonly Token[],
): Generator<number> {
  // Where every token is a sink (a prompt of one token) there is nothing else to go by.
  const all = tokens.every((token) => token.sink);
  const columns = Array.from({ length: volume.width }, (_, column) => column).filter(
    (column) => all || tokens[column]?.sink !== true,
  );
  let step = Math.max(1, Math.ceil((topology.size * columns.length) / SAMPLE));
  // A step that has a factor in common with the row would meet the same tokens in every row.
  while (commonFactor(step, columns.length) > 1) step++;
  let skip = 0;
  for (const address of topology.addresses) {
    const profile = volume.profile(address);
    if (profile === null) continue;
    for (; skip < columns.length; skip += step) yield profile[columns[skip] ?? 0] ?? NaN;
    skip -= columns.length;
  }
}

function commonFactor(a: number, b: number): number {
  return b === 0 ? a : commonFactor(b, a % b);
}
