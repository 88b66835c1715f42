/** Where a saved page begins: the viewer on the archive that stands in the page itself. */
import { mount, unmount } from "svelte";

import App from "../App.svelte";
import { bring, speak } from "../words/words.svelte";
import { unpack, type Archive } from "./archive";
import { savedProps } from "./saved";
import "../theme/base.css";

async function begin(target: Element): Promise<void> {
  const archive = await unpack(document.getElementById("viewing")?.textContent ?? "");
  bring(archive.words);
  // It speaks as it was saved, whoever opens it.
  if (archive.words !== null) await speak("ko");
  let app = mount(App, { target, props: { ...savedProps(archive, true), reopen } });

  async function reopen(other: Archive): Promise<void> {
    await unmount(app);
    app = mount(App, { target, props: { ...savedProps(other), reopen } });
  }
}

const target = document.getElementById("viewer");
if (target !== null) void begin(target);
