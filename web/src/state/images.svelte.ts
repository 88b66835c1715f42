/**
 * Key images: views that somebody marked, with a note, to come back to. They last as long as the tab, and for
 * good once they are saved with a session.
 */
import { keep, kept } from "./tab";

export interface KeyImage {
  readonly id: string;
  /** The address's fragment: everything that brings the view back. */
  readonly view: string;
  readonly title: string;
  readonly note: string;
  /** A small picture of it, as a `data:` URL. */
  readonly thumbnail: string;
  /** When it was marked, in milliseconds since 1970. */
  readonly at: number;
}

/** Each session's by themselves, as its notes are: a page that is loaded with another takes none of them. */
const KEPT_AS = "images ";
/** What is open where no session is. */
const NOTHING = "new";

interface Kept {
  readonly revision: string;
  readonly images: readonly KeyImage[];
}

/** How the ids of images begin that a session keeps. */
export const SAVED = "saved-";

export class KeyImages {
  #next = 0;
  /** The session and the revision that they were added to. */
  #of = NOTHING;
  #revision = "";
  all = $state.raw<readonly KeyImage[]>([]);
  /** What all are compared with to tell whether they have changed. */
  #saved = $state(pictured([]));
  readonly isChanged: boolean = $derived.by(() => pictured(this.all) !== this.#saved);

  constructor() {
    this.all = kept<Kept>(KEPT_AS + NOTHING)?.images ?? [];
    this.#next = this.all.length;
  }

  /** The images of a session that is opened; what was marked in it before the page was loaded again stays. */
  adopt(
    of: string,
    revision: string,
    saved: readonly KeyImage[],
    shown = this.#before(of, revision, saved),
  ): void {
    this.#saved = pictured(saved);
    this.all = shown;
    this.move(of, revision);
  }

  /** The same images, of another revision or session from now on. */
  move(of: string, revision: string): void {
    this.#of = of;
    this.#revision = revision;
    this.#set(this.all);
  }

  #before(of: string, revision: string, saved: readonly KeyImage[]): readonly KeyImage[] {
    const before =
      of === this.#of ? { revision: this.#revision, images: this.all } : kept<Kept>(KEPT_AS + of);
    if (before?.revision === revision) return before.images;
    const own = before?.images.filter(({ id }) => !id.startsWith(SAVED)) ?? [];
    return [...saved, ...own];
  }

  mark(image: Omit<KeyImage, "id" | "note" | "at">): KeyImage {
    const made = { ...image, id: `${Date.now()}-${this.#next++}`, note: "", at: Date.now() };
    this.#set([...this.all, made]);
    return made;
  }

  annotate(id: string, note: string): void {
    this.#set(this.all.map((image) => (image.id === id ? { ...image, note } : image)));
  }

  remove(id: string): void {
    this.#set(this.all.filter((image) => image.id !== id));
  }

  /** What is not saved of a session is given up, or has been saved with another. */
  forget(of: string): void {
    keep(KEPT_AS + of, null);
  }

  #set(images: readonly KeyImage[]): void {
    this.all = images;
    keep(KEPT_AS + this.#of, this.isChanged ? { revision: this.#revision, images } : null);
  }
}

/** Key images as they would be saved, to be compared. */
function pictured(images: readonly KeyImage[]): string {
  return JSON.stringify(images.map(({ note, title, view }) => [note, title, view]));
}
