/** HTTPS of the gateway: with a private authority, renewed while it serves, and ended without cutting what is open. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import https from 'node:https';
import type { IncomingMessage } from 'node:http';
import net from 'node:net';
import { once } from 'node:events';
import { after, test } from 'node:test';
import tls from 'node:tls';
import pino from 'pino';
import { HttpCertificate } from '../coordinator/http-certificate.js';
import { Authority } from './certificates.js';
import { startGateway } from './gateway.js';

const limit = { timeout: 60_000 };
const log = pino({ level: 'silent' });
const authority = new Authority();
after(() => {
  authority.remove();
});
const { certPath: httpsCert, keyPath: httpsKey } = authority.leaf('gateway');
const certificate = HttpCertificate.open({ httpsCert, httpsKey })!;
const gateway = await startGateway(undefined, { certificate });
after(() => gateway.stop());
const { hostname, port } = new URL(gateway.url);
const ca = fs.readFileSync(authority.caPath);

/** The response to a request, its body unread. */
async function ask(path: string, body?: object): Promise<IncomingMessage> {
  const options = { hostname, port, path, ca, agent: false, method: body ? 'POST' : 'GET' };
  const request = https.request({ ...options, headers: { 'content-type': 'application/json' } });
  request.end(body === undefined ? undefined : JSON.stringify(body));
  const [response] = (await once(request, 'response')) as [IncomingMessage];
  return response;
}

/** Whom the gateway says that it is, to a new connection. */
async function subject(): Promise<string> {
  const socket = tls.connect({ host: hostname, port: Number(port), ca });
  await once(socket, 'secureConnect');
  const { CN } = socket.getPeerCertificate().subject;
  socket.destroy();
  return String(CN);
}

void test(
  'it says https, and who does not trust its authority, or speaks plainly, gets nothing',
  limit,
  async () => {
    assert.match(gateway.url, /^https:/);
    assert.equal((await ask('/livez')).statusCode, 200);
    await assert.rejects(fetch(`${gateway.url}/livez`));
    await assert.rejects(fetch(`http://${hostname}:${port}/livez`));
  },
);

void test(
  'a renewed certificate is shown to new connections; half of one is not',
  limit,
  async () => {
    assert.equal(await subject(), 'gateway');
    const renewed = authority.leaf('renewed');
    fs.copyFileSync(renewed.certPath, httpsCert);
    certificate.look(log);
    assert.equal(await subject(), 'gateway', 'its key has not come yet');
    fs.copyFileSync(renewed.keyPath, httpsKey);
    certificate.look(log);
    assert.equal(await subject(), 'renewed');
  },
);

void test(
  'draining waits for an open stream, and for no connection that asks nothing',
  limit,
  async () => {
    const stream = await ask('/v1/completions', { prompt: 'Once', max_tokens: 4, stream: true });
    assert.equal(stream.statusCode, 200);
    // One that has not even shaken hands, and one that has.
    const mute = net.connect(Number(port), hostname);
    await once(mute, 'connect');
    const idle = tls.connect({ host: hostname, port: Number(port), ca });
    await once(idle, 'secureConnect');
    const gone = Promise.all([once(mute, 'close'), once(idle, 'close')]);
    for (const socket of [mute, idle]) socket.on('error', () => undefined).resume();
    const drained = gateway.drain();
    await gone;
    const [id] = await gateway.jobIds();
    const take = await gateway.take(id!);
    await gateway.journal.append(take, 0, [5, 6], [' upon', ' a']);
    const usage = { promptTokens: 2, completionTokens: 2 };
    await gateway.journal.end(take, 2, { status: 'completed', finishReason: 'stop', usage }, '');
    let text = '';
    for await (const chunk of stream) text += String(chunk);
    assert.match(text, / upon/);
    assert.match(text, /data: \[DONE\]/);
    await drained;
  },
);

void test('a certificate that cannot be used is refused at start, by flag', () => {
  assert.equal(HttpCertificate.open({}), null);
  assert.throws(() => HttpCertificate.open({ httpsCert }), /--https-cert and --https-key belong/);
  const nowhere = { httpsCert, httpsKey: '/nowhere' };
  assert.throws(() => HttpCertificate.open(nowhere), /--https-key \/nowhere: cannot be read/);
  const mixed = { httpsCert, httpsKey: authority.leaf('other').keyPath };
  assert.throws(() => HttpCertificate.open(mixed), /--https-cert .*: .*key values mismatch/);
});
