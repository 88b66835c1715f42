/** The reading room: every part of the viewer's state, wired together, and what each action does. */
import { createContext } from "svelte";

import type { Client } from "../api/client";
import { DIVERGING_MAPS, SEQUENTIAL_MAPS } from "../colour/lut";
import { moved, widened } from "../colour/window";
import { NO_QUESTION, asked, askedOfCircuit, type Question } from "../model/question";
import { isSequence, sequence, type SequenceId } from "../model/sequences";
import type { SeriesId } from "../model/series";
import type { Stimulus } from "../model/stimulus";
import { headsLeft, neighbour, nodeAt, type Direction } from "../model/topology";
import { spoken, value } from "../ui/format";
import { Cine } from "./cine.svelte";
import { Crosshair } from "./crosshair.svelte";
import { Display, after } from "./display.svelte";
import type { Action } from "./keys";
import { Log } from "./log.svelte";
import { Reading } from "./reading.svelte";
import { Study, titleOf } from "./study.svelte";
import type { Place } from "./url";
import { t } from "../words/words.svelte";

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
  /** What DTI, FLAIR and stimulation are asked about. */
  question = $state.raw<Question>(NO_QUESTION);
  /** What the next stimulation does to the model. */
  stimuli = $state.raw<readonly Stimulus[]>([]);
  help = $state(false);
  /** Whether single keys are shortcuts; a person who dictates can switch them off. */
  shortcuts = $state(true);
  /** Read out by screen readers whenever it changes. */
  announcement = $state("");
  /** Counts requests to put the cursor into the prompt. */
  promptCalls = $state(0);
  /** Counts requests to put the focus on the stimulations. */
  stimulationCalls = $state(0);

  constructor(client: Client) {
    this.study = new Study(client, this.log);
    this.reading = new Reading(this.study, this.display, this.crosshair);
    this.cine = new Cine(() => this.#turn());
    this.study.listen({
      tokenReached: (id, column) => {
        if (id === this.display.sequence) this.crosshair.token = column;
      },
      finished: (series) => this.#finished(series.sequence, series.tokens.length),
    });
  }

  #restoring = false;

  /** The first picture: what the address says, or T1 of the default model. */
  async enter(place: Place): Promise<void> {
    this.#apply(place);
    this.study.chosen = place.model;
    this.#restoring = true;
    await this.study.begin(place.jobs, place.sequence);
    this.#suggest();
    this.#restoring = false;
  }

  /** Goes where another address says. */
  async visit(place: Place): Promise<void> {
    this.#apply(place);
    if (place.model !== null) await this.study.choose(place.model);
    const there = this.study.jobs();
    const missing = place.jobs.filter((job) => !there.includes(job));
    if (missing.length === 0) return;
    this.#restoring = true;
    await this.study.openAll(missing, place.sequence);
    this.#restoring = false;
  }

  place(): Place {
    return {
      sequence: this.display.sequence,
      model: this.study.chosen,
      jobs: this.study.jobs(),
      prompt: this.prompt,
      question: this.question,
      stimuli: this.stimuli,
      tracts: this.display.tracts,
      token: this.crosshair.token,
      focus: this.crosshair.locked,
      layout: this.display.layout,
      panel: this.display.panel,
      views: this.display.views,
    };
  }

  /** Takes a scan with the shown sequence, or with the first that has something to read. */
  scan(): void {
    const id = this.scanned();
    if (sequence(id).needsPrompt && this.prompt.trim() === "") {
      this.callPrompt();
      return;
    }
    this.cine.pause();
    this.display.sequence = id;
    if (id === "fMRI") this.display.showField(null);
    void this.study.scan(id, sequence(id).endpoint, this.#request(id));
  }

  /** Which sequence a scan is taken with now: T1 is always there, and T2 once is enough. */
  scanned(): SequenceId {
    const { id } = this.reading.sequence;
    const taken = this.study.series.T2.status === "ready";
    return id === "T1" || (id === "T2" && taken) ? "fMRI" : id;
  }

  #request(id: SequenceId): Readonly<Record<string, unknown>> {
    const { prompt, question } = this;
    switch (id) {
      case "T1":
      case "T2":
        return {};
      case "fMRI":
        return { prompt };
      case "DTI":
        return { prompt, ...askedOfCircuit(question) };
      case "FLAIR":
        return { prompt, ...asked(question), sublayers: "all" };
    }
  }

  addStimulus(stimulus: Stimulus): void {
    this.stimuli = [...this.stimuli, stimulus];
    this.#announce(t("Added. {count} in the list.", { count: this.stimuli.length }));
  }

  removeStimulus(index: number): void {
    this.stimuli = this.stimuli.filter((_, at) => at !== index);
    this.#announce(t("Removed. {count} in the list.", { count: this.stimuli.length }));
  }

  /** The model as it was: an empty list, and no picture of a changed one. */
  resetStimuli(): void {
    this.stimuli = [];
    this.study.clear("stimulation");
    this.study.clear("tracing");
    if (this.display.views.fMRI.field !== null && this.display.sequence === "fMRI") {
      this.display.showField(null);
    }
    this.#announce(t("Nothing is stimulated."));
  }

  /** Reads the prompt once more, clean and with everything in the list done. */
  stimulate(): void {
    const { prompt, question, stimuli } = this;
    if (prompt.trim() === "") {
      this.callPrompt();
      return;
    }
    if (stimuli.length === 0) return;
    this.cine.pause();
    const request = { prompt, perturbations: stimuli, ...asked(question) };
    void this.study.scan("stimulation", "/api/perturb", request);
  }

  /** Drowns the subject in noise, then puts clean values back one place and token at a time. */
  trace(subject: string): void {
    const { prompt, question } = this;
    if (subject === "" || !prompt.includes(subject)) return;
    this.cine.pause();
    const request = { prompt, subject, ...asked(question) };
    void this.study.scan("tracing", "/api/perturb/trace", request);
  }

  /** Puts values of the clean run into the corrupt prompt's, one place and token at a time. */
  patch(): void {
    const { prompt, question } = this;
    this.cine.pause();
    const request = { prompt, corrupt_prompt: question.corrupt, ...asked(question) };
    void this.study.scan("tracing", "/api/perturb/patching", request);
  }

  #finished(id: SeriesId, tokens: number): void {
    const changed = id === "stimulation" || id === "tracing";
    if (changed && !this.#restoring) {
      this.display.sequence = "fMRI";
      this.display.showField(id === "tracing" ? "trace" : "difference");
      // The states of the residual stream, layer by layer, are what a trace is read from first.
      if (id === "tracing") this.display.sagittal = "resid_post";
    }
    if (id !== this.display.sequence && !changed) return;
    if (!this.#restoring && tokens > 0) this.crosshair.token = tokens - 1;
    this.#suggest();
    this.#announce(`${t("{what} complete", { what: titleOf(id) })}. ${this.describe()}`);
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
    this.#announce(`${id}, ${t(title).toLowerCase()}. ${this.describe()}`);
  }

  showField(id: string): void {
    const first = this.reading.fields[0]?.id;
    this.display.showField(id === first ? null : id);
    const { field } = this.reading;
    this.#announce(`${field === null ? "" : t(field.title)}. ${this.describe()}`);
  }

  #sameSource(node: number): boolean {
    const { locked, sources } = this.reading;
    return locked >= 0 && sources[node] === sources[locked];
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
    const { topology, locked, values, ranks, measured, series, token, tokens, column, unit } =
      this.reading;
    if (topology === null) return t("No model yet.");
    if (series === null) return t("Not scanned yet.");
    const place =
      token === null
        ? ""
        : `, ${t("token {n} of {count}", { n: column + 1, count: tokens.length })}, ${spoken(token.text)}`;
    if (locked < 0) return `${t("No component chosen")}${place}.`;
    const x = values[locked] ?? NaN;
    const reading = Number.isNaN(x)
      ? t("not measured")
      : `${value(x)} ${unit}, ${t("rank {rank} of {count}", { rank: ranks[locked] ?? 0, count: measured })}`;
    const whole =
      this.reading.sources[locked] === topology.addresses[locked] || Number.isNaN(x)
        ? ""
        : ` (${t("the layer's attention as a whole")})`;
    const marked = this.reading.marks[locked] === 1 ? `, ${t("marked")}` : "";
    return `${topology.labels[locked] ?? ""}${whole}, ${reading}${marked}${place}.`;
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
      case "scale": {
        // A window of one scale means nothing on the other, so it goes back to automatic.
        const scales = this.reading.field?.scales ?? [];
        if (scales.length > 1) {
          this.display.change({ scale: after(scales, this.reading.scale), window: null });
        }
        break;
      }
      case "map": {
        const maps = this.reading.field?.signed === true ? DIVERGING_MAPS : SEQUENTIAL_MAPS;
        this.display.change({ map: after(maps, this.reading.map) });
        break;
      }
      case "field": {
        const ids = this.reading.fields.map(({ id }) => id);
        if (ids.length > 1) this.showField(after(ids, this.reading.field?.id ?? ""));
        break;
      }
      case "previous-mark":
      case "next-mark": {
        const order = this.reading.ordered();
        const at = order.findIndex((node) => this.#sameSource(node));
        const next = at < 0 ? 0 : at + (action === "next-mark" ? 1 : -1);
        const node = order[Math.max(0, Math.min(order.length - 1, next))];
        if (node !== undefined) this.lock(node);
        break;
      }
      case "stimulate":
        this.display.panel = "stimulate";
        this.stimulationCalls++;
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
    this.#announce(`${t("View reset")}. ${this.describe()}`);
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
    this.display.tracts = place.tracts;
    this.prompt = place.prompt;
    this.question = place.question;
    this.stimuli = place.stimuli;
  }
}
