/** `caravan submit`: adds one job to the queue. */
import { randomInt } from 'node:crypto';
import type { Command } from 'commander';
import { z } from 'zod';
import type { Estimate } from '../admission.js';
import { Answers } from '../answers.js';
import { Intake } from '../intake.js';
import { intakeSettingNames, intakeSettings } from '../intake-settings.js';
import { newJobId, Journal } from '../journal.js';
import { GatewayMetrics } from '../metrics.js';
import { Models } from '../models.js';
import { parseChat, parseCompletion } from '../openai.js';
import { readMessages } from '../prompt.js';
import { DEFAULT_TENANT } from '../queue-record.js';
import { Store } from '../store.js';
import { StoreConnection } from '../store-connection.js';
import { EMBEDDED_MODEL } from '../package-root.js';
import { WebhookRecords } from '../store-webhooks.js';
import { WebhookIntake } from '../webhook-intake.js';
import { checked, declareSettings } from './options.js';

export function register(program: Command): void {
  const command = program
    .command('submit')
    .description('Adds one job to the queue; `caravan result ID` waits for its end.')
    .option(
      '--webhook <url>',
      'address that a gateway tells when the job has ended',
      checked(z.url({ protocol: /^https?$/ }), 'an http:// or https:// URL'),
    );
  const settings = declareSettings(
    command,
    [
      'redis',
      'model',
      'prompt',
      'chat',
      'maxTokens',
      'temperature',
      'topP',
      'topK',
      'seed',
      'stop',
      'ignoreEos',
      'priority',
      'deadline',
      'tenant',
      ...intakeSettingNames,
      'json',
    ],
    { required: ['redis'] },
  );
  command.action(async () => {
    const s = settings();
    const { webhook } = command.opts<{ webhook?: string }>();
    const connection = await StoreConnection.open(s.redis, 'impatient');
    const store = new Store(connection);
    const journal = await Journal.open(s.redis, 'impatient');
    const records = new WebhookRecords(connection);
    // What may be called is the gateway's to say.
    const webhooks = new WebhookIntake(records, { check: () => undefined });
    const ignore = (): void => undefined;
    const { tenants, rules } = intakeSettings(s);
    const intake = new Intake(store, rules);
    const answers = new Answers(s.redis, journal, new GatewayMetrics(), ignore, {
      webhooks,
      intake,
    });
    try {
      const models = new Models(store);
      // The default names the embedded model; where it is not served, the only card there is.
      const cards = await models.cards();
      const isDefault = s.model === EMBEDDED_MODEL && !cards.some(({ name }) => name === s.model);
      const model = await models.find(isDefault ? null : s.model);
      const body = {
        max_tokens: s.maxTokens,
        temperature: s.temperature,
        top_p: s.topP,
        top_k: s.topK,
        seed: s.seed ?? randomInt(2 ** 47),
        stop: s.stop,
        ignore_eos: s.ignoreEos,
        priority: s.priority,
        deadline: s.deadline,
        ...(webhook === undefined ? {} : { webhook: { url: webhook } }),
      };
      const asked =
        s.chat === undefined
          ? parseCompletion({ ...body, prompt: s.prompt ?? '' }, model)
          : parseChat({ ...body, messages: readMessages(s.chat) }, model);
      const tenant = tenants.trusted(s.tenant ?? DEFAULT_TENANT);
      const { id, estimate } = await answers.submit(asked, newJobId(), tenant);
      const times = estimate === null ? null : timesOf(estimate);
      if (s.json) process.stdout.write(`${JSON.stringify({ id, estimate: times })}\n`);
      else process.stdout.write(`${id}\n`);
      if (!s.json && times !== null) {
        process.stderr.write(`starts about ${times.start}, ends about ${times.end}\n`);
      }
    } finally {
      await answers.close();
      journal.close();
      connection.close();
    }
  });
}

const timesOf = ({ startMs, endMs }: Estimate) => ({
  start: new Date(startMs).toISOString(),
  end: new Date(endMs).toISOString(),
});
