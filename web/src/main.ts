import { mount } from "svelte";

import { Client } from "./api/client";
import App from "./App.svelte";
import { preferred, speak } from "./words/words.svelte";
import "./theme/base.css";

const target = document.getElementById("viewer");
if (target === null) throw new Error("index.html has no element #viewer");
// Another language than the page's own is there before the first word is.
const language = preferred();
if (language !== "en") await speak(language);
mount(App, { target, props: { client: new Client() } });
