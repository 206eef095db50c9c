// Draws a terminal with what a command printed: node scripts/terminal-picture.mjs "COMMAND LINE" < output > docs/up.svg
const [command = ''] = process.argv.slice(2);
let text = '';
for await (const chunk of process.stdin) text += chunk;

const WIDTH = 88;
const LINE_PX = 20;
const escape = (line) =>
  line.replace(/[&<>]/g, (c) => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;' })[c]);
const wrap = (line) => line.match(new RegExp(`.{1,${WIDTH}}(?:\\s|$)|.{${WIDTH}}`, 'g')) ?? [''];

const lines = [`$ ${command}`, ...text.trimEnd().split('\n').flatMap(wrap)];
const height = 60 + LINE_PX * lines.length;
const rows = lines.map((line, i) => {
  const color = line.startsWith('$')
    ? '#f3c98b'
    : line.startsWith('caravan')
      ? '#9fd0a5'
      : '#efe6d8';
  return `<text x="20" y="${60 + LINE_PX * i}" fill="${color}" xml:space="preserve">${escape(line)}</text>`;
});
process.stdout
  .write(`<svg xmlns="http://www.w3.org/2000/svg" width="780" height="${height}" viewBox="0 0 780 ${height}" role="img">
<rect width="780" height="${height}" rx="8" fill="#2b2118"/>
<circle cx="22" cy="20" r="6" fill="#c8553d"/><circle cx="42" cy="20" r="6" fill="#e0a458"/><circle cx="62" cy="20" r="6" fill="#7a9e7e"/>
<g font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="14">
${rows.join('\n')}
</g></svg>
`);
