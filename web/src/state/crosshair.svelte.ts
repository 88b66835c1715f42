/**
 * The one point all viewports look at: a component and a token. Every plane derives its own position
 * from it, so none can disagree. Hovering looks elsewhere for a moment and changes nothing.
 */

export class Crosshair {
  /** Address of the locked component; null until one is chosen. */
  locked = $state<string | null>(null);
  /** Address under the pointer. */
  hovered = $state<string | null>(null);
  /** Column of the volume, from 0. Kept as asked; readers clamp it to what the series has. */
  token = $state(0);
  /** Whether a person chose the locked component, rather than the viewer. */
  chosen = $state(false);

  readonly focus: string | null = $derived(this.hovered ?? this.locked);

  lock(component: string): void {
    this.locked = component;
    this.hovered = null;
    this.chosen = true;
  }

  /** Locks a component on the viewer's own account: a person's choice is never overridden. */
  suggest(component: string): void {
    if (!this.chosen) this.locked = component;
  }
}
