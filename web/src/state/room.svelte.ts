/** The reading room: every part of the viewer's state, wired together, and what each action does. */
import { createContext } from "svelte";

import type { Client } from "../api/client";
import { explain } from "../api/refusals";
import type { Identity, ModelInfo } from "../api/schema";
import { WHOLE, following } from "../model/layout/zoom";
import type { Layout } from "../model/layout";
import { NO_PRIOR, protocol, type PriorPlace, type ProtocolId } from "../model/protocols";
import {
  NO_QUESTION,
  asked,
  askedOfCircuit,
  type Patching,
  type Question,
  type Tracing,
} from "../model/question";
import { statistics, valuesIn, type Region, type Statistics } from "../model/region";
import { SEQUENCES, sequence, type SequenceId } from "../model/sequences";
import type { Series } from "../model/series";
import type { Stimulus } from "../model/stimulus";
import { columnOf, headsLeft, nodeAt } from "../model/topology";
import { value } from "../ui/format";
import { Cine } from "./cine.svelte";
import { Crosshair } from "./crosshair.svelte";
import type { Comparison } from "./comparison.svelte";
import { Desk } from "./desk.svelte";
import { described } from "./described";
import { Display } from "./display.svelte";
import { KeyImages } from "./images.svelte";
import type { Action } from "./keys";
import { Log } from "./log.svelte";
import { perform } from "./perform";
import { Reading } from "./reading.svelte";
import { Study, titleOf } from "./study.svelte";
import { keep, keepNothing, kept } from "./tab";
import { decode, encode, type Place } from "./url";
import { goTo, placeOf, viewOf } from "./places";
import type { Sessions } from "../sessions/sessions.svelte";
import { t } from "../words/words.svelte";

/** How long what stands around the first picture waits for it. */
const FIRST_MILLISECONDS = 600;

export const [useRoom, provideRoom] = createContext<Room>();

export class Room {
  readonly log = new Log();
  readonly display = new Display();
  readonly crosshair = new Crosshair();
  readonly study: Study;
  readonly reading: Reading;
  /** Each sequence by itself, whichever is chosen: for thumbnails, and all five side by side. */
  readonly readings: Readonly<Record<SequenceId, Reading>>;
  readonly cine: Cine;
  readonly desk: Desk;
  readonly images = new KeyImages();
  /** What is compared with; made when something first is. */
  comparison = $state.raw<Comparison | null>(null);
  /** The open session, and what is done with sessions; made when one is first wanted. */
  sessions = $state.raw<Sessions | null>(null);
  /** Counts requests to write a note. */
  noteCalls = $state(0);
  /** Whether the first picture is drawn, or long in coming: what stands around it comes then. */
  isUp = $state(false);
  /** Where the axial picture's nodes stand, whole; null while there is no picture. */
  layout = $state.raw<Layout | null>(null);
  /** What is measured over. */
  region = $state.raw<Region | null>(null);
  /** Counts what has been run again with something changed: the picture is then swept once more. */
  rescans = $state(0);
  /** Whether the service has asked who we are, and nobody has said yet. */
  isStranger = $state(false);
  identity = $state.raw<Identity | null>(null);
  readonly #client: Client;
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
    this.#client = client;
    client.onStranger = () => {
      this.isStranger = true;
    };
    this.desk = new Desk(client);
    this.study = new Study(client, this.log);
    this.reading = new Reading(this.study, this.display, this.crosshair);
    this.readings = Object.fromEntries(
      SEQUENCES.map(({ id }) => [
        id,
        new Reading(this.study, this.display, this.crosshair, { sequence: id }),
      ]),
    ) as unknown as Readonly<Record<SequenceId, Reading>>;
    this.cine = new Cine(() => this.#turn());
    this.study.listen({
      tokenReached: (id, column) => {
        if (id === this.display.sequence) this.crosshair.token = column;
      },
      finished: (series, isRestored) => {
        this.#finished(series, isRestored);
        if (series.sequence === this.display.sequence) this.#raise();
        if (!isRestored) this.sessions?.scanned(series);
      },
    });
  }

