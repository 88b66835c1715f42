// Maps and sets here are made and read within one derivation, so none need be reactive itself.
/* eslint-disable svelte/prefer-svelte-reactivity */
/**
 * What is on the screen now, derived: the series, its values at the token, their ranks, the window and
 * the focused component. Everything that shows a number or a colour reads it here, so that they agree.
 * Pictures side by side have a reading each; all derive from the one crosshair.
 */
import { createContext } from "svelte";

import type { Token } from "../api/frames";
import type { ModelInfo } from "../api/schema";
import { lut, type Lut, type MapName } from "../colour/lut";
import { automatic, coordinates, symmetric, type Scale, type Window } from "../colour/window";
import { source, type Field } from "../model/field";
import { folded, foldingOf, type Folding } from "../model/fold";
import type { Series } from "../model/series";
import { sequence, type Sequence, type SequenceId } from "../model/sequences";
import { nodeOf, topologyOf, type Topology } from "../model/topology";
import { USUAL_VIEW, type SeriesView, type ViewId } from "../model/views";
import { besides, ranks, type Volume } from "../model/volume";
import type { Crosshair } from "./crosshair.svelte";
import type { Display } from "./display.svelte";
import { shown, type AllSeries, type SeriesState } from "./study.svelte";

/** Where a reading's series come from: a study, or what has been made of one or two. */
export interface Scene {
  readonly model: ModelInfo | null;
  readonly topology: Topology | null;
  readonly series: AllSeries;
}

export interface Role {
  /** The sequence it shows; without one, the chosen. */
  readonly sequence?: SequenceId;
  /** Whose window and map it has, where not its sequence's own. */
  readonly view?: ViewId;
  /** The reading whose quantity, window and token it goes along with. */
  readonly leader?: Reading;
}

/** One way to look at a series. */
interface Offer {
  readonly series: Series;
  readonly field: Field;
}

type Entries = [string | null, number][];

/** The reading of the viewport that a component stands in. */
export const [useReading, provideReading] = createContext<Reading>();

export class Reading {
  readonly #scene: Scene;
  readonly #display: Display;
  readonly #crosshair: Crosshair;
  readonly #role: Role;

  constructor(scene: Scene, display: Display, crosshair: Crosshair, role: Role = {}) {
    this.#scene = scene;
    this.#display = display;
    this.#crosshair = crosshair;
    this.#role = role;
  }

