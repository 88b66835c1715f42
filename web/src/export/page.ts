/**
 * One page that opens from a disk, without a service and without a network: the viewer itself, and
 * everything that this viewing is made of. The empty page stands beside the viewer in every build.
 */
import { pack, unpack, type Answer, type Archive } from "./archive";

/** Where the build puts the page without a viewing in it. */
const EMPTY_PAGE = "page.html";
const BEFORE = '<script type="text/plain" id="viewing">';
const AFTER = "</script>";

/** The archive put into the empty page. */
export async function pageOf(archive: Archive, load: typeof fetch = fetch): Promise<Blob> {
  const answer = await load(EMPTY_PAGE);
  if (!answer.ok)
    throw new Error(`The empty page is not there: ${EMPTY_PAGE} gave ${answer.status}`);
  const empty = await answer.text();
  const at = empty.indexOf(BEFORE);
  if (at < 0) throw new Error(`${EMPTY_PAGE} has no place for a viewing`);
  const start = at + BEFORE.length;
  return new Blob([empty.slice(0, start), await pack(archive), empty.slice(start)], {
    type: "text/html",
  });
}

/** The archive out of a saved page's source. */
export async function viewingIn(html: string): Promise<Archive> {
  const at = html.indexOf(BEFORE);
  const start = at + BEFORE.length;
  return unpack(at < 0 ? "" : html.slice(start, html.indexOf(AFTER, start)));
}

export type Ask = (path: string) => Promise<Pick<Answer, "type" | "body">>;

/**
 * The answers that a picture of these jobs is made of, each once. T1 is asked for by its endpoint, not by its id:
 * the first is the shown model's, others are of models that it is compared with.
 */
export async function gather(
  ask: Ask,
  structural: readonly string[],
  jobs: readonly string[],
): Promise<readonly Answer[]> {
  const get = async (path: string): Promise<Answer> => ({
    request: `GET ${path}`,
    ...(await ask(path)),
  });
  const once = [...new Set([...structural, ...jobs])];
  const all = await Promise.all(once.map((job) => answersOf(get, job)));
  const models = await get("/api/models");
  const taken = all
    .slice(0, new Set(structural).size)
    .flatMap(([first]) =>
      first === undefined ? [] : { ...first, request: "POST /api/scan/structural" },
    );
  return [models, ...taken, ...all.flat()];
}

async function answersOf(
  get: (path: string) => Promise<Answer>,
  job: string,
): Promise<readonly Answer[]> {
  const [view, manifest] = await Promise.all([
    get(`/api/jobs/${job}`),
    get(`/api/jobs/${job}/manifest`),
  ]);
  const { tables } = JSON.parse(new TextDecoder().decode(manifest.body)) as {
    readonly tables: readonly { readonly name: string }[];
  };
  const stored = tables.map(({ name }) => get(`/api/jobs/${job}/result/${encoded(name)}`));
  return [view, manifest, ...(await Promise.all(stored))];
}

function encoded(name: string): string {
  return name.split("/").map(encodeURIComponent).join("/");
}
