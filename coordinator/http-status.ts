/** The plain status page: models, engines, queues, and a field to try a chat. No assets, no build. */
import type { QueueCounts } from './queue.js';
import type { ModelCard } from './request.js';
import type { EngineBeat } from './store.js';

const escape = (text: string): string =>
  text.replace(/[&<>"']/g, (character) => `&#${character.codePointAt(0) ?? 0};`);

const cells = (values: readonly (string | number)[]): string =>
  values.map((value) => `<td>${escape(String(value))}</td>`).join('');

const table = (heads: readonly string[], rows: readonly string[]): string =>
  `<table><tr>${heads.map((head) => `<th>${escape(head)}</th>`).join('')}</tr>` +
  `${rows.map((row) => `<tr>${row}</tr>`).join('')}</table>`;

/**
 * @param counts of each card's queue, in the order of the cards.
 * @param asksKeys whether who asks something may need an API key.
 */
export function statusPage(
  cards: readonly ModelCard[],
  engines: readonly EngineBeat[],
  counts: readonly QueueCounts[],
  asksKeys: boolean,
): string {
  const models = table(
    ['Model', 'Context', 'Exact', 'Waiting', 'Active', 'Completed', 'Failed'],
    cards.map((card, i) => {
      const { waiting, active, completed, failed } = counts[i]!;
      const exact = card.isExact ? 'yes' : 'no';
      return cells([card.name, card.maxSeqLen, exact, waiting, active, completed, failed]);
    }),
  );
  const alive = table(
    ['Engine', 'Model', 'Ranks', 'Sequences', 'Slots'],
    engines.map(({ engineId, model, tp, active, slots }) =>
      cells([engineId, model, tp, active, slots]),
    ),
  );
  const options = cards.map(({ name }) => `<option>${escape(name)}</option>`).join('');
  const key = asksKeys
    ? '<input name="key" type="password" placeholder="API key" autocomplete="off">'
    : '';
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Caravan</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #2b2118; background: #fbf7f0; }
  h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
  p { margin-top: .2rem; color: #6b5a48; }
  table { border-collapse: collapse; width: 100%; background: #fff; }
  th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid #e8dcc9; }
  th { font-weight: 600; color: #6b5a48; }
  form { display: flex; gap: .5rem; } input { flex: 1; }
  input, select, button { font: inherit; padding: .4rem .6rem; border: 1px solid #cdbb9f; border-radius: .3rem; background: #fff; }
  button { background: #b5651d; border-color: #b5651d; color: #fff; cursor: pointer; }
  pre { white-space: pre-wrap; background: #fff; border: 1px solid #e8dcc9; padding: .8rem; min-height: 4rem; }
</style></head><body>
<h1>Caravan</h1><p>A heavy load, carried by many llamas in step.</p>
<h2>Models</h2>${models}
<h2>Engines</h2>${engines.length === 0 ? '<p>None is alive; jobs wait in the queue.</p>' : alive}
<h2>Try it</h2>
<form id="ask"><select name="model">${options}</select>
<input name="question" placeholder="Tell me a story about a fox." autocomplete="off">${key}<button>Ask</button></form>
<pre id="answer"></pre>
<script>
document.getElementById('ask').addEventListener('submit', async (event) => {
  event.preventDefault();
  const form = new FormData(event.target);
  const answer = document.getElementById('answer');
  answer.textContent = '';
  const content = form.get('question') || 'Tell me a story about a fox.';
  const body = JSON.stringify({ model: form.get('model'), stream: true, messages: [{ role: 'user', content }] });
  const headers = { 'content-type': 'application/json' };
  if (form.get('key')) headers.authorization = 'Bearer ' + form.get('key');
  const response = await fetch('/v1/chat/completions', { method: 'POST', headers, body });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ''; ;) {
    const { value, done } = await reader.read();
    if (done) { if (!response.ok) answer.textContent = rest; break; }
    const lines = (rest + value).split('\\n');
    rest = response.ok ? lines.pop() : rest + value;
    for (const line of lines) {
      if (!line.startsWith('data: {')) continue;
      const data = JSON.parse(line.slice(6));
      answer.textContent += data.error ? data.error.message : data.choices[0]?.delta?.content ?? '';
    }
  }
});
</script></body></html>
`;
}
