/** Exit code 0 if an address answers with 2xx within 4 seconds: a gateway's /livez, unless another is named. */
const url = process.argv[2] ?? 'http://127.0.0.1:8080/livez';
try {
  const response = await fetch(url, { signal: AbortSignal.timeout(4_000) });
  const body = await response.text();
  console.log(`${url}: ${response.status} ${body}`);
  process.exit(response.ok ? 0 : 1);
} catch (error) {
  console.log(`${url}: ${error.cause?.message ?? error.message}`);
  process.exit(1);
}
