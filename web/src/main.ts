import { mount, unmount } from "svelte";

import { Client } from "./api/client";
import App from "./App.svelte";
import { early } from "./early";
import type { Archive } from "./export/archive";
import { preferred, speak } from "./words/words.svelte";
import "./theme/base.css";

const target = document.getElementById("viewer");
if (target === null) throw new Error("index.html has no element #viewer");
const client = new Client("", early);
// Another language than the page's own is there before the first word is.
const language = preferred();
if (language !== "en") await speak(language);
let app = mount(App, { target, props: { client, reopen } });

/** Takes the viewer down and puts it up again on what a saved page holds. */
async function reopen(archive: Archive): Promise<void> {
  const { savedProps } = await import("./export/saved");
  await unmount(app);
  if (target !== null) app = mount(App, { target, props: { ...savedProps(archive), reopen } });
}
