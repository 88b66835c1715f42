import { mount } from "svelte";

import { Client } from "./api/client";
import App from "./App.svelte";
import "./theme/base.css";

const target = document.getElementById("viewer");
if (target === null) throw new Error("index.html has no element #viewer");
mount(App, { target, props: { client: new Client() } });
