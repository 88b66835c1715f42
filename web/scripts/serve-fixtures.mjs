/** The built viewer with stored scans, for looking at it without a service: `serve-fixtures.mjs [FOLDER]`. */
import { serveFixtures } from "../tests/fixtures/server.mjs";

const port = Number(process.env["PORT"] ?? 0);
const { origin } = await serveFixtures({ pause: 30 }, port, process.argv[2]);
console.log(`The viewer with stored scans: ${origin}`);
