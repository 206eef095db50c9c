/**
 * Whose a request is, and how much a tenant may have: from the file that `--tenants` names.
 *
 *   { "tenants": { "acme": { "weight": 3, "keys": ["sk-…"], "maxJobs": 200, "maxQueuedTokens": 500000,
 *                            "requestsPerMinute": 600, "mostUrgent": 50 } },
 *     "default": { "weight": 1 } }
 *
 * A request belongs to the tenant whose key it shows. A tenant without keys is named by the header `x-caravan-tenant`.
 * Whoever shows neither is `default`, if the file has it. Without a file everybody may name any tenant, with weight 1.
 * With `--api-keys` every request needs a key, of that file or of this one.
 */
import { readFileSync } from 'node:fs';
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import type { ApiKeys } from './api-keys.js';
import { bearerKey, keyDigest, KeyRing } from './key-ring.js';
import { DEFAULT_TENANT } from './queue-record.js';
import { tenantName, type Tenant, type TenantClaim } from './tenant.js';

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

export class Tenants {
  readonly #byKey: KeyRing<Tenant>;
  readonly #byName: ReadonlyMap<string, Tenant>;
  /** Those with keys, too. */
  readonly #all: ReadonlyMap<string, Tenant>;
  /** Whether a name that is not known is a tenant, too. */
  readonly #isOpen: boolean;
  readonly #apiKeys: ApiKeys | null;

  private constructor(
    byKey: KeyRing<Tenant>,
    byName: ReadonlyMap<string, Tenant>,
    all: ReadonlyMap<string, Tenant>,
    { isOpen, apiKeys }: { readonly isOpen: boolean; readonly apiKeys: ApiKeys | null },
  ) {
    this.#all = all;
    this.#byKey = byKey;
    this.#byName = byName;
    this.#isOpen = isOpen;
    this.#apiKeys = apiKeys;
  }

  /** Everybody may name any tenant. */
  static open(): Tenants {
    return new Tenants(new KeyRing(), new Map(), new Map(), { isOpen: true, apiKeys: null });
  }

  /** Tenants are those that have keys, and all weigh the same. */
  static keyed(apiKeys: ApiKeys): Tenants {
    return new Tenants(new KeyRing(), new Map(), new Map(), { isOpen: false, apiKeys });
  }

  /** @throws CaravanError `bad_usage` naming the file and what is wrong with it. */
  static read(path: string, apiKeys: ApiKeys | null = null): Tenants {
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
    const byKey = new KeyRing<Tenant>();
    const byName = new Map<string, Tenant>();
    const all = new Map<string, Tenant>();
    const { tenants = {}, default: anyone } = parsed.data;
    for (const [name, { keys, ...entry }] of Object.entries(tenants)) {
      const tenant = tenantOf(name, entry);
      all.set(name, tenant);
      if (keys === undefined) byName.set(name, tenant);
      for (const key of keys ?? []) {
        if (byKey.add(keyDigest(key), tenant) !== undefined) {
          return refuse(`tenants.${name}: a key belongs to another, too`);
        }
      }
    }
    if (anyone !== undefined) {
      const tenant = tenantOf(DEFAULT_TENANT, anyone);
      byName.set(DEFAULT_TENANT, tenant);
      if (!all.has(DEFAULT_TENANT)) all.set(DEFAULT_TENANT, tenant);
    }
    return new Tenants(byKey, byName, all, { isOpen: false, apiKeys });
  }

  /** Whether requests may be refused for what they say of their tenant: then tenants do not see what others have. */
  get areApart(): boolean {
    return !this.#isOpen;
  }

  /** @throws CaravanError `invalid_api_key`, `invalid_request` for a name that cannot be one. */
  find({ authorization, name }: TenantClaim): Tenant {
    const key = bearerKey(authorization);
    if (!this.#isOpen && key !== undefined) {
      const owner = this.#apiKeys?.tenantOf(key);
      const tenant = owner === undefined ? this.#byKey.ownerOf(key) : this.trusted(owner);
      if (tenant !== undefined) return tenant;
      throw new CaravanError('invalid_api_key', 'the API key is not known');
    }
    // A tenant whose last key was taken from the file must not become one that anybody may name.
    if (this.#apiKeys !== null) {
      throw new CaravanError('invalid_api_key', 'an API key is needed: Authorization: Bearer KEY');
    }
    return this.#named(name ?? DEFAULT_TENANT);
  }

  /** Whether a tenant may see what belongs to `owner`; what belongs to nobody is of the default one. */
  mayMind(tenant: Tenant, owner: string | undefined): boolean {
    return this.#isOpen || tenant.name === (owner ?? DEFAULT_TENANT);
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
      'invalid_api_key',
      name === DEFAULT_TENANT
        ? 'an API key is needed: Authorization: Bearer KEY'
        : `tenant ${name} needs its API key`,
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
