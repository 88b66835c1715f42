/** Key images: views that somebody marked, with a note, to come back to. They last as long as the tab. */

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

export class KeyImages {
  #next = 0;
  all = $state.raw<readonly KeyImage[]>([]);

  constructor() {
    // A browser may forbid storage: images then last until the page is left.
    try {
      const kept = JSON.parse(sessionStorage.getItem(KEPT_AS) ?? "[]") as readonly KeyImage[];
      this.all = kept.filter(({ view }) => typeof view === "string");
    } catch {
      this.all = [];
    }
    this.#next = this.all.length;
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

  #set(images: readonly KeyImage[]): void {
    this.all = images;
    try {
      sessionStorage.setItem(KEPT_AS, JSON.stringify(images));
    } catch {
      // As when reading.
    }
  }
}