  /** The first picture: what the address says, or T1 of the default model. */
  async enter(place: Place): Promise<void> {
    goTo(this, place);
    setTimeout(() => (this.isUp = true), FIRST_MILLISECONDS);
    this.study.chosen = place.model;
    this.#wanted = place;
    const kept = place.session ?? place.shared;
    const isOpened = kept !== null && (await (await this.withSessions()).arrive(place));
    if (!isOpened) {
      const begun = this.study.begin(kept === null ? place.jobs : [], place.sequence);
      await this.#compare(
        place,
        begun.then(() => this.#suggest()),
      );
    }
    this.#raise();
    const isShown = isOpened || (kept === null && this.study.models.status === "ready");
    // Who signs in once more later comes back to where they are by then.
    if (isShown && !this.isStranger && this.#wanted === place) this.#wanted = null;
    if (!this.isStranger && !this.#client.isGuest) await this.introduce();
  }

  /** Lets the rest come, once what is on the screen now has been drawn. */
  #raise(): void {
    if (!this.isUp) requestAnimationFrame(() => setTimeout(() => (this.isUp = true)));
  }

  async introduce(): Promise<void> {
    if (this.identity !== null) return;
    const identity = await this.#client.whoAmI().catch(() => null);
    if (identity !== null) this.#meet(identity);
  }

  /** Whether the tab may stay as it is: it was nobody else's. What somebody else had in it goes. */
  #meet(identity: Identity): boolean {
    const { user } = identity;
    const before = this.identity?.user ?? kept<string>(TAB_OF) ?? user;
    keep(TAB_OF, user);
    if (before === user) this.identity = identity;
    else clearTab();
    return before === user;
  }

