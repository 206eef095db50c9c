/** What the settings of a gateway say of the jobs that it lets in. */
import type { Config, SettingName } from './config.js';
import type { ApiKeys } from './api-keys.js';
import type { IntakeRules } from './intake.js';
import { Tenants } from './tenants.js';

export const intakeSettingNames = [
  'tenants',
  'admission',
  'maxQueuedJobs',
  'maxQueuedTokens',
  'retention',
] as const satisfies readonly SettingName[];

type IntakeConfig = Pick<Config, (typeof intakeSettingNames)[number]>;

/** @throws CaravanError `bad_usage` for a file of tenants that is wrong. */
export function intakeSettings(
  config: IntakeConfig,
  apiKeys: ApiKeys | null = null,
): {
  readonly tenants: Tenants;
  readonly rules: IntakeRules;
} {
  const { tenants: path, admission, maxQueuedJobs, maxQueuedTokens, retention } = config;
  const withoutFile = apiKeys === null ? Tenants.open() : Tenants.keyed(apiKeys);
  return {
    tenants: path === undefined ? withoutFile : Tenants.read(path, apiKeys),
    rules: { admission, maxQueuedJobs, maxQueuedTokens, retentionS: retention },
  };
}
