/**
 * 200 schemas against ajv: what satisfies a schema is accepted, however it is spelled; what a careless writer makes of it is
 * refused; and every text that the automaton itself writes satisfies the schema.
 *
 * CARAVAN_LONG=1 takes 20 instances, mutants and walks of every schema; the short run 5 of every third.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Ajv2020 } from 'ajv/dist/2020.js';
import formats from 'ajv-formats';
import { compileGrammar } from '../coordinator/grammar.js';
import type { Machine, MachineState } from '../coordinator/grammar-machine.js';
import { Random } from './random.js';
import { freedomOf, Instances, mutate, spell } from './schema-instances.js';
import { schemas } from './schemas.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const count = isLong ? 20 : 5;
const ajv = new Ajv2020({ strict: false, multipleOfPrecision: 9 });
formats.default(ajv);

const accepts = (machine: Machine, text: string): boolean =>
  machine.run(machine.start, Buffer.from(text))?.isAccepting ?? false;

/** A random text of the grammar; the longer, the more it is drawn to its end. */
function walk(machine: Machine, random: Random): string {
  const bytes: number[] = [];
  let state: MachineState = machine.start;
  for (;;) {
    const next: [number, MachineState][] = [];
    for (let byte = 0; byte < 256; byte += 1) {
      const after = machine.step(state, byte);
      if (after !== null) next.push([byte, after]);
    }
    if (next.length === 0 || (state.isAccepting && random.below(3) === 0)) break;
    const closing = next.filter(([byte]) => '"}]'.includes(String.fromCharCode(byte)));
    const isTired = bytes.length > 20 && random.below(3) === 0;
    const [byte, after] = random.pick(isTired && closing.length > 0 ? closing : next);
    bytes.push(byte);
    state = after;
    assert.ok(bytes.length < 20_000, 'a text without an end');
  }
  return new TextDecoder('utf-8', { fatal: true }).decode(Uint8Array.from(bytes));
}

void test('there are 200 schemas, all different', () => {
  assert.equal(new Set(schemas.map((schema) => JSON.stringify(schema))).size, 200);
});

schemas.forEach((schema, index) => {
  if (!isLong && index % 3 !== 0) return;
  const name = JSON.stringify(schema).slice(0, 90);
  void test(`schema ${index}: ${name}`, () => {
    const random = new Random(9000 + index);
    const isValid = ajv.compile(schema);
    const machine = compileGrammar({ kind: 'schema', schema });
    const instances = new Instances(schema, random);
    const freedom = freedomOf(schema);
    const valid: string[] = [];
    for (let tries = 0; valid.length < count; tries += 1) {
      assert.ok(tries < 100 * count, 'no valid instance can be made up');
      const value = instances.make();
      if (!isValid(value)) continue;
      const text = spell(value, random, freedom);
      assert.deepEqual(JSON.parse(text), value);
      assert.ok(accepts(machine, text), `must be accepted: ${text}`);
      valid.push(text);
    }
    let refused = 0;
    for (let tries = 0; refused < count; tries += 1) {
      assert.ok(tries < 200 * count, 'no mutant can be made up');
      const mutant = mutate(random.pick(valid), random);
      let value: unknown;
      try {
        value = JSON.parse(mutant);
      } catch {
        assert.ok(!accepts(machine, mutant), `is no JSON: ${mutant}`);
        refused += 1;
        continue;
      }
      if (isValid(value)) continue;
      assert.ok(!accepts(machine, mutant), `is not valid: ${mutant}`);
      refused += 1;
    }
    for (let i = 0; i < count; i += 1) {
      const text = walk(machine, random);
      assert.ok(
        isValid(JSON.parse(text)),
        `was written: ${text}: ${ajv.errorsText(isValid.errors)}`,
      );
    }
  });
});
