/**
 * Alerts fire when they should and not before, by promtool's own clock; and neither they nor the dashboards ask for
 * metrics or labels that gateways and engines do not have.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { parse, stringify } from 'yaml';
import { packageRoot } from '../coordinator/package-root.js';
import { at, chartFolder, find, render, skipWithoutHelm } from './chart.js';
import { startGatewayProcess } from './gateway-process.js';
import { startEngine } from './real-engine.js';
import { startRedis } from './redis-server.js';

const read = (file: string): string => fs.readFileSync(path.join(packageRoot, file), 'utf8');

const skipWithoutPromtool =
  process.env['CI'] === 'true' || spawnSync('promtool', ['--version']).status === 0
    ? false
    : "promtool is not here: it comes with Debian's package prometheus";
const skip = skipWithoutHelm === false ? skipWithoutPromtool : skipWithoutHelm;

interface Rule {
  readonly alert: string;
  readonly expr: string;
  readonly labels: { readonly severity: string };
}

/** The rules that the chart makes by default. */
const ruleSpec = (): unknown =>
  find(render({ monitoring: { prometheusRule: { enabled: true } } }), 'PrometheusRule', 'llama')
    .spec;
const rules = (): Rule[] => at(ruleSpec(), 'groups.0.rules') as Rule[];

function promtool(args: readonly string[]): string {
  const { status, stdout, stderr } = spawnSync('promtool', args, { encoding: 'utf8' });
  assert.equal(status, 0, stdout + stderr);
  return stdout;
}

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-alerts-'));
after(() => {
  fs.rmSync(folder, { recursive: true });
});
const write = (name: string, content: unknown): string => {
  const file = path.join(folder, name);
  fs.writeFileSync(file, stringify(content));
  return file;
};

interface AlertCase {
  readonly alert_rule_test: readonly { alertname: string; exp_alerts: readonly unknown[] }[];
}

void test('every alert fires in its case, and is silent when it should be', { skip }, () => {
  const cases = parse(read('test/alert-cases.yaml')) as { tests: AlertCase[] };
  const rulesFile = write('rules.yaml', ruleSpec());
  promtool(['check', 'rules', rulesFile]);
  promtool(['test', 'rules', write('cases.yaml', { ...cases, rule_files: [rulesFile] })]);
  const checks = cases.tests.flatMap((one) => one.alert_rule_test);
  for (const { alert } of rules()) {
    const own = checks.filter(({ alertname }) => alertname === alert);
    assert.ok(
      own.some(({ exp_alerts }) => exp_alerts.length > 0),
      `${alert} never fires`,
    );
    assert.ok(
      own.some(({ exp_alerts }) => exp_alerts.length === 0),
      `${alert} is never silent`,
    );
  }
});

interface Dashboard {
  readonly panels: readonly {
    readonly title: string;
    readonly targets: readonly { readonly expr: string }[];
  }[];
  readonly templating: { readonly list: readonly { readonly query: string }[] };
}

const dashboards = (): Map<string, Dashboard> => {
  const place = path.join(chartFolder, 'files/dashboards');
  return new Map(
    fs
      .readdirSync(place)
      .map((name) => [
        name,
        JSON.parse(fs.readFileSync(path.join(place, name), 'utf8')) as Dashboard,
      ]),
  );
};

/** What Grafana would put in for its variables. */
const filledIn = (expr: string): string => expr.replaceAll(/\$(namespace|model)\b/g, 'x');

const panelQueries = (): [where: string, expr: string][] =>
  [...dashboards()].flatMap(([name, { panels }]) =>
    panels.flatMap(({ title, targets }) =>
      targets.map(({ expr }): [string, string] => [`${name}: ${title}`, filledIn(expr)]),
    ),
  );

void test('the queries of all panels are PromQL', { skip: skipWithoutPromtool }, () => {
  const recorded = panelQueries().map(([, expr], i) => ({ record: `panel:${i}`, expr }));
  assert.ok(recorded.length > 20);
  promtool(['check', 'rules', write('panels.yaml', { groups: [{ name: 'p', rules: recorded }] })]);
});

