/** The whole service as `make up` starts it, in a folder of its own, on a free port. */
import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const START_MILLISECONDS = 900_000;

/** @returns {Promise<{origin: string, close: () => Promise<void>}>} */
export async function startService() {
  const folder = await mkdtemp(join(tmpdir(), "neural-mri-bench-"));
  const port = await freePort();
  const own = Object.entries(process.env).filter(([name]) => !name.startsWith("NEURAL_MRI_"));
  const service = spawn(join(ROOT, ".venv/bin/python"), ["-m", "deploy.embedded"], {
    cwd: ROOT,
    env: {
      ...Object.fromEntries(own),
      NEURAL_MRI_DATA_DIR: folder,
      NEURAL_MRI_PORT: String(port),
    },
    stdio: ["ignore", "pipe", "pipe"],
  });
  let said = "";
  const ready = new Promise((resolve, reject) => {
    const heard = (/** @type {Buffer} */ part) => {
      said += part.toString();
      if (said.includes("Open http")) resolve(undefined);
    };
    service.stdout.on("data", heard);
    service.stderr.on("data", heard);
    service.on("exit", () => reject(new Error(`The service did not start:\n${said}`)));
    setTimeout(
      () => reject(new Error(`The service is not ready:\n${said}`)),
      START_MILLISECONDS,
    ).unref();
  });
  const close = async () => {
    const gone = new Promise((resolve) => service.once("exit", resolve));
    if (service.exitCode === null) {
      service.kill("SIGTERM");
      await gone;
    }
    await rm(folder, { recursive: true, force: true });
  };
  try {
    await ready;
  } catch (error) {
    await close();
    throw error;
  }
  return { origin: `http://127.0.0.1:${port}`, close };
}

/** @returns {Promise<number>} */
function freePort() {
  return new Promise((resolve) => {
    const probe = createServer();
    probe.listen(0, "127.0.0.1", () => {
      const address = probe.address();
      const port = typeof address === "object" && address !== null ? address.port : 0;
      probe.close(() => resolve(port));
    });
  });
}
