/** Where a saved page begins: the viewer on the archive that stands in the page itself. */
import { mount, unmount } from "svelte";

import App from "../App.svelte";
import { preferred, speak } from "../words/words.svelte";
import { unpack, type Archive } from "./archive";
import { savedProps } from "./saved";
import "../theme/base.css";

async function begin(target: Element): Promise<void> {
  const archive = await unpack(document.getElementById("viewing")?.textContent ?? "");
  const language = preferred();
  if (language !== "en") await speak(language);
  let app = mount(App, { target, props: { ...savedProps(archive, true), reopen } });

  async function reopen(other: Archive): Promise<void> {
    await unmount(app);
    app = mount(App, { target, props: { ...savedProps(other), reopen } });
  }
}

const target = document.getElementById("viewer");
if (target !== null) void begin(target);
