/**
 * Key images: views that somebody marked, with a note, to come back to. They last as long as the tab, and for
 * good once they are saved with a session.
 */

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

const KEPT_AS = "neural-mri.images";

interface Kept {
  readonly of: string;
  readonly revision: string;
  readonly images: readonly KeyImage[];
}

/** How the ids of images begin that a session keeps. */
export const SAVED = "saved-";

export class KeyImages {
  #next = 0;
  /** The session and the revision that they were added to; empty where no session is open. */
  #of = "";
  #revision = "";
  all = $state.raw<readonly KeyImage[]>([]);

  constructor() {
    // A browser may forbid storage: images then last until the page is left.
    try {
      const kept = JSON.parse(sessionStorage.getItem(KEPT_AS) ?? "null") as Kept | null;
      this.#of = kept?.of ?? "";
      this.#revision = kept?.revision ?? "";
      this.all = (kept?.images ?? []).filter(({ view }) => typeof view === "string");
    } catch {
      this.all = [];
    }
    this.#next = this.all.length;
  }

  /** The images of a session that is opened; what was marked in it before the page was loaded again stays. */
  adopt(of: string, revision: string, images: readonly KeyImage[], anew = false): void {
    const isSame = of === this.#of && !anew;
    if (isSame && revision === this.#revision) return;
    const own = isSame ? this.all.filter(({ id }) => !id.startsWith(SAVED)) : [];
    this.#of = of;
    this.#revision = revision;
    this.#set([...images, ...own]);
  }

  mark(image: Omit<KeyImage, "id" | "note" | "at">): KeyImage {
    const made = { ...image, id: `${Date.now()}-${this.#next++}`, note: "", at: Date.now() };
    this.#set([...this.all, made]);
    return made;
  }

  annotate(id: string, note: string): void {
    this.#set(this.all.map((image) => (image.id === id ? { ...image, note } : image)));
  }

  /** The same images, their scans called by other ids. */
  rename(of: (view: string) => string): void {
    this.#set(this.all.map((image) => ({ ...image, view: of(image.view) })));
  }

  remove(id: string): void {
    this.#set(this.all.filter((image) => image.id !== id));
  }

  #set(images: readonly KeyImage[]): void {
    this.all = images;
    try {
      sessionStorage.setItem(
        KEPT_AS,
        JSON.stringify({ of: this.#of, revision: this.#revision, images } satisfies Kept),
      );
    } catch {
      // As when reading.
    }
  }
}
