/**
 * Whose a request is, and how much a tenant may have: from the file that `--tenants` names.
 *
 *   { "tenants": { "acme": { "weight": 3, "keys": ["sk-…"], "maxJobs": 200, "maxQueuedTokens": 500000,
 *                            "requestsPerMinute": 600, "mostUrgent": 50 } },
 *     "default": { "weight": 1 } }
 *
 * A request belongs to the tenant whose key it shows. A tenant without keys is named by the header `x-caravan-tenant`.
 * Whoever shows neither is `default`, if the file has it. Without a file everybody may name any tenant, with weight 1.
 */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { DEFAULT_TENANT } from './queue-order.js';

export interface Tenant {
  readonly name: string;
  /** Share of the engines, relative to other tenants. */
  readonly weight: number;
  /** Jobs that wait or run, at most; null for no limit. */
  readonly maxJobs: number | null;
  /** Prompt and output tokens that wait, at most. */
  readonly maxQueuedTokens: number | null;
  readonly requestsPerMinute: number | null;
  /** The least priority number that its jobs may have. */
  readonly mostUrgent: number;
}

/** What a request says of its tenant. */
export interface TenantClaim {
  readonly authorization: string | undefined;
  /** The header `x-caravan-tenant`. */
  readonly name: string | undefined;
}

export const tenantName = /^[\w.-]{1,64}$/;

const count = z.number().int().min(1).max(Number.MAX_SAFE_INTEGER).optional();
const tenantEntry = z.strictObject({
  weight: z.number().min(0.001).max(1000).optional(),
  keys: z.array(z.string().min(8)).min(1).optional(),
  maxJobs: count,
  maxQueuedTokens: count,
  requestsPerMinute: count,
  mostUrgent: z.number().int().min(1).max(1000).optional(),
});
const tenantsFile = z.strictObject({
  tenants: z.record(z.string().regex(tenantName), tenantEntry).optional(),
  default: tenantEntry.omit({ keys: true }).optional(),
});

/** Keys are compared by their digests: how long that takes says nothing of them. */
const digestOf = (key: string): string => createHash('sha256').update(key).digest('hex');

export class Tenants {
  readonly #byKey: ReadonlyMap<string, Tenant>;
  readonly #byName: ReadonlyMap<string, Tenant>;
  /** Those with keys, too. */
  readonly #all: ReadonlyMap<string, Tenant>;
  /** Whether a name that is not known is a tenant, too. */
  readonly #isOpen: boolean;

  private constructor(
    byKey: ReadonlyMap<string, Tenant>,
    byName: ReadonlyMap<string, Tenant>,
    all: ReadonlyMap<string, Tenant>,
    isOpen: boolean,
  ) {
    this.#all = all;
    this.#byKey = byKey;
    this.#byName = byName;
    this.#isOpen = isOpen;
  }

  /** Everybody may name any tenant. */
  static open(): Tenants {
    return new Tenants(new Map(), new Map(), new Map(), true);
  }

  /** @throws CaravanError `bad_usage` naming the file and what is wrong with it. */
  static read(path: string): Tenants {
    const refuse = (reason: string, cause?: unknown): never => {
      throw new CaravanError('bad_usage', `--tenants ${path}: ${reason}`, { cause });
    };
    let content: unknown;
    try {
      content = JSON.parse(readFileSync(path, 'utf8'));
    } catch (cause) {
      return refuse(cause instanceof SyntaxError ? 'is not valid JSON' : 'cannot be read', cause);
    }
    const parsed = tenantsFile.safeParse(content);
    if (!parsed.success) {
      const issue = parsed.error.issues[0]!;
      return refuse(`${issue.path.join('.')}: ${issue.message}`);
    }
    const byKey = new Map<string, Tenant>();
    const byName = new Map<string, Tenant>();
    const all = new Map<string, Tenant>();
    const { tenants = {}, default: anyone } = parsed.data;
    for (const [name, { keys, ...entry }] of Object.entries(tenants)) {
      const tenant = tenantOf(name, entry);
      all.set(name, tenant);
      if (keys === undefined) byName.set(name, tenant);
      for (const key of keys ?? []) {
        const digest = digestOf(key);
        if (byKey.has(digest)) return refuse(`tenants.${name}: a key belongs to another, too`);
        byKey.set(digest, tenant);
      }
    }
    if (anyone !== undefined) byName.set(DEFAULT_TENANT, tenantOf(DEFAULT_TENANT, anyone));
    return new Tenants(byKey, byName, all, false);
  }

  /** @throws CaravanError `unauthorized`, `invalid_request` for a name that cannot be one. */
  find({ authorization, name }: TenantClaim): Tenant {
    const key = /^Bearer +(\S+)$/i.exec(authorization ?? '')?.[1];
    if (!this.#isOpen && key !== undefined) {
      const tenant = this.#byKey.get(digestOf(key));
      if (tenant === undefined) throw new CaravanError('unauthorized', 'the API key is not known');
      return tenant;
    }
    return this.#named(name ?? DEFAULT_TENANT);
  }

  /** For whoever may reach Redis itself: no key is asked for. @throws CaravanError `invalid_request`. */
  trusted(name: string): Tenant {
    return this.#all.get(name) ?? tenantOf(name, {});
  }

  #named(name: string): Tenant {
    if (!tenantName.test(name)) {
      throw new CaravanError(
        'invalid_request',
        `tenant: must be 1 to 64 letters, digits and . _ -, got ${JSON.stringify(name)}`,
        { param: 'tenant' },
      );
    }
    const tenant = this.#byName.get(name) ?? (this.#isOpen ? tenantOf(name, {}) : undefined);
    if (tenant !== undefined) return tenant;
    throw new CaravanError(
      'unauthorized',
      name === DEFAULT_TENANT ? 'an API key is needed' : `tenant ${name} needs its API key`,
    );
  }
}

function tenantOf(name: string, entry: Omit<z.infer<typeof tenantEntry>, 'keys'>): Tenant {
  return {
    name,
    weight: entry.weight ?? 1,
    maxJobs: entry.maxJobs ?? null,
    maxQueuedTokens: entry.maxQueuedTokens ?? null,
    requestsPerMinute: entry.requestsPerMinute ?? null,
    mostUrgent: entry.mostUrgent ?? 1,
  };
}
