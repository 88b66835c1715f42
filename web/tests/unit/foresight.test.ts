import { expect, test } from "vitest";
import { Client, MODELS, submission } from "../../src/api/client";
import { firstAsked } from "../../src/state/first";
import { decode } from "../../src/state/url";
import { foreseeing } from "../../src/api/foresight";

function service() {
  const asked: string[] = [];
  const fetcher = ((path: string, init?: RequestInit) => {
    asked.push(`${init?.method ?? "GET"} ${path} ${String(init?.body ?? "")}`.trim());
    return Promise.resolve(new Response("[]"));
  }) as typeof fetch;
  return { asked, fetcher };
}

const T1 = "/api/scan/structural";

test("what is foreseen is asked at once, and once", async () => {
  const { asked, fetcher } = service();
  const requests = [submission(T1, {}, 10), { path: MODELS }];
  const client = new Client("", foreseeing(requests, fetcher));
  expect(asked).toEqual([`POST ${T1} {}`, `GET ${MODELS}`]);
  await client.submit(T1, {}, { wait: 10, signal: new AbortController().signal });
  await client.models();
  expect(asked).toHaveLength(2);
});

test("what is asked again, or otherwise, is asked anew", async () => {
  const { asked, fetcher } = service();
  const client = new Client("", foreseeing([submission(T1, {}, 10)], fetcher));
  await client.submit(T1, { model: "another" }, { wait: 10 });
  await client.submit(T1, {}, { wait: 10 });
  await client.submit(T1, {}, { wait: 10 });
  expect(asked).toEqual([`POST ${T1} {}`, `POST ${T1} {"model":"another"}`, `POST ${T1} {}`]);
});

test("a foreseen request that fails is told to who needs it", async () => {
  const away = (() => Promise.reject(new TypeError("failed"))) as typeof fetch;
  const client = new Client("", foreseeing([{ path: MODELS }], away));
  await expect(client.models()).rejects.toThrow("The service cannot be reached");
});

test("the models and T1 of the address are foreseen", () => {
  const found = firstAsked(decode("model=other"));
  expect(found).toEqual([submission(T1, { model: "other" }, 10), { path: MODELS }]);
});

test("nothing is foreseen where a session is opened", () => {
  expect(firstAsked(decode("session=01a2"))).toEqual([]);
});
