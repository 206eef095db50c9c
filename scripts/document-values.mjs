/**
 * Writes the table of values into helm/caravan/README.md, from values.schema.json (what they mean) and values.yaml (what
 * they are). `--check` only says whether it would change.
 */
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parse } from 'yaml';

const chart = path.join(path.dirname(fileURLToPath(import.meta.url)), '../helm/caravan');
const schema = JSON.parse(fs.readFileSync(path.join(chart, 'values.schema.json'), 'utf8'));
const values = parse(fs.readFileSync(path.join(chart, 'values.yaml'), 'utf8'));
const readme = path.join(chart, 'README.md');
const BEGIN = '<!-- values: scripts/document-values.mjs -->\n';
const LONGEST_DEFAULT = 48;
const END = '<!-- end of values -->\n';

/** Every value that is no group of others, by its path. */
function* leaves(node, value, names) {
  if (node.properties !== undefined) {
    for (const [name, child] of Object.entries(node.properties)) {
      yield* leaves(child, value?.[name], [...names, name]);
    }
    return;
  }
  const where = names.join('.');
  if (node.description === undefined) throw new Error(`${where} is not described in the schema`);
  // `global` belongs to parent charts.
  if (value === undefined && where !== 'global') throw new Error(`${where} is not in values.yaml`);
  yield [where, value, node.description];
}

const cell = (text) => text.replaceAll('|', '\\|').replaceAll('\n', ' ');
const rows = [...leaves(schema, values, [])].map(([name, value, description]) => {
  const json = value === undefined ? '' : `\`${cell(JSON.stringify(value))}\``;
  const shown = json.length > LONGEST_DEFAULT ? 'see values.yaml' : json;
  return [`\`${name}\``, shown, cell(description)];
});
const heads = ['value', 'default', 'meaning'];
const widths = heads.map((head, i) =>
  Math.max(head.length, ...rows.map((row) => [...row[i]].length)),
);
const line = (cells, fill = ' ') =>
  `| ${cells.map((text, i) => text + fill.repeat(widths[i] - [...text].length)).join(' | ')} |\n`;
const table = line(heads) + line(['', '', ''], '-') + rows.map((row) => line(row)).join('');

const text = fs.readFileSync(readme, 'utf8');
const [before, rest] = text.split(BEGIN);
const [, after] = (rest ?? '').split(END);
if (after === undefined) throw new Error('README.md has no place for the table');
const wanted = `${before}${BEGIN}\n${table}\n${END}${after}`;
if (process.argv.includes('--check')) {
  if (wanted !== text) {
    console.error('helm/caravan/README.md is old: node scripts/document-values.mjs');
    process.exit(1);
  }
} else {
  fs.writeFileSync(readme, wanted);
}
