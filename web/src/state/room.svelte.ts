/** The reading room: every part of the viewer's state, wired together, and what each action does. */
import { createContext } from "svelte";

import type { Client } from "../api/client";
import { moved, widened } from "../colour/window";
import { SEQUENCES, isSequence, type SequenceId } from "../model/sequences";
import { headsLeft, neighbour, nodeAt, type Direction } from "../model/topology";
import { spoken, value } from "../ui/format";
import { Cine } from "./cine.svelte";
import { Crosshair } from "./crosshair.svelte";
import { Display } from "./display.svelte";
import type { Action } from "./keys";
import { Log } from "./log.svelte";
import { Reading } from "./reading.svelte";
import { Study } from "./study.svelte";
import type { Place } from "./url";

/** One key press widens the window by this factor, or moves its level by this share. */
const WIDEN = 1.2;
const SHIFT = 0.08;

export const [useRoom, provideRoom] = createContext<Room>();

export class Room {
  readonly log = new Log();
  readonly display = new Display();
  readonly crosshair = new Crosshair();
  readonly study: Study;
  readonly reading: Reading;
  readonly cine: Cine;
  prompt = $state("");
  help = $state(false);
  /** Whether single keys are shortcuts; a person who dictates can switch them off. */
  shortcuts = $state(true);
  /** Read out by screen readers whenever it changes. */
  announcement = $state("");
  /** Counts requests to put the cursor into the prompt. */
  promptCalls = $state(0);