  readonly model: ModelInfo | null = $derived.by(() => this.#scene.model);
  readonly sequence: Sequence = $derived.by(() =>
    sequence(this.#role.sequence ?? this.#display.sequence),
  );
  readonly viewId: ViewId = $derived.by(() => this.#role.view ?? this.sequence.id);
  readonly view: SeriesView = $derived.by(() => this.#display.views[this.viewId]);
  readonly topology: Topology | null = $derived.by(() => {
    const { model, topology } = this.#scene;
    return this.#display.folded && model !== null ? topologyOf(model.architecture, true) : topology;
  });
  readonly state: SeriesState = $derived.by(() => this.#scene.series[this.sequence.id]);
  /** What the shown sequence can be looked at as; fMRI also as what a stimulation made of it. */
  readonly #offers: readonly Offer[] = $derived.by(() => {
    const own = shown(this.state);
    const { stimulation, tracing } = this.#scene.series;
    const changed = this.sequence.id === "fMRI" ? [shown(stimulation), shown(tracing)] : [];
    return [own, ...changed].flatMap((series) =>
      series === null ? [] : series.fields.map((field) => ({ series, field })),
    );
  });
  readonly fields: readonly Field[] = $derived.by(() => this.#offers.map(({ field }) => field));
  readonly #offer: Offer | null = $derived.by(() => {
    const wanted = this.#role.leader?.field?.id ?? this.view.field;
    return this.#offers.find(({ field }) => field.id === wanted) ?? this.#offers[0] ?? null;
  });
  readonly series: Series | null = $derived.by(() => this.#offer?.series ?? shown(this.state));
  readonly field: Field | null = $derived.by(() => this.#offer?.field ?? null);
  /** How the numbers of folded heads come about; null where none are folded. */
  readonly folding: Folding | null = $derived.by(() =>
    this.field !== null && this.topology?.folded === true ? foldingOf(this.field) : null,
  );
  readonly volume: Volume | null = $derived.by(() => this.#folded(this.field?.volume ?? null));
  readonly #marks: Volume | null = $derived.by(() => this.#folded(this.field?.marks ?? null));
  readonly unit: string = $derived.by(() => this.field?.unit ?? "");
  readonly tokens: readonly Token[] = $derived.by(() => this.series?.tokens ?? []);

  #folded(volume: Volume | null): Volume | null {
    const { folding, topology } = this;
    if (volume === null || folding === null || topology === null) return volume;
    return folded(volume, folding, topology.nLayers, topology.headsInAll);
  }

  readonly map: MapName = $derived.by(() => {
    return this.#role.leader?.map ?? this.view.map ?? this.field?.map ?? this.sequence.map;
  });
  readonly scale: Scale = $derived.by(() => {
    const scale = this.#role.leader?.scale ?? this.view.scale;
    const scales = this.field?.scales ?? ["linear"];
    return scale !== null && scales.includes(scale) ? scale : (scales[0] ?? "linear");
  });

  /** Column of the volume that is shown: one it has, or -1 beside a longer prompt's first tokens. */
  readonly column: number = $derived.by(() => {
    // Where nothing was painted, as by FLAIR without sublayers, there are still tokens to go through.
    const width = this.volume?.width ?? this.tokens.length;
    const leader = this.#role.leader;
    if (leader?.volume != null) return besides(leader.column, leader.volume.width, width);
    return Math.max(0, Math.min(width - 1, this.#crosshair.token));
  });
  readonly token: Token | null = $derived.by(() => this.tokens[this.column] ?? null);

  /** The column of a place in the prompt; -1 where the scan was not asked for it. */
  columnAt(position: number): number {
    return this.tokens.findIndex((token) => token.position === position);
  }

  /** Whose number each node shows: its own, or its layer's where that was taken as a whole. */
  readonly sources: readonly (string | null)[] = $derived.by(() => {
    const { topology, volume } = this;
    if (topology === null) return [];
    return topology.addresses.map((address) => (volume === null ? null : source(volume, address)));
  });
  /** Each node's value at the token; NaN where nothing was measured. */
  readonly values: Float64Array = $derived.by(() => this.#sliced(this.volume));
  /** 1 where the scan marks the node at the token. */
  readonly marks: Float64Array = $derived.by(() => this.#sliced(this.#marks));
  /** Ranks by size, whichever the sign; nodes that share a number share its rank. */
  readonly ranks: Uint32Array = $derived.by(() => {
    const { sources, values } = this;
    const first = new Map(sources.map((address, node) => [address, node]).reverse() as Entries);
    const own = values.map((value, node) =>
      first.get(sources[node] ?? null) === node ? Math.abs(value) : NaN,
    );
    const ranked = ranks(own);
    return ranked.map((_, node) => ranked[first.get(sources[node] ?? null) ?? node] ?? 0);
  });
  readonly measured: number = $derived.by(() => {
    const { sources, values } = this;
    return new Set(sources.filter((_, node) => !Number.isNaN(values[node]))).size;
  });

  #sliced(volume: Volume | null): Float64Array {
    const { column, sources } = this;
    return Float64Array.from(sources, (address) =>
      volume === null || address === null ? NaN : volume.at(address, column),
    );
  }

  /** Coordinates of every node at every token but the attention sinks, sorted. */
  readonly distribution: Float64Array = $derived.by(() => {
    const { sources, volume } = this;
    if (volume === null) return new Float64Array(0);
    const places = [...new Set(sources)].filter((address) => address !== null);
    return coordinates(nodeValues(places, volume, this.tokens), this.scale);
  });
  readonly automatic: Window = $derived.by(() => this.windowOf(this.distribution));
  readonly window: Window = $derived.by(() => {
    const leader = this.#role.leader;
    // One window for both, so that a colour means the same in either.
    if (leader?.volume != null && leader.scale === this.scale) return leader.window;
    const own = this.view.window ?? this.automatic;
    // The middle of a diverging map is 0, and stays there.
    return this.field?.signed === true ? { level: 0, width: own.width } : own;
  });
  readonly inverted: boolean = $derived.by(() => this.view.inverted);
  readonly lut: Lut = $derived.by(() => lut(this.map, this.inverted));

  /** The automatic window of sorted coordinates. */
  windowOf(sorted: Float64Array): Window {
    const tail = this.field?.tail ?? 0.02;
    if (this.scale === "size") {
      const most = symmetric(sorted, tail).width / 2;
      return { level: most / 2, width: most };
    }
    return this.field?.signed === true ? symmetric(sorted, tail) : automatic(sorted, tail);
  }

  /** Changes how it is looked at. A picture that goes along with another changes that one. */
  change(change: Partial<SeriesView>): void {
    const leader = this.#role.leader;
    if (leader === undefined) this.#display.change(change, this.viewId);
    else leader.change(change);
  }

  resetWindow(): void {
    this.change({ ...USUAL_VIEW, field: this.view.field });
  }

  /** The node looked at: the one under the pointer, else the locked one; -1 for none. */
  readonly focus: number = $derived.by(() => this.#nodeOf(this.#crosshair.focus));
  readonly locked: number = $derived.by(() => this.#nodeOf(this.#crosshair.locked));

  /**
   * The components of this picture that were pointed at, by the leader's addresses that stand for them: several
   * of a larger model have one address in a smaller one, and what is read must be what the pointer is on.
   */
  #meant = $state.raw<ReadonlyMap<string, string>>(new Map());

  #nodeOf(component: string | null): number {
    if (component === null || this.topology === null) return -1;
    const meant = this.isElsewhere ? this.#meant.get(component) : undefined;
    // Another model since then, or folded heads: it need not be there, nor stand at the same depth.
    if (meant !== undefined && this.#standIn(meant) === component) {
      return this.topology.indexOf.get(meant) ?? -1;
    }
    return nodeOf(this.topology, component, this.#role.leader?.topology ?? this.topology);
  }

  /** The leader's address for a component of this picture; null where either has none such. */
  #standIn(own: string): string | null {
    const leader = this.#role.leader?.topology;
    if (leader == null || this.topology?.indexOf.has(own) !== true) return null;
    return leader.addresses[nodeOf(leader, own, this.topology)] ?? null;
  }

  /** The address that the crosshair has where a node of this picture is meant. */
  addressOf(node: number): string | null {
    const own = this.topology?.addresses[node];
    if (own === undefined) return null;
    if (this.#role.leader?.topology == null) return own;
    const address = this.#standIn(own);
    if (address !== null && this.isElsewhere && this.#nodeOf(address) !== node) {
      this.#meant = new Map(this.#meant).set(address, own);
    }
    return address;
  }

  /** Whether it goes along with another picture of a model of another shape. */
  readonly isElsewhere: boolean = $derived.by(() => {
    const leader = this.#role.leader?.topology;
    return (
      leader != null &&
      this.topology !== null &&
      (leader.nLayers !== this.topology.nLayers || leader.headsInAll !== this.topology.headsInAll)
    );
  });

  /**
   * Where the largest value stands among the layers; -1 for none. The ends are not compared with them:
   * an embedding has more parameters, and logits larger norms, whatever is scanned.
   */
  hottest(): number {
    return this.ordered().find((node) => this.#isInside(node)) ?? -1;
  }

  /** The attention head with the largest value; -1 for none. */
  strongestHead(): number {
    const heads = new Set(["head", "attn"]);
    return this.ordered().find((node) => heads.has(this.topology?.kinds[node] ?? "")) ?? -1;
  }

  #isInside(node: number): boolean {
    const kind = this.topology?.kinds[node];
    return kind === "head" || kind === "attn" || kind === "mlp";
  }

  /** The nodes from the largest value down; of nodes that share a number the first. */
  ordered(): number[] {
    const seen = new Set<string | null>();
    return [...this.ranks.keys()]
      .filter((node) => (this.ranks[node] ?? 0) > 0)
      .sort((a, b) => (this.ranks[a] ?? 0) - (this.ranks[b] ?? 0))
      .filter((node) => {
        const from = this.sources[node] ?? null;
        const fresh = !seen.has(from);
        seen.add(from);
        return fresh;
      });
  }
}

/** As many values as tell their distribution; a longer scan is sampled at regular steps. */
const SAMPLE = 20_000;

function* nodeValues(
  addresses: readonly string[],
  volume: Volume,
  tokens: readonly Token[],
): Generator<number> {
  // Where every token is a sink (a prompt of one token) there is nothing else to go by.
  const all = tokens.every((token) => token.sink);
  const columns = Array.from({ length: volume.width }, (_, column) => column).filter(
    (column) => all || tokens[column]?.sink !== true,
  );
  let step = Math.max(1, Math.ceil((addresses.length * columns.length) / SAMPLE));
  // A step that has a factor in common with the row would meet the same tokens in every row.
  while (commonFactor(step, columns.length) > 1) step++;
  let skip = 0;
  for (const address of addresses) {
    const profile = volume.profile(address);
    if (profile === null) continue;
    for (; skip < columns.length; skip += step) yield profile[columns[skip] ?? 0] ?? NaN;
    skip -= columns.length;
  }
}

function commonFactor(a: number, b: number): number {
  return b === 0 ? a : commonFactor(b, a % b);
}