/** Labels that Prometheus itself puts on what it scrapes from a Pod, and those of buckets. */
const scrapeLabels = new Set(['namespace', 'pod', 'container', 'instance', 'job', 'le']);

/** By metric: the labels that it has. Histograms are their three series. */
function metricsIn(exposition: string): Map<string, Set<string>> {
  const metrics = new Map<string, Set<string>>();
  for (const [, name, type] of exposition.matchAll(/^# TYPE (\S+) (\S+)$/gm)) {
    const suffixes = type === 'histogram' ? ['_bucket', '_sum', '_count'] : [''];
    for (const suffix of suffixes) metrics.set(name! + suffix, new Set());
  }
  for (const [, name, labels] of exposition.matchAll(/^([a-z_]+)\{(.*)\} \S+$/gm)) {
    for (const [, label] of labels!.matchAll(/(\w+)="/g)) metrics.get(name!)!.add(label!);
  }
  return metrics;
}

/** Metrics of an expression, each with the labels that it is chosen by. */
function metricsOf(expr: string): [metric: string, labels: string[]][] {
  return [...expr.matchAll(/\b((?:caravan|process|nodejs)_\w+)(?:\{([^}]*)\})?/g)].map(
    ([, name, matchers]) => [
      name!,
      [...(matchers ?? '').matchAll(/(\w+)\s*(?:=~|!~|!=|=)/g)].map(([, label]) => label!),
    ],
  );
}

void test(
  'alerts and dashboards ask only for metrics that gateways and engines have',
  { skip: skipWithoutHelm },
  async () => {
    const redis = await startRedis();
    after(() => redis.stop());
    const engine = await startEngine(redis.url, {
      ...{ tp: 2, maxBatchSize: 2 },
      args: ['--metrics-port', '0'],
    });
    after(() => engine.stop());
    const gateway = await startGatewayProcess(redis.url, ['--files', folder], 512);
    after(() => gateway.kill());
    const chat = await fetch(`${gateway.url}/v1/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({
        messages: [{ role: 'user', content: 'Hi' }],
        max_tokens: 8,
        stream: true,
      }),
    });
    assert.equal(chat.status, 200);
    assert.match(await chat.text(), /\[DONE\]/);
    const known = new Map<string, Set<string>>();
    const pages = [`${gateway.url}/metrics`, `${engine.metricsUrl}/metrics`];
    for (const page of pages) {
      const text = await (await fetch(page)).text();
      for (const [name, labels] of metricsIn(text)) {
        known.set(name, new Set([...(known.get(name) ?? []), ...labels]));
      }
    }
    const variables = [...dashboards()].flatMap(([name, { templating }]) =>
      templating.list.map(({ query }): [string, string] => [name, filledIn(query)]),
    );
    const asked = [
      ...rules().map(({ alert, expr }): [string, string] => [alert, expr]),
      ...panelQueries(),
      ...variables,
    ];
    for (const [where, expr] of asked) {
      const metrics = metricsOf(expr);
      if (/caravan|process/.test(expr)) assert.ok(metrics.length > 0, where);
      const chosenBy = [...expr.matchAll(/\b(?:by|on) \(([^)]*)\)/g)].flatMap(([, names]) =>
        names!.split(',').map((name) => name.trim()),
      );
      const labels = new Set(metrics.flatMap(([name]) => [...(known.get(name) ?? [])]));
      for (const label of chosenBy) {
        assert.ok(labels.has(label) || scrapeLabels.has(label), `${where}: no label ${label}`);
      }
      for (const [name, matched] of metrics) {
        assert.ok(known.has(name), `${where}: there is no metric ${name}`);
        for (const label of matched) {
          assert.ok(
            known.get(name)!.has(label) || scrapeLabels.has(label),
            `${where}: ${name} has no label ${label}`,
          );
        }
      }
    }
  },
);
