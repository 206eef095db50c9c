// Writes proto/gen from proto/*.proto with buf and ts-proto, both from node_modules: no network.
import { spawnSync } from 'node:child_process';

const buf = spawnSync('node_modules/.bin/buf', ['generate', ...process.argv.slice(2)], {
  stdio: 'inherit',
});
process.exitCode = buf.status ?? 1;