  /** What is done with sessions. Its code comes with the first. */
  async withSessions(): Promise<Sessions> {
    if (this.sessions === null) {
      const { Sessions: Made } = await import("../sessions/sessions.svelte");
      this.sessions ??= new Made(this, this.#client);
    }
    return this.sessions;
  }

  /** Shows what a session keeps, as a place has it. Nothing is measured for it. */
  async restore(
    place: Place,
    models: readonly ModelInfo[],
    jobs: readonly string[],
  ): Promise<void> {
    goTo(this, place);
    const restored = this.study.restore(models, jobs, place.sequence);
    await this.#compare(
      place,
      restored.then(() => this.#suggest()),
      models,
    );
  }

  /** Hangs kept scans beside what is shown, with what lies between them. */
  async beside(models: readonly ModelInfo[], jobs: readonly string[]): Promise<void> {
    this.display.protocol = "prior";
    this.region = null;
    await this.#compared({ ...NO_PRIOR, kind: "scan", jobs }, models);
  }

  /** A key image's view: another place in what is open. */
  revisit(fragment: string): Promise<void> {
    const { session, revision, shared, beside } = this.place();
    return this.visit({ ...decode(fragment), session, revision, shared, beside });
  }

  /** Says who we are; what the address asks for is then shown. Throws the service's refusal. */
  async logIn(key: string): Promise<void> {
    if (!this.#meet(await this.#client.logIn(key))) return;
    this.isStranger = false;
    const { sessions, study } = this;
    if (study.models.status === "ready" && study.series.T1.status === "ready") {
      // The stream of what others do has ended with the last signing in.
      if (sessions !== null) void sessions.following.follow(sessions.open);
      return;
    }
    study.models = { status: "loading" };
    await this.enter(this.#wanted ?? this.place());
  }

  /** Ends the session, and takes what it showed off the screen, out of the address and out of the tab. */
  async logOut(): Promise<void> {
    try {
      await this.#client.logOut();
    } catch (error) {
      // Somebody who thinks they are signed out walks away.
      this.log.add(`${t("You are still signed in.")} ${explain(error)}`, "error");
      this.display.panel = "log";
      return;
    }
    clearTab();
  }

  /** What the address asked for, until it has been shown. */
  #wanted: Place | null = null;

  /** Goes where another address says. Where something would be lost by that, it is asked about first. */
  async visit(place: Place): Promise<void> {
    const now = this.place();
    const elsewhere = (["session", "revision", "shared"] as const).some(
      (name) => place[name] !== now[name],
    );
    if (!elsewhere) return this.#within(place);
    const sessions = await this.withSessions();
    const leave = async () => {
      const opened = await sessions.arrive(place);
      if (opened || (place.session ?? place.shared) !== null) return opened;
      await this.#within(place);
      return true;
    };
    // Until that is answered, the address is still of what is seen.
    if (sessions.asks(leave)) location.replace(`#${encode(this.place())}`);
    else await leave();
  }

  /** Goes to another place in what is open. */
  async #within(place: Place): Promise<void> {
    goTo(this, place);
    await this.#compare(place, this.study.visit(place.model, place.jobs, place.sequence));
  }

  /** Counts the places gone to: of several at once the last one stands. */
  #places = 0;

  /** What a place is compared with, once its scans are there. */
  async #compare(
    place: Place,
    scans: Promise<void>,
    models: readonly ModelInfo[] = [],
  ): Promise<void> {
    const nth = ++this.#places;
    await scans;
    if (nth !== this.#places || !protocol(place.protocol).compares) return;
    await this.#compared(place.prior, models);
  }

  /** The comparison, with what an address asks for. Its code comes with the first. */
  async #compared(place: PriorPlace, models: readonly ModelInfo[] = []): Promise<Comparison> {
    if (this.comparison === null) {
      const { Comparison: Made } = await import("./comparison.svelte");
      this.comparison ??= new Made(
        this.#client,
        this.log,
        this.study,
        this.display,
        this.crosshair,
      );
    }
    await this.comparison.restore(place, this.display.sequence, models);
    return this.comparison;
  }

  /** Hangs the pictures in another way. */
  async hang(id: ProtocolId): Promise<void> {
    this.display.protocol = id;
    this.region = null;
    const { title, about, compares } = protocol(id);
    this.announce(`${t(title)}: ${t(about)}.`);
    if (!compares) return;
    const changed = this.study.series.stimulation.status === "ready";
    const kind = id === "models" ? "model" : changed ? "stimulation" : "prompt";
    if (id === "prior" && changed) this.display.sequence = "fMRI";
    const comparison = this.comparison ?? (await this.#compared({ ...NO_PRIOR, kind }));
    const fits = (comparison.kind === "model") === (id === "models");
    if (!fits) await comparison.choose(kind);
  }

  /** Takes the scan that the shown one is compared with; the shown one as well where there is none yet. */
  async scanPrior(): Promise<void> {
    const { comparison } = this;
    if (comparison === null) return;
    const { id, endpoint } = this.reading.sequence;
    if (this.reading.state.status === "absent" && id !== "T1") this.scan();
    await comparison.scan(id, endpoint, this.#request(id));
  }

  place(): Place {
    return placeOf(this);
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

  /** Which sequence a scan is taken with now: of T1 and T2 one is enough. */
  scanned(): SequenceId {
    const { id } = this.reading.sequence;
    const { T1, T2 } = this.study.series;
    // A session need not hold the anatomy.
    const taken = id === "T1" ? T1.status !== "absent" : T2.status === "ready";
    return (id === "T1" || id === "T2") && taken ? "fMRI" : id;
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
    this.announce(t("Added. {count} in the list.", { count: this.stimuli.length }));
  }

  removeStimulus(index: number): void {
    this.stimuli = this.stimuli.filter((_, at) => at !== index);
    this.announce(t("Removed. {count} in the list.", { count: this.stimuli.length }));
  }

  /** The model as it was: an empty list, and no picture of a changed one. */
  resetStimuli(): void {
    this.stimuli = [];
    this.study.clear("stimulation");
    this.study.clear("tracing");
    if (this.display.views.fMRI.field !== null && this.display.sequence === "fMRI") {
      this.display.showField(null);
    }
    this.announce(t("Nothing is stimulated."));
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
  trace(subject: string, settings: Partial<Tracing> = {}): void {
    const { prompt, question } = this;
    if (subject === "" || !prompt.includes(subject)) return;
    this.cine.pause();
    const request = { prompt, subject, ...settings, ...asked(question) };
    void this.study.scan("tracing", "/api/perturb/trace", request);
  }

  /** Puts values of the clean run into the corrupt prompt's, one place and token at a time. */
  patch(settings: Partial<Patching> = {}): void {
    const { prompt, question } = this;
    this.cine.pause();
    const request = { prompt, corrupt_prompt: question.corrupt, ...settings, ...asked(question) };
    void this.study.scan("tracing", "/api/perturb/patching", request);
  }

  #finished({ sequence: id, tokens }: Series, isRestored: boolean): void {
    const changed = id === "stimulation" || id === "tracing";
    if (changed && !isRestored) {
      if (id === "stimulation") this.rescans++;
      this.display.sequence = "fMRI";
      this.display.showField(id === "tracing" ? "trace" : "difference");
      // The states of the residual stream, layer by layer, are what a trace is read from first.
      if (id === "tracing") {
        this.display.sagittal = "resid_post";
        this.display.protocol = "planes";
        this.display.swapped = true;
      }
    }
    if (id !== this.display.sequence && !changed) return;
    if (!isRestored && tokens.length > 0) this.crosshair.token = tokens.length - 1;
    this.#suggest();
    this.announce(`${t("{what} complete", { what: titleOf(id) })}. ${this.describe()}`);
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
    this.announce(`${id}, ${t(title).toLowerCase()}. ${this.describe()}`);
  }

  showField(id: string): void {
    const first = this.reading.fields[0]?.id;
    this.display.showField(id === first ? null : id);
    const { field } = this.reading;
    this.announce(`${field === null ? "" : t(field.title)}. ${this.describe()}`);
  }

  lock(node: number): void {
    const address = this.reading.topology?.addresses[node];
    if (address === undefined) return;
    this.crosshair.lock(address);
    const { layout } = this;
    if (layout !== null) {
      const [x, y] = [layout.x[node] ?? NaN, layout.y[node] ?? NaN];
      this.display.zoom = following(this.display.zoom, x / layout.width, y / layout.height);
    }
    this.announce(this.describe());
  }

  /** Locks what a node of any picture means. */
  lockIn(reading: Reading, node: number): void {
    const address = reading.addressOf(node);
    const own = address === null ? undefined : this.reading.topology?.indexOf.get(address);
    if (own !== undefined) this.lock(own);
  }

  /** Numbers over the region; null where none is measured. */
  readonly statistics: Statistics | null = $derived.by(() => {
    const { region } = this;
    const { column, volume } = this.reading;
    return region === null || volume === null ? null : statistics(valuesIn(region, volume, column));
  });

  measure(region: Region | null): void {
    this.region = region;
    const { statistics: found } = this;
    if (found === null) return;
    this.announce(
      t("Region of {n} values: mean {mean}, standard deviation {sd}, {min} to {max} {unit}.", {
        n: found.n,
        mean: value(found.mean),
        sd: value(found.sd),
        min: value(found.min),
        max: value(found.max),
        unit: this.reading.unit,
      }),
    );
  }

  /** Keeps the view as it is now, to come back to. */
  async markImage(): Promise<void> {
    const { layout } = this;
    const { locked, topology, sequence: shownNow, token } = this.reading;
    const { thumbnailOf } = await import("../render/miniature");
    const place = topology?.labels[locked] ?? "";
    this.images.mark({
      view: viewOf(this),
      title: [shownNow.id, place, token === null || !this.display.promptShown ? "" : token.text]
        .filter((part) => part !== "")
        .join(" · "),
      thumbnail: layout === null ? "" : thumbnailOf(layout, this.reading),
    });
    this.announce(t("Key image {n} marked.", { n: this.images.all.length }));
  }

  fold(yes: boolean): void {
    if (yes === this.display.folded) return;
    this.display.folded = yes;
    this.display.zoom = WHOLE;
    this.region = null;
    // The crosshair stays on the same layer: on a head's attention, or that attention's first head.
    const address = this.reading.topology?.addresses[this.reading.locked];
    if (address !== undefined && this.crosshair.locked !== null) this.crosshair.locked = address;
    this.announce(
      `${yes ? t("Heads folded into their layer's attention") : t("Every head by itself")}. ${this.describe()}`,
    );
  }

  goToToken(column: number): void {
    const last = this.reading.tokens.length - 1;
    this.crosshair.token = Math.max(0, Math.min(last, column));
    this.announce(this.describe());
  }

  /** The locked component as it is read out. */
  describe(): string {
    return described(this.reading);
  }

  perform(action: Action): void {
    perform(this, action);
  }

  /** The view as it was in the beginning; scans stay. */
  reset(): void {
    this.cine.pause();
    this.display.resetView();
    this.region = null;
    this.crosshair.chosen = false;
    this.crosshair.hovered = null;
    this.crosshair.token = Math.max(0, this.reading.tokens.length - 1);
    this.#suggest();
    this.announce(`${t("View reset")}. ${this.describe()}`);
  }

  /** Something worth looking at, where nobody has chosen yet: the largest value. */
  #suggest(): void {
    const address = this.reading.topology?.addresses[this.reading.hottest()];
    if (address !== undefined) this.crosshair.suggest(address);
  }

  /** Whether there is more than one picture to go through. */
  canPlay(): boolean {
    const { reading } = this;
    return this.display.cineAxis === "layers"
      ? reading.series !== null && (reading.topology?.nLayers ?? 0) > 1
      : reading.tokens.length > 1;
  }

  /** The next picture of the cine. */
  #turn(): void {
    const { locked, topology, tokens, column } = this.reading;
    if (!this.canPlay() || topology === null) {
      this.cine.pause();
      return;
    }
    if (this.display.cineAxis === "tokens") {
      this.crosshair.token = (column + 1) % tokens.length;
      return;
    }
    const place = locked < 0 ? headsLeft(topology.nHeads) : columnOf(topology, locked);
    const layer = ((topology.layers[locked] ?? -1) + 1) % topology.nLayers;
    const address = topology.addresses[nodeAt(topology, layer, place)];
    if (address !== undefined) this.crosshair.lock(address);
  }

  announce(text: string): void {
    this.announcement = text;
  }
}

const TAB_OF = "user";

/** Takes away what the screen, the address and the tab hold: whoever signs in next may be somebody else. */
function clearTab(): void {
  keepNothing();
  location.replace(location.pathname + location.search);
}
