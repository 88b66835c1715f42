/** The real API, and a worker beside it that can be sent away; what it keeps is gone with it. */
import { spawn } from "node:child_process";
import { join } from "node:path";
import process from "node:process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("../../..", import.meta.url));

export interface Service {
  readonly origin: string;
  /** Begins to perform scans, or lets them wait. */
  worker(state: "on" | "off"): Promise<void>;
  /** A key of somebody, where everybody needs one. */
  key(user: string): Promise<string>;
  close(): Promise<void>;
}

export async function serve(...options: readonly "--keys"[]): Promise<Service> {
  const child = spawn(
    join(ROOT, ".venv/bin/python"),
    [join(ROOT, "web/tests/fixtures/service.py"), join(ROOT, "web/dist"), ...options],
    {
      cwd: ROOT,
      env: { ...process.env, PYTHONPATH: ROOT },
      stdio: ["pipe", "pipe", "inherit"],
    },
  );
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const heard = async (): Promise<string> => {
    const { value, done } = await lines.next();
    if (done === true) throw new Error("The service has ended");
    return value;
  };
  const told = (line: string): Promise<string> => {
    child.stdin.write(`${line}\n`);
    return heard();
  };
  const origin = await heard();
  return {
    origin,
    worker: async (state) => void (await told(`worker ${state}`)),
    key: (user) => told(`key ${user}`),
    close: () =>
      new Promise((resolve) => {
        child.once("exit", () => resolve());
        child.stdin.end();
      }),
  };
}
