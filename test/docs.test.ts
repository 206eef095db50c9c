import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import type { Command } from 'commander';
import { pino } from 'pino';
import { createProgram } from '../coordinator/cli/program.js';
import { createHttpServer, type HttpRoutes } from '../coordinator/http.js';
import { routeDescriptions } from '../coordinator/openapi-routes.js';
import { GatewayMetrics } from '../coordinator/metrics.js';
import { packageRoot } from '../coordinator/package-root.js';
import { errorTable } from '../proto/errors.js';

const read = (file: string): string => fs.readFileSync(path.join(packageRoot, file), 'utf8');

void test('docs/cli.md lists exactly the commands and flags that exist', async () => {
  const sections = new Map(
    read('docs/cli.md')
      .split(/^## /m)
      .slice(1)
      .map((section) => [/^[\w-]+( [\w-]+)*/.exec(section)![0], section] as const),
  );
  const commands = runnable(await createProgram());
  assert.deepEqual([...sections.keys()].sort(), [...commands.keys()].sort());
  for (const [name, command] of commands) {
    const documented = [...sections.get(name)!.matchAll(/^\| `(--[^`]*)`/gm)];
    assert.deepEqual(
      documented.map(([, flags]) => flags).sort(),
      command.options.map((option) => option.flags).sort(),
      name,
    );
  }
});

/** Commands that do something, by the words that call them: `batch submit`, not `batch`. */
function runnable(parent: Command, words = ''): Map<string, Command> {
  return new Map(
    parent.commands.flatMap((command) => {
      const name = `${words}${command.name()}`;
      return command.commands.length > 0 ? [...runnable(command, `${name} `)] : [[name, command]];
    }),
  );
}

void test('docs/errors.md lists exactly the codes that exist, with their facts', () => {
  const rows = [
    ...read('docs/errors.md').matchAll(
      /^\| `(\w+)` *\| (\d+) *\| (\d+) *\| (yes|no) *\| (.*?) *\|$/gm,
    ),
  ];
  assert.deepEqual(
    rows.map(([, code, http, grpc, retry, meaning]) => [code, http, grpc, retry, meaning]),
    Object.entries(errorTable).map(([code, rule]) => [
      code,
      String(rule.http),
      String(rule.grpc),
      rule.isRetryable ? 'yes' : 'no',
      rule.meaning,
    ]),
  );
});

void test('every route that is served is described, and no other', async () => {
  // Its routes are looked at, not asked.
  const app = createHttpServer(
    { metrics: new GatewayMetrics() } as HttpRoutes,
    1024,
    pino({ level: 'silent' }),
  );
  const { paths } = (await app.inject('/openapi.json')).json<{
    paths: Record<string, Record<string, { summary?: string }>>;
  }>();
  const operations = Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, { summary }]) => ({
      name: `${method} ${path}`,
      summary,
    })),
  );
  for (const { name, summary } of operations) {
    assert.ok(summary, `${name}: describe it in coordinator/openapi-routes.ts`);
  }
  assert.equal(operations.length, Object.keys(routeDescriptions).length);
  await app.close();
});

void test('docs/parity.md names tests that exist', () => {
  const named = [...read('docs/parity.md').matchAll(/\| `([\w-]+): ([^`]+)` *\|$/gm)];
  assert.ok(named.length > 20);
  for (const [, file, name] of named) {
    const source = read(`test/${file!}.test.ts`);
    const found = [...source.matchAll(/\btest\(\s*(?:'([^'\n]+)'|"([^"\n]+)"|`([^`\n]+)`)/g)];
    const isThere = found.some(([, single, double, template]) => {
      const literal = (single ?? double ?? template!).replace(/[.*+?^(){}|[\]\\]/g, '\\$&');
      // A name that is put together can say anything where it is.
      return new RegExp(`^${literal.replace(/\$\\\{.*?\\\}/g, '.+')}$`).test(name!);
    });
    assert.ok(isThere, `${file!}: ${name!}`);
  }
});

void test('links between the documents lead somewhere', () => {
  const documents = [
    'README.md',
    'README.ja.md',
    'ARCHITECTURE.md',
    'CONTRIBUTING.md',
    'CHANGELOG.md',
  ];
  documents.push(...fs.readdirSync(path.join(packageRoot, 'docs')).map((name) => `docs/${name}`));
  for (const document of documents.filter((name) => name.endsWith('.md'))) {
    for (const [, target] of read(document).matchAll(/\]\(([^)#\s]+)[^)]*\)/g)) {
      if (/^https?:/.test(target!)) continue;
      const file = path.join(packageRoot, path.dirname(document), target!);
      assert.ok(fs.existsSync(file), `${document} → ${target!}`);
    }
  }
});

void test('both READMEs have the same two commands', () => {
  const commands = (file: string): string[] =>
    [...read(file).matchAll(/^\.\/caravan (up --ask "[^"]+"|test)/gm)].map(([line]) => line);
  assert.equal(commands('README.md').length, 2);
  assert.deepEqual(commands('README.md'), commands('README.ja.md'));
});

void test('ARCHITECTURE.md and CONTRIBUTING.md keep to their length', () => {
  assert.ok(read('ARCHITECTURE.md').split('\n').length <= 151);
  assert.ok(read('CONTRIBUTING.md').split('\n').length <= 61);
});
