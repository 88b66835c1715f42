/** What the viewer is given where it shows a saved page: the archive in the place of the service. */
import { Client } from "../api/client";
import { t } from "../words/words.svelte";
import type { Archive } from "./archive";
import { storedFetch } from "./stored";

/** Goes where the archive was saved, unless the address already says where to go. */
export function savedProps(archive: Archive, keepsAddress = false) {
  if (!keepsAddress || location.hash === "") {
    history.replaceState(history.state, "", `#${archive.fragment}`);
  }
  const client = new Client("", storedFetch(archive, t("This page was saved without it")));
  return { client, saved: archive };
}