  constructor(client: Client) {
    this.study = new Study(client, this.log);
    this.reading = new Reading(this.study, this.display, this.crosshair);
    this.cine = new Cine(() => this.#turn());
    this.study.listen({
      tokenReached: (id, column) => {
        if (id === this.display.sequence) this.crosshair.token = column;
      },
      finished: ({ sequence, tokens }) => {
        if (sequence !== this.display.sequence) return;
        if (!this.#restoring && tokens.length > 0) this.crosshair.token = tokens.length - 1;
        this.#suggest();
        this.#announce(`${sequence} scan complete. ${this.describe()}`);
      },
    });
  }

  #restoring = false;

  /** The first picture: what the address says, or T1 of the default model. */
  async enter(place: Place): Promise<void> {
    this.#apply(place);
    this.study.chosen = place.model;
    this.#restoring = true;
    await this.study.begin(place.job);
    this.#suggest();
    this.#restoring = false;
  }

  /** Goes where another address says. */
  async visit(place: Place): Promise<void> {
    this.#apply(place);
    if (place.model !== null) await this.study.choose(place.model);
    if (place.job !== null && place.job !== this.place().job) {
      this.#restoring = true;
      await this.study.open(place.job);
      this.#restoring = false;
    }
  }

  place(): Place {
    const state = this.study.series.fMRI;
    const job =
      state.status === "ready"
        ? state.series.acquisition.job
        : state.status === "acquiring"
          ? state.job
          : null;
    return {
      sequence: this.display.sequence,
      model: this.study.chosen,
      job,
      prompt: this.prompt,
      token: this.crosshair.token,
      focus: this.crosshair.locked,
      layout: this.display.layout,
      panel: this.display.panel,
      views: this.display.views,
    };
  }

  /** Scans the prompt with the shown sequence, or with the first that takes a prompt. */
  scan(): void {
    const prompt = this.prompt;
    if (prompt.trim() === "") {
      this.callPrompt();
      return;
    }
    const id = this.promptSequence();
    this.cine.pause();
    this.display.sequence = id;
    void this.study.scan(id, prompt);
  }

  promptSequence(): SequenceId {
    const shown = this.reading.sequence;
    const takes = shown.needsPrompt ? shown : SEQUENCES.find((s) => s.needsPrompt);
    return takes?.id ?? shown.id;
  }

  callPrompt(): void {
    this.promptCalls++;
  }

  show(id: SequenceId): void {
    this.display.sequence = id;
    this.cine.pause();
    // The crosshair stays where it is: the next sequence is another image of the same place.
    if (this.crosshair.locked === null) this.#suggest();
    const { title } = this.reading.sequence;
    this.#announce(`${id}, ${title.toLowerCase()}. ${this.describe()}`);
  }

  lock(node: number): void {
    const address = this.reading.topology?.addresses[node];
    if (address === undefined) return;
    this.crosshair.lock(address);
    this.#announce(this.describe());
  }

  goToToken(column: number): void {
    const last = this.reading.tokens.length - 1;
    this.crosshair.token = Math.max(0, Math.min(last, column));
    this.#announce(this.describe());
  }

  /** Name, value, unit, rank and token of the locked component, to be read out. */
  describe(): string {
    const { topology, locked, values, ranks, measured, series, token, tokens, column } =
      this.reading;
    if (topology === null) return "No model yet.";
    if (series === null) return "Not scanned yet.";
    const place =
      token === null ? "" : `, token ${column + 1} of ${tokens.length}, ${spoken(token.text)}`;
    if (locked < 0) return `No component chosen${place}.`;
    const x = values[locked] ?? NaN;
    const reading = Number.isNaN(x)
      ? "not measured"
      : `${value(x)} ${series.unit}, rank ${ranks[locked] ?? 0} of ${measured}`;
    return `${topology.labels[locked] ?? ""}, ${reading}${place}.`;
  }

  perform(action: Action): void {
    switch (action) {
      case "up":
      case "down":
      case "left":
      case "right":
        this.#move(action);
        break;
      case "hottest": {
        const hottest = this.reading.hottest();
        if (hottest >= 0) this.lock(hottest);
        break;
      }
      case "release":
        if (this.help) this.help = false;
        else this.crosshair.locked = null;
        break;
      case "previous-token":
        this.goToToken(this.reading.column - 1);
        break;
      case "next-token":
        this.goToToken(this.reading.column + 1);
        break;
      case "first-token":
        this.goToToken(0);
        break;
      case "last-token":
        this.goToToken(this.reading.tokens.length - 1);
        break;
      case "play":
        if (this.reading.tokens.length > 1) this.cine.toggle();
        break;
      case "previous-sequence":
      case "next-sequence":
        this.display.showSequence(action === "next-sequence" ? 1 : -1);
        this.show(this.display.sequence);
        break;
      case "narrower":
        this.display.change({ window: widened(this.reading.window, 1 / WIDEN) });
        break;
      case "wider":
        this.display.change({ window: widened(this.reading.window, WIDEN) });
        break;
      case "lower":
        this.display.change({ window: moved(this.reading.window, -SHIFT) });
        break;
      case "higher":
        this.display.change({ window: moved(this.reading.window, SHIFT) });
        break;
      case "automatic":
        this.display.change({ window: null });
        break;
      case "scale":
        this.display.toggleScale();
        break;
      case "map":
        this.display.nextMap();
        break;
      case "invert":
        this.display.change({ inverted: !this.display.view.inverted });
        break;
      case "layout":
        this.display.nextLayout();
        break;
      case "table":
        this.display.panel = this.display.panel === "table" ? "inspect" : "table";
        break;
      case "corners":
        this.display.corners = !this.display.corners;
        break;
      case "hide-prompt":
        this.display.promptShown = !this.display.promptShown;
        break;
      case "reset":
        this.reset();
        break;
      case "prompt":
        this.callPrompt();
        break;
      case "help":
        this.help = !this.help;
        break;
      default: {
        const id = action.slice("sequence:".length);
        if (isSequence(id)) this.show(id);
      }
    }
  }

  /** The view as it was in the beginning; scans stay. */
  reset(): void {
    this.cine.pause();
    this.display.resetView();
    this.crosshair.chosen = false;
    this.crosshair.hovered = null;
    this.crosshair.token = Math.max(0, this.reading.tokens.length - 1);
    this.#suggest();
    this.#announce(`View reset. ${this.describe()}`);
  }

  #move(direction: Direction): void {
    const { topology, locked } = this.reading;
    if (topology === null) return;
    const middle = nodeAt(topology, 0, headsLeft(topology.nHeads));
    this.lock(locked < 0 ? middle : neighbour(topology, locked, direction));
  }

  /** Something worth looking at, where nobody has chosen yet: the largest value. */
  #suggest(): void {
    const address = this.reading.topology?.addresses[this.reading.hottest()];
    if (address !== undefined) this.crosshair.suggest(address);
  }

  #turn(): void {
    const count = this.reading.tokens.length;
    if (count < 2) {
      this.cine.pause();
      return;
    }
    this.crosshair.token = (this.reading.column + 1) % count;
  }

  #announce(text: string): void {
    this.announcement = text;
  }

  #apply(place: Place): void {
    this.display.sequence = place.sequence;
    this.display.layout = place.layout;
    this.display.panel = place.panel;
    this.display.views = place.views;
    this.crosshair.token = place.token;
    this.crosshair.locked = place.focus;
    this.crosshair.chosen = place.focus !== null;
    this.prompt = place.prompt;
  }
}
